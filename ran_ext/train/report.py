"""What a run leaves for people: ``result.json``, the curves, the final table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._files import write_atomically, write_json
from ..data import CLASSES
from .errors import TrainingError, write_failure
from .png import png
from .progress import duration
from .results import EpochFigures, Result

PROTOCOLS = {
    "holdout": "validated on images held out of the training set; the test set was read once, at the end",
    "report": "validated and selected on the test set, as the report did: the figure is optimistic",
}


def result_dict(result: Result, environment: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of a run with what they must be read together with, fit for JSON.

    Args:
        result: of :func:`ran_ext.train.fit`.
        environment: of :func:`ran_ext.train.environment`.
        data: where the images came from and how many there were.
    """
    return {
        "config": result.config.to_dict(),
        "data": dict(data),
        "environment": dict(environment),
        "protocol": PROTOCOLS[result.config.protocol],
        "epochs": [dataclasses.asdict(row) for row in result.figures],
        "best_epoch": result.best_epoch,
        "selected_epoch": result.selected_epoch,
        "stopped_early": result.stopped_early,
        "interrupted": result.interrupted,
        "step": result.step,
        "wall_seconds": result.seconds,
        "test": result.test.to_dict() if result.test else None,
    }


def write_result(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` as JSON, whole or not at all.

    Raises:
        TrainingError: it cannot be written.
    """
    with _explained(path):
        write_json(path, values)


def write_curves(path: Path, result: Result) -> None:
    """Draw loss and accuracy over epochs and over seconds as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
        TrainingError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # fails where matplotlib is missing, so not at import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharey="row")
    rows = result.figures
    for row, (measure, label) in enumerate((("loss", "cross entropy"), ("accuracy", "accuracy"))):
        for column, (x, x_label) in enumerate((("epoch", "epoch"), ("seconds", "wall time (s)"))):
            axis = axes[row][column]
            for part, name, colour in (("train", "training", "#1f77b4"), ("val", "validation", "#d95f02")):
                points = [(getattr(r, x), getattr(r, f"{part}_{measure}")) for r in rows]
                points = [point for point in points if point[1] is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=name)
            if measure == "accuracy" and result.test is not None:
                text = f"test {result.test.accuracy:.3f}"
                axis.axhline(result.test.accuracy, color="#444444", linestyle="--", linewidth=1, label=text)
            if x == "epoch":
                axis.xaxis.get_major_locator().set_params(integer=True)
                axis.set_ylabel(label)
            else:
                axis.set_xlim(left=0)
            axis.set_xlabel(x_label)
            axis.grid(alpha=0.3)
            axis.legend()
    config = result.config
    figure.suptitle(
        f"{config.model}, {config.optimizer}, batch {config.batch_size}, {config.dtype}, seed {config.seed}"
    )
    with _explained(path):
        write_atomically(path, png(figure))


def table(result: Result, parameters: int, data: Mapping[str, Any], files: Path) -> str:
    """The final table, as text."""
    selected = next((row for row in result.figures if row.epoch == result.selected_epoch), None)
    rows = [
        ("model", f"{result.config.model}, {parameters:,} parameters"),
        ("data", f"{data['source']}: {data['training']:,} training, {data['validation']:,} validation images"),
        ("epochs", _epochs(result)),
    ]
    if selected:
        rows.append(("training", f"loss {selected.train_loss:.3f}, accuracy {selected.train_accuracy:.4f}"))
        rows.append(("validation", _validation(selected)))
    if result.test:
        count = int(result.test.confusion.sum())
        rows.append(("test", f"loss {result.test.loss:.3f}, accuracy {result.test.accuracy:.4f} ({count:,} images)"))
        if len(result.test.per_class) == len(CLASSES):
            pairs = zip(CLASSES, result.test.per_class, strict=True)
            rows.append(("by class", ", ".join(f"{name} {share:.2f}" for name, share in pairs)))
    rate = max((row.images_per_second for row in result.figures), default=0.0)
    rows.append(("protocol", PROTOCOLS[result.config.protocol]))
    rows.append(("time", f"{duration(result.seconds)}, up to {rate:.0f} images/s in training, {result.step} step"))
    rows.append(("files", f"{files}: {', '.join(sorted(path.name for path in files.glob('[!.]*')))}"))
    return "\n".join(f"{name:<11}{text}" for name, text in rows)


def _epochs(result: Result) -> str:
    count = len(result.figures)
    why = "stopped early" if result.stopped_early else "interrupted" if result.interrupted else "all"
    selected = f"; figures of epoch {result.selected_epoch} ({result.config.select})" if result.selected_epoch else ""
    return f"{count} of {result.config.epochs} ({why}){selected}"


def _validation(row: EpochFigures) -> str:
    return "none" if row.val_loss is None else f"loss {row.val_loss:.3f}, accuracy {row.val_accuracy:.4f}"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(write_failure(str(path), error)) from error
