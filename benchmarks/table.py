"""A table that is printed row by row while it is measured, and kept as JSON with the machine it was measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ran_ext.train.report import write_result

from .timing import environment


class Table:
    """Prints in Markdown; writes ``out`` anew with every row.

    Args:
        title: of the table, printed and kept with the environment.
        columns: their names.
        out: JSON, or None for none.

    >>> table = Table("errors", ["op", "ratio"], None)  # doctest: +ELLIPSIS
    errors: ...
    | op | ratio |
    | --- | --- |
    >>> table.add("conv2d", 1.25)
    | conv2d | 1.25 |
    """

    def __init__(self, title: str, columns: Sequence[str], out: Path | None):
        self.out, self.columns = out, list(columns)
        self.environment = {"title": title, **environment(torch.device("cpu"))}
        self.rows: list[list[str | float]] = []
        cpu, isa, threads = (self.environment[name] for name in ("cpu", "cpu_capability", "threads"))
        print(f"{title}: {cpu}, {isa}, {threads} threads, torch {self.environment['torch']}")
        print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)

    def add(self, *cells: str | float) -> None:
        """One row: text as it is, numbers to three digits."""
        row: list[str | float] = [float(f"{cell:.3g}") if isinstance(cell, float) else cell for cell in cells]
        print(f"| {' | '.join(map(str, row))} |", flush=True)
        self.rows.append(row)
        if self.out is not None:
            content = {"environment": self.environment, "columns": self.columns, "rows": self.rows}
            write_result(self.out, content)
