"""A study's figures as two small CSV files beside its page: a row a run, and a row an epoch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ran_ext._files import write_atomically

from .outcomes import Outcome
from .plan import Run


def run_row(run: Run, outcome: Outcome) -> dict[str, Any]:
    """Accuracies as shares, times in seconds; of a run that diverged there is nothing but what was not finite."""
    names = {"implementation": run.implementation, "variant": run.variant, "seed": run.seed}
    row = names | {"parameters": outcome.parameters, "diverged": outcome.diverged}
    if outcome.diverged:
        return row
    return row | {
        "train_accuracy": outcome.train_accuracy,
        "test_accuracy": outcome.test_accuracy,
        "gap": outcome.gap,
        "seconds": outcome.seconds,
        "seconds_to_convergence": outcome.convergence,
    }


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows under the names of the longest, numbers with five digits.

    >>> print(csv_text([{"a": 1}, {"a": 2, "b": 0.123456}]), end="")
    a,b
    1,
    2,0.12346
    """
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, max(rows, key=len, default={}).keys(), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def write_tables(outcomes: Mapping[Run, Outcome], folder: Path) -> None:
    """Write ``runs.csv`` and ``epochs.csv``; the runs' own files, with every weight, are for continuing alone."""
    runs = [run_row(run, outcome) for run, outcome in outcomes.items()]
    epochs = [
        {"implementation": run.implementation, "variant": run.variant, "seed": run.seed} | row
        for run, outcome in outcomes.items()
        for row in outcome.epochs
    ]
    for name, rows in (("runs.csv", runs), ("epochs.csv", epochs)):
        write_atomically(folder / name, csv_text(rows).encode())
