"""The training loop, made of the pieces beside it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Augment
from .batches import build_normalize, train_batches
from .checkpoint import load_checkpoint, save_checkpoint
from .config import Config
from .distributed import Ranks, choose_device
from .early_stopping import EarlyStopping
from .ema import ExponentialMovingAverage
from .errors import NonFiniteError, TrainingError, out_of_memory_explained
from .evaluation import Evaluation, evaluate
from .optimizers import build_optimizer, set_lr
from .progress import Progress, duration
from .schedule import learning_rate
from .signals import StopRequest
from .state import EpochFigures, TrainingState
from .step import Step, StepHistory, TrainStep

#: Steps between two agreements of several processes on whether one of them was asked to stop.
AGREE_EVERY = 16


@dataclasses.dataclass(frozen=True)
class Result:
    """What :func:`fit` hands back.

    Attributes:
        figures: a row an epoch.
        best_epoch: of the best validation accuracy, from 1; None without validation images.
        selected_epoch: whose weights :attr:`test` and ``best.pt`` are about, from 1; None where none was finished.
        test: figures on the test set, where one was given and the run came to its end.
        seconds: wall time of training and validation, over all interruptions.
        stopped_early: by the lack of progress.
        interrupted: by Ctrl-C or SIGTERM; ``resume=True`` continues.
    """

    config: Config
    figures: list[EpochFigures]
    best_epoch: int | None
    selected_epoch: int | None
    test: Evaluation | None
    seconds: float
    stopped_early: bool
    interrupted: bool


def fit(
    model: nn.Module,
    train_set: Any,
    val_set: Any | None,
    config: Config,
    out_dir: str | Path,
    *,
    test_set: Any | None = None,
    ranks: Ranks | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    make_step: Callable[[TrainStep], Step] | None = None,
    augment: Augment | None = None,
    checkpoint_every: int = 1,
    quiet: bool = False,
) -> Result:
    """Train ``model`` and leave ``last.pt`` (to resume) and ``best.pt`` (the selected weights) in ``out_dir``.

    Args:
        model: classifier of images, trained in place; moved to the device of ``ranks``. Where ``config`` asks for the
            dense layer's penalty it needs a method ``l2_penalty()``, as the networks of :mod:`ran_ext.models` have.
        train_set, val_set, test_set: as :class:`ran_ext.data.CIFAR10`. Without ``val_set`` nothing is selected or
            stopped early (``config.select`` "last", ``patience`` 0). ``test_set`` is read once, at the end.
        config: the recipe; its ``model`` and ``protocol`` fields are recorded, not acted upon.
        out_dir: made if it is missing.
        ranks: device and place among the processes, of :func:`process_group`; by default this process alone, on CUDA
            where there is one.
        resume: continue from ``last.pt`` where there is one; on the CPU bit for bit.
        callbacks: told of each step, epoch and the end, in the first process; see :class:`Callback`.
        make_step: replaces the training step, given the plain one; the place for a captured step.
        augment: replaces the one that ``config.augment`` names.
        checkpoint_every: epochs between two checkpoints; the last epoch and an interruption always write one.
        quiet: show no progress.

    Raises:
        TrainingError: with one sentence that says what to do: NaN, out of memory, full disk, unreadable or foreign
            checkpoint. The last good checkpoint is intact.
        ValueError: the arguments do not fit together.
    """
    ranks = ranks or Ranks(0, 1, choose_device("auto"))
    _check(train_set, val_set, config, ranks)
    run = _Run(model, train_set, val_set, config, Path(out_dir), ranks, callbacks, checkpoint_every, augment)
    if resume:
        run.resume()
    run.prepare(make_step, quiet)
    with StopRequest() as stop, out_of_memory_explained(ranks.device, config.batch_size):
        try:
            interrupted = run.train(stop)
            test = None if interrupted or test_set is None else run.test(test_set)
        finally:
            run.progress.close()
    result = run.result(test, interrupted)
    for callback in run.callbacks:
        callback.on_end(result)
    return result


class Callback:
    """What a run tells while it goes; every method does nothing by default. Called in the first process alone."""

    def on_steps(self, first: int, rows: list[tuple[float, float]], lr: float, images_per_second: float) -> None:
        """Steps ``first``, ``first + 1``, ... of the run took place, with these losses and accuracies."""

    def on_epoch(self, figures: EpochFigures, state: TrainingState) -> None:
        """An epoch has been validated."""

    def on_end(self, result: Result) -> None:
        """The run has come to its end, or was interrupted."""


class _Run:
    """One call of :func:`fit`."""

    def __init__(
        self,
        model: nn.Module,
        train_set: Any,
        val_set: Any | None,
        config: Config,
        out_dir: Path,
        ranks: Ranks,
        callbacks: Sequence[Callback],
        checkpoint_every: int,
        augment: Augment | None,
    ):
        self.config, self.ranks, self.val_set = config, ranks, val_set
        self.out_dir, self.checkpoint_every = out_dir, checkpoint_every
        self.callbacks = tuple(callbacks) if ranks.first else ()
        self.images = len(train_set)
        self.normalize = build_normalize(train_set, config)
        self.batches = train_batches(train_set, config, ranks, self.normalize, augment)
        self.steps = len(self.batches)
        self.local_batch = config.batch_size // ranks.world_size
        self.state = self._state(model)
        out_dir.mkdir(parents=True, exist_ok=True)

    def _state(self, model: nn.Module) -> TrainingState:
        config, device = self.config, self.ranks.device
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model = self.ranks.convert(model.to(device=device, memory_format=layout))  # type: ignore[call-overload]
        return TrainingState(
            config,
            model,
            build_optimizer(model, config, device),
            torch.amp.GradScaler(device.type) if config.dtype == "float16" else None,
            ExponentialMovingAverage(model, config.ema) if config.ema else None,
            EarlyStopping(config.patience),
            StepHistory(self.steps, self.local_batch, device),
        )

    def resume(self) -> None:
        if (self.out_dir / "last.pt").exists():
            state = load_checkpoint(self.out_dir / "last.pt", self.ranks.device)
            self.state.load_dict(state, self.ranks, self.images)

    def prepare(self, make_step: Callable[[TrainStep], Step] | None, quiet: bool) -> None:
        """Build the step; set the clock and the bar going."""
        config, state = self.config, self.state
        penalise = config.weight_decay > 0 and config.weight_decay_scope == "dense"
        step = TrainStep(
            self.ranks.wrap(state.model),
            state.optimizer,
            l2=config.weight_decay if penalise else 0.0,
            penalty=state.model.l2_penalty if penalise else None,  # type: ignore[arg-type]
            label_smoothing=config.label_smoothing,
            dtype=config.torch_dtype,
            scaler=state.scaler,
            ema=(state.ema, state.model) if state.ema else None,
        )
        self.step: Step = make_step(step) if make_step else step
        done = state.epoch * self.steps + state.history.count
        self.progress = Progress(config.epochs * self.steps, done, enabled=self.ranks.first and not quiet)
        self.start = time.perf_counter() - state.seconds

    def train(self, stop: StopRequest) -> bool:
        """Train to the end; whether it was interrupted instead."""
        state = self.state
        while state.epoch < self.config.epochs and not state.stopping.should_stop:
            seconds = self.train_epoch(stop)
            if seconds is None:
                self.save()
                return True
            self.finish_epoch(seconds)
        return False

    def train_epoch(self, stop: StopRequest) -> float | None:
        """Images a second of the epoch's steps; None if a stop was asked for before its end."""
        state, history = self.state, self.state.history
        state.model.train()
        self.batches.set_epoch(state.epoch, first_batch=history.count)
        first = shown = history.count
        start = time.perf_counter()
        for images, labels in self.batches:
            set_lr(state.optimizer, self.lr)
            history.record(*self.step(images, labels))
            self.progress.advance()
            if self.progress.due or history.count == self.steps:
                rate = (history.count - first) * self.config.batch_size / (time.perf_counter() - start)
                self.report(shown, rate)
                shown = history.count
            if history.count < self.steps and self.agree_to_stop(stop):
                return None
        return (self.steps - first) * self.config.batch_size / (time.perf_counter() - start)

    @property
    def lr(self) -> float:
        state = self.state
        step = state.epoch * self.steps + min(state.history.count, self.steps - 1)
        return learning_rate(self.config, step, self.steps)

    def agree_to_stop(self, stop: StopRequest) -> bool:
        """Whether to stop after this step; several processes must do so after the same one."""
        if self.ranks.world_size == 1:
            return stop.requested
        return self.state.history.count % AGREE_EVERY == 0 and self.ranks.any(stop.requested)

    def report(self, start: int, images_per_second: float) -> None:
        """Read the meters of the steps from ``start`` on, this process's; the only read-back between two epochs."""
        state, history = self.state, self.state.history
        rows = history.read(start)
        for index, (loss, _) in enumerate(rows, start):
            if not math.isfinite(loss):
                raise self.not_finite(f"the loss is {loss} at step {index + 1} of epoch {state.epoch + 1}")
        where = f"epoch {state.epoch + 1}/{self.config.epochs}"
        self.progress.show(where, *history.mean(), images_per_second)
        for callback in self.callbacks:
            callback.on_steps(state.epoch * self.steps + start, rows, self.lr, images_per_second)

    def finish_epoch(self, images_per_second: float) -> None:
        """Validate, note the figures, and write the checkpoints."""
        config, state = self.config, self.state
        values = self.ranks.sum(state.history.values.double().mean(0)) / self.ranks.world_size
        loss, correct = values.tolist()
        val = None if self.val_set is None else self.evaluate(self.val_set)
        lr = self.lr
        if val is not None and not math.isfinite(val.loss):
            raise self.not_finite(f"the validation loss is {val.loss} after epoch {state.epoch + 1}")
        better = val is not None and state.stopping.update(state.epoch, val.accuracy)
        state.epoch, state.history.count = state.epoch + 1, 0
        figures = EpochFigures(
            state.epoch,
            loss,
            correct / self.local_batch,
            val.loss if val else None,
            val.accuracy if val else None,
            lr,
            images_per_second,
            time.perf_counter() - self.start,
        )
        state.figures.append(figures)
        last = state.epoch == config.epochs or state.stopping.should_stop
        if last or state.epoch % self.checkpoint_every == 0:
            self.save()
        if better if config.select == "best" else last:
            self.save_selected(figures)
        self.progress.line(_epoch_line(figures, config.epochs))
        for callback in self.callbacks:
            callback.on_epoch(figures, state)

    def evaluate(self, dataset: Any) -> Evaluation:
        config = self.config
        return evaluate(self.state.eval_model, dataset, self.normalize, dtype=config.torch_dtype, ranks=self.ranks)

    def save(self) -> None:
        """Write ``last.pt``, unless that would lose the last good one."""
        state = self.state
        state.seconds = time.perf_counter() - self.start
        if not state.is_finite():
            raise self.not_finite(f"a weight is not finite in epoch {state.epoch + 1}")
        values = state.to_dict(self.ranks, self.images)
        if self.ranks.first:
            save_checkpoint(self.out_dir / "last.pt", values | self.normalization())

    def save_selected(self, figures: EpochFigures) -> None:
        """Write ``best.pt``: configuration and weights, no more."""
        if self.ranks.first:
            save_checkpoint(
                self.out_dir / "best.pt",
                {
                    "config": self.config.to_dict(),
                    "model": self.state.eval_model.state_dict(),
                    "figures": dataclasses.asdict(figures),
                    **self.normalization(),
                },
            )

    def normalization(self) -> dict[str, Any]:
        return {"normalize": {"scale": self.normalize.scale, "offset": self.normalize.offset}}

    def not_finite(self, what: str) -> NonFiniteError:
        last = self.out_dir / "last.pt"
        kept = f"; {last} holds the last good state" if last.exists() else ""
        return NonFiniteError(
            f"{what}: train anew with a lower --lr (it is {self.lr:.3g}) or with --dtype float32 (it is "
            f"{self.config.dtype}){kept}"
        )

    def test(self, test_set: Any) -> Evaluation:
        """Figures of the selected weights on the test set."""
        if self.ranks.world_size > 1:
            torch.distributed.barrier()  # the first process may still be writing best.pt
        selected = load_checkpoint(self.out_dir / "best.pt", self.ranks.device)
        self.state.eval_model.load_state_dict(selected["model"])
        return self.evaluate(test_set)

    def result(self, test: Evaluation | None, interrupted: bool) -> Result:
        config, state = self.config, self.state
        best = state.stopping.best_epoch + 1 or None
        selected = best if config.select == "best" else len(state.figures) or None
        early = state.stopping.should_stop and state.epoch < config.epochs
        seconds = state.figures[-1].seconds if state.figures else state.seconds
        return Result(config, state.figures, best, selected, test, seconds, early, interrupted)


def _check(train_set: Any, val_set: Any | None, config: Config, ranks: Ranks) -> None:
    if len(train_set) < config.batch_size:
        raise ValueError(
            f"fit: the training set must hold at least one batch, got {len(train_set)} images and batch_size "
            f"{config.batch_size}; lower batch_size"
        )
    if config.batch_size % ranks.world_size:
        raise ValueError(
            f"fit: batch_size must be a multiple of the number of processes, got {config.batch_size} and {ranks.world_size}"
        )
    if val_set is None and (config.select == "best" or config.patience):
        raise ValueError(
            "fit: without val_set there is nothing to select by or to stop early by: set select='last' and patience=0, or "
            "give validation images"
        )
    if config.dtype == "float16" and ranks.device.type != "cuda":
        raise ValueError(f"fit: dtype float16 needs CUDA, got device {ranks.device}; choose bfloat16 or float32")


def _epoch_line(figures: EpochFigures, epochs: int) -> str:
    val = (
        ""
        if figures.val_loss is None
        else f", validation loss {figures.val_loss:.3f}, accuracy {figures.val_accuracy:.4f}"
    )
    return (
        f"epoch {figures.epoch}/{epochs}: training loss {figures.train_loss:.3f}, accuracy {figures.train_accuracy:.4f}"
        f"{val}; lr {figures.lr:.2e}, {figures.images_per_second:.0f} images/s, {duration(figures.seconds)}"
    )
