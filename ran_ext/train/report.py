"""What a run shows: progress and expected end, ``result.json``, the curves, the final table, TensorBoard's files."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor, nn
from tqdm import tqdm

from .._attention_maps import attention_masks, has_attention, mask_picture, png
from .._files import write_atomically, write_json
from ..data import Normalize
from .evaluation import FEW_CLASSES, EpochFigures, Result, by_class
from .recipe import learning_rate
from .state import Callback, TrainingState
from .system import TrainingError, duration, write_failure

LOG, WARNING = logging.getLogger(__name__), logging.WARNING
#: What an image validated costs in images trained, its share of the checkpoint included: 0.48 to 0.59 in sample runs.
VALIDATION = 0.5


class Progress:
    """Shows loss, accuracy, images a second, the time left of the whole run and its expected end.

    A line of its own announces the end within half a minute: after the first step that ends later than
    ``announce_after``, or, while the first step takes longer, as a lower bound.

    Args:
        steps: of the whole run.
        done: steps taken before this process took over.
        file: where to; standard error if None.
        interval: seconds between two refreshes of the bar.
        log_interval: seconds between two lines where ``file`` is no terminal.
        enabled: False shows nothing, but :attr:`due` still sets the pace at which the caller reads its meters.
        overhead: time outside of the steps (validation, checkpoints) as a share of theirs; the caller sets the
            attribute to 0 after the first validation, because from then on it is measured.
        may_stop: whether the run may stop before its last step.
        announce_after: seconds.
    """

    def __init__(
        self,
        steps: int,
        done: int = 0,
        *,
        file: TextIO | None = None,
        interval: float = 0.5,
        log_interval: float = 10.0,
        enabled: bool = True,
        overhead: float = 0.0,
        may_stop: bool = False,
        announce_after: float = 10.0,
    ):
        self.file = file or sys.stderr
        self.steps, self.done, self.first = steps, done, done
        self.start = self.shown = self.warm = time.monotonic()
        terminal = enabled and self.file.isatty()
        self.enabled, self.interval = enabled, interval if terminal else log_interval
        self.overhead, self.may_stop, self.announce_after = overhead, may_stop, announce_after
        self.announced = not enabled
        self.bar = (
            tqdm(total=steps, initial=done, file=self.file, bar_format="{desc} {bar} {postfix}") if terminal else None
        )
        self.waiting: threading.Timer | None = None

    def begin(self) -> None:
        """Start the clock: the first step is about to run."""
        self.start = self.shown = time.monotonic()
        if self.enabled and self.done < self.steps:
            self.waiting = threading.Timer(2.5 * self.announce_after, self._announce_at_least)
            self.waiting.daemon = True
            self.waiting.start()

    @property
    def due(self) -> bool:
        """Whether it is time to read the meters and :meth:`show` them."""
        return time.monotonic() - self.shown >= self.interval

    def advance(self) -> None:
        """Count one step."""
        self.done += 1
        if self.done == self.first + 1:
            self.warm = time.monotonic()
            self._stop_waiting()

    @property
    def seconds_left(self) -> float | None:
        """Expected, from the steps so far without the first, which chooses kernels; None before there is one."""
        fresh = self.done - self.first
        if fresh < 1:
            return None
        start, counted = (self.warm, fresh - 1) if fresh > 1 else (self.start, 1)
        return (time.monotonic() - start) / counted * (self.steps - self.done) * (1 + self.overhead)

    def show(self, where: str, loss: float, accuracy: float, images_per_second: float) -> None:
        """Refresh; ``where`` such as ``epoch 2/10``. In a log, nothing is written before it is :attr:`due`."""
        if self.bar is None and not self.due:
            return
        self.shown = time.monotonic()
        left = self.seconds_left
        self._announce(left)
        end = "?" if left is None else f"{duration(left)} left, ends {clock(left)}"
        figures = f"loss {loss:.3f}, accuracy {accuracy:.3f}, {images_per_second:.0f} images/s, {end}"
        if self.bar is not None:
            self.bar.n = self.done
            self.bar.set_description_str(where, refresh=False)
            self.bar.set_postfix_str(figures)
        elif self.enabled:
            say(f"{where}, {100 * self.done / self.steps:.0f} %: {figures}", self.file)

    def _announce(self, left: float | None) -> None:
        if self.announced or left is None or self.shown - self.start < self.announce_after:
            return
        self.announced = True
        latest = ", or earlier where the accuracy stops growing" if self.may_stop else ""
        self.line(f"expected end: {clock(left)}, in {duration(left)}{latest}")

    def _announce_at_least(self) -> None:
        """Runs in a thread of its own while the first step does."""
        took = time.monotonic() - self.start
        left = took * (self.steps - self.first)
        self.line(
            f"the first of {self.steps - self.first:,} steps is not through after {took:.0f} s: at this rate the run "
            f"takes over {duration(left)} and ends after {clock(left)}"
        )

    def line(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=self.file)
        elif self.enabled:
            say(text, self.file)

    def log(self, text: str, level: int = logging.INFO) -> None:
        """Tell the package's logger, unless the run is quiet or not the first process's."""
        if self.enabled:
            LOG.log(level, text)

    def _stop_waiting(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()

    def close(self) -> None:
        self._stop_waiting()
        if self.bar is not None:
            self.bar.close()


def say(text: str, file: TextIO | None = None) -> None:
    """Print to ``file``, by default standard output; a full disk or a closed pipe there costs the text alone."""
    with contextlib.suppress(OSError):
        print(text, file=file, flush=True)


def clock(seconds: float) -> str:
    """Local time so many seconds from now, with the date where it is another day's.

    >>> len(clock(0)), len(clock(3 * 86400))
    (5, 16)
    """
    now = time.time()
    then, today = time.localtime(now + seconds), time.localtime(now)
    return time.strftime("%H:%M" if then[:3] == today[:3] else "%Y-%m-%d %H:%M", then)


PROTOCOLS = {
    "holdout": "validated on images that were not trained on; a test set, if there is one, was read once, at the end",
    "report": "validated and selected on the test set, as the report did: the figure is optimistic",
}


def epoch_line(figures: EpochFigures, epochs: int) -> str:
    """What the log says of an epoch, of ``epochs``."""
    val = ""
    if figures.val_loss is not None:
        val = f", validation loss {figures.val_loss:.3f}, accuracy {figures.val_accuracy:.4f}"
    return (
        f"epoch {figures.epoch}/{epochs}: training loss {figures.train_loss:.3f}, accuracy {figures.train_accuracy:.4f}"
        f"{val}; lr {figures.lr:.2e}, {figures.images_per_second:.0f} images/s, {duration(figures.seconds)}"
    )


def result_dict(result: Result, environment: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of a run with what they must be read together with, fit for JSON.

    Args:
        result: of :func:`ran_ext.train.fit`.
        environment: of :func:`ran_ext.train.system.environment`.
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
        classes = data.get("classes", ())
        if len(result.test.per_class) == len(classes) <= FEW_CLASSES:
            rows.append(("by class", ", ".join(by_class(result.test, classes))))
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


class TensorBoardLogger(Callback):
    """Writes TensorBoard's files; a run that is resumed continues them.

    A card shows four runs: ``training``, ``validation``, a point an epoch; ``test``; ``steps``, a point a step.
    Settings are in the tab HPARAMS, masks over a few test images in IMAGES.

    Args:
        folder: of the event files.
        images: uint8 ``(N, 3, H, W)``, a few, whose attention masks are drawn after each epoch.
        normalize: makes the network's input of them.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path, images: Tensor, normalize: Normalize):
        from torch.utils.tensorboard import SummaryWriter  # fails where tensorboard is missing, so not at import

        self._open = SummaryWriter
        self.folder, self.images, self.normalize = Path(folder), images, normalize

    def on_start(self, state: TrainingState, step: int) -> None:
        self.config, self.steps = state.config, len(state.history.values)
        self.by_config = state.given is None  # a scheduler of the user's says each epoch's rate alone
        _silence_the_writer()
        # what an interrupted run logged after its last checkpoint comes again, so it is purged
        epoch = state.epoch + 1 if step else None
        purge = {"training": epoch, "validation": epoch, "test": epoch, "steps": step or None}
        self.writers = {name: self._open(str(self.folder / name), purge_step=at) for name, at in purge.items()}

    def on_steps(self, first: int, rows: list[tuple[float, float]], images_per_second: float) -> None:
        writer = self.writers["steps"]
        for step, (loss, accuracy) in enumerate(rows, first):
            writer.add_scalar("by step/loss", loss, step)
            writer.add_scalar("by step/accuracy", accuracy, step)
            if self.by_config:
                writer.add_scalar("by step/learning rate", learning_rate(self.config, step, self.steps), step)
        writer.add_scalar("by step/images per second", images_per_second, first + len(rows) - 1)

    def on_epoch(self, figures: EpochFigures, state: TrainingState) -> None:
        epoch = figures.epoch
        for name, part, value in (
            ("training", "loss", figures.train_loss),
            ("training", "accuracy", figures.train_accuracy),
            ("training", "learning rate", figures.lr),
            ("training", "images per second", figures.images_per_second),
            ("training", "wall seconds", figures.seconds),
            ("validation", "loss", figures.val_loss),
            ("validation", "accuracy", figures.val_accuracy),
        ):
            if value is not None:
                self.writers[name].add_scalar(f"by epoch/{part}", value, epoch)
        model = state.eval_model
        dense = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if dense:
            self.writers["training"].add_histogram("last layer/weight", dense[-1].weight.detach().float(), epoch)
        device = next(model.parameters()).device
        inputs = self.normalize.to(device)(self.images.to(device))
        for name, masks in attention_masks(model, inputs).items() if has_attention(model) else ():
            self.writers["test"].add_image(f"attention/{name}", mask_picture(self.images, masks.cpu()), epoch)
        for writer in self.writers.values():
            writer.flush()

    def on_end(self, result: Result) -> None:
        if result.test is not None and result.figures:
            epoch = result.selected_epoch or result.figures[-1].epoch
            self.writers["test"].add_scalar("by epoch/loss", result.test.loss, epoch)
            self.writers["test"].add_scalar("by epoch/accuracy", result.test.accuracy, epoch)
            plain = (bool, int, float, str)  # what TensorBoard takes
            settings = {key: v if isinstance(v, plain) else str(v) for key, v in result.config.to_dict().items()}
            self.writers["test"].add_hparams(settings, {"test accuracy": result.test.accuracy}, run_name=".")
        for writer in self.writers.values():
            writer.close()


def _silence_the_writer() -> None:
    """Print no traceback of TensorBoard's own thread, which gives its error to the next call as well."""
    before = threading.excepthook
    if getattr(before, "__name__", "") == "all_but_the_writer":
        return

    def all_but_the_writer(failure: threading.ExceptHookArgs) -> None:
        if type(failure.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
            before(failure)

    threading.excepthook = all_but_the_writer
