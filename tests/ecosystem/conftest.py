"""Collects the cells of a run into the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

CELLS: dict[tuple[str, str], str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tools-table", type=Path, help="write the table of this run to a file")
    parser.addoption("--every-cell", action="store_true", help="also those that CI takes from docs/tools.md")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "rare: a cell of the table that is tried with --every-cell alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("every_cell", False):
        left_out = [item for item in items if item.get_closest_marker("rare")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        for name, value in report.user_properties:
            if name == "cell":
                tool, subject, found = value
                CELLS[tool, subject] = found


def pytest_sessionfinish(session: pytest.Session) -> None:
    to: Any = session.config.getoption("tools_table", None)
    if to is not None and not hasattr(session.config, "workerinput"):
        import ecosystem.tools  # noqa: F401  fills the table, which with pytest-xdist only the workers have done
        from ecosystem.table import PAGE, page, rare_cells

        known = {} if session.config.getoption("every_cell") else rare_cells(PAGE.read_text())
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(page({**known, **CELLS}))
