"""Collects the cells of a run into the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

CELLS: dict[tuple[str, str], str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tools-table", type=Path, help="write the table of this run to a file")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        for name, value in report.user_properties:
            if name == "cell":
                tool, subject, found = value
                CELLS[tool, subject] = found


def pytest_sessionfinish(session: pytest.Session) -> None:
    to: Any = session.config.getoption("tools_table", None)
    if to is not None and not hasattr(session.config, "workerinput"):
        from ecosystem.table import page

        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(page(CELLS))
