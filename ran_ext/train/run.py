"""One run of training: what :func:`ran_ext.train.fit` does, piece by piece."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import one_line
from .._lock import FolderInUseError, FolderLock
from ..data import CIFAR10
from .batches import build_normalize, train_batches
from .callbacks import Callback
from .capture import CapturedStep
from .checkpoint import misfit_explained, read_entries, save_checkpoint
from .config import Config
from .distributed import Ranks
from .dtype import slow_dtype
from .early_stopping import EarlyStopping
from .ema import ExponentialMovingAverage
from .errors import CheckpointError, NonFiniteError
from .evaluation import Evaluation, evaluate
from .modes import frozen, train_all_but
from .optimizers import build_optimizer, set_lr
from .progress import VALIDATION, Progress, duration
from .results import EpochFigures, Result
from .schedule import learning_rate
from .schema import TRAINING, Misfit, load_weights
from .signals import StopRequest
from .state import TrainingState
from .step import Step, StepHistory, TrainStep
from .step_kinds import CompiledModel, choose_step

#: Steps between two agreements of several processes on whether one of them was asked to stop.
AGREE_EVERY = 16
#: The whole state, to resume from; and the selected weights.
LAST, SELECTED = "last.pt", "model.pt"


class Run:
    """One call of :func:`ran_ext.train.fit`; its arguments are explained there."""

    #: Of what the batches are made of: indices and draws.
    step: Step
    #: Of the step: ``eager``, ``graph`` or ``compile``.
    kind: str
    progress: Progress

    def __init__(
        self,
        model: nn.Module,
        train_set: CIFAR10,
        val_set: CIFAR10 | None,
        config: Config,
        out_dir: Path,
        ranks: Ranks,
        lock: FolderLock,
        *,
        callbacks: Sequence[Callback],
        augment: Callable[[Tensor], Tensor] | None,
        checkpoint_every: int,
        asked_dtype: str,
    ):
        self.config, self.ranks, self.val_set = config, ranks, val_set
        self.out_dir, self.lock, self.checkpoint_every = out_dir, lock, checkpoint_every
        self.callbacks = list(callbacks) if ranks.first else []
        self.images, self.highest_label = len(train_set), int(train_set.labels.max())
        self.normalize = build_normalize(train_set, config)
        self.batches = train_batches(train_set, config, ranks, self.normalize, augment)
        self.steps = len(self.batches)
        self.local_batch = config.batch_size // ranks.world_size
        self.state = self._new_state(model, asked_dtype)
        self.frozen = frozen(self.state.model)

    def _new_state(self, model: nn.Module, asked_dtype: str) -> TrainingState:
        config, device = self.config, self.ranks.device
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model = self.ranks.convert(model.to(device=device, memory_format=layout))  # type: ignore[call-overload]
        torch.manual_seed(config.seed + self.ranks.rank)  # dropout differs from process to process
        return TrainingState(
            config,
            model,
            build_optimizer(model, config, device),
            torch.amp.GradScaler(device.type) if config.dtype == "float16" else None,
            ExponentialMovingAverage(model, config.ema) if config.ema else None,
            EarlyStopping(config.patience),
            StepHistory(self.steps, self.local_batch, device),
            asked_dtype,
        )

    def resume(self) -> None:
        """Continue from ``last.pt`` where there is one."""
        path = self.out_dir / LAST
        if os.path.lexists(path):
            state = read_entries(path, TRAINING, self.ranks.device)
            with misfit_explained(path):
                self.state.load_dict(state, self.ranks, self.images)
            if self.ranks.first and self._just_selected:
                try:
                    self._read_selected()
                except CheckpointError:  # the run died before it wrote them
                    self.save_selected(self.state.figures[-1])

    def prepare(self, kind: str, make_step: Callable[[TrainStep], Step] | None, quiet: bool) -> None:
        """Build the step; set the clock and the bar going."""
        state = self.state
        done = state.epoch * self.steps + state.history.count
        self.progress = Progress(
            self.config.epochs * self.steps,
            done,
            enabled=self.ranks.first and not quiet,
            overhead=VALIDATION * len(self.val_set or ()) / (self.steps * self.config.batch_size),
            may_stop=self.config.patience > 0,
        )
        if self.progress.enabled and (slow := slow_dtype(self.config.dtype, self.ranks.device)):
            self.progress.line(slow)
        self.step = self._new_step(kind, make_step)
        self.start = time.perf_counter() - state.seconds
        self.tell(lambda callback: callback.on_start(state, done))

    def _new_step(self, kind: str, make_step: Callable[[TrainStep], Step] | None) -> Step:
        config, state = self.config, self.state
        self.kind, reason = choose_step(kind, self.ranks)
        if reason:
            self.fall_back(reason)
        model = self.ranks.wrap(state.model)
        penalise = config.weight_decay > 0 and config.weight_decay_scope == "dense"
        plain = TrainStep(
            CompiledModel(model, self.fall_back) if self.kind == "compile" else model,
            state.optimizer,
            l2=config.weight_decay,
            penalty=state.model.l2_penalty if penalise else None,  # type: ignore[arg-type]
            label_smoothing=config.label_smoothing,
            mix=config.mixup,
            dtype=config.torch_dtype,
            scaler=state.scaler,
            ema=(state.ema, state.model) if state.ema else None,
            highest_label=self.highest_label,
        )
        step, batches = make_step(plain) if make_step else plain, self.batches

        def whole(indices: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
            return step(*batches.load(indices, draws))

        return CapturedStep(whole, on_fallback=self.fall_back) if self.kind == "graph" else whole

    def fall_back(self, reason: str) -> None:
        """Note that the step runs eagerly, and say why."""
        self.kind = "eager"
        self.progress.line(f"the training step runs eagerly: {reason}")

    def train(self, stop: StopRequest) -> bool:
        """Train to the end, or to a request to stop; whether it was the latter. A checkpoint is there either way."""
        self.progress.begin()
        while not self.finished:
            images_per_second = self.train_epoch(stop)
            if images_per_second is not None:
                self.finish_epoch(images_per_second)
            if not self.finished and self.agree_to_stop(stop):
                self.save()
                return True
        return False

    @property
    def finished(self) -> bool:
        return self.state.epoch >= self.config.epochs or self.state.stopping.should_stop

    def train_epoch(self, stop: StopRequest) -> float | None:
        """Images a second of the epoch's steps; None if it was left before its last step."""
        state, history = self.state, self.state.history
        train_all_but(self.frozen, state.model)
        self.batches.set_epoch(state.epoch, first_batch=history.count)
        first = shown = history.count
        start = time.perf_counter()
        images_per_second = 0.0
        for indices, draws in self.batches.plan():
            set_lr(state.optimizer, self.lr(history.count))
            history.record(*self.step(indices, draws))
            self.progress.advance()
            if self.progress.due or history.count == self.steps:
                rows = history.read(shown)  # waits for the device, so the clock is read after it
                images_per_second = (history.count - first) * self.config.batch_size / (time.perf_counter() - start)
                self.report(shown, rows, images_per_second)
                shown = history.count
            if history.count < self.steps and self.agree_to_stop(stop):
                return None
        return images_per_second

    def lr(self, step: int) -> float:
        """The learning rate of step ``step`` of the current epoch."""
        return learning_rate(self.config, self.state.epoch * self.steps + step, self.steps)

    def agree_to_stop(self, stop: StopRequest) -> bool:
        """Whether to stop after this step; several processes must do so after the same one."""
        if self.ranks.world_size == 1:
            return stop.requested
        return self.state.history.count % AGREE_EVERY == 0 and self.ranks.any(stop.requested)

    def report(self, first: int, rows: list[tuple[float, float]], images_per_second: float) -> None:
        """Pass on what the steps from ``first`` on of this epoch returned, in this process."""
        state = self.state
        for step, (loss, _) in enumerate(rows, first + 1):
            if not math.isfinite(loss):
                raise self.not_finite(f"the loss is {loss} at step {step} of epoch {state.epoch + 1}")
        self.progress.show(
            f"epoch {state.epoch + 1}/{self.config.epochs}", *state.history.mean(), images_per_second=images_per_second
        )
        start = state.epoch * self.steps + first
        self.tell(lambda callback: callback.on_steps(start, rows, images_per_second))

    def tell(self, event: Callable[[Callback], None]) -> None:
        """Pass an event on; whoever cannot write its files is told no more, and the training goes on."""
        for callback in tuple(self.callbacks):
            try:
                event(callback)
            except OSError as error:
                self.callbacks.remove(callback)
                self.progress.line(f"{type(callback).__name__} stopped, the training goes on: {one_line(error)}")

    def finish_epoch(self, images_per_second: float) -> None:
        """Validate, note the figures, and write the checkpoints."""
        config, state = self.config, self.state
        loss, correct = self.ranks.sum(state.history.values.cpu().double().mean(0)).tolist()
        val = None if self.val_set is None else self.evaluate(self.val_set)
        if val is not None and not math.isfinite(val.loss):
            raise self.not_finite(f"the validation loss is {val.loss} after epoch {state.epoch + 1}")
        figures = EpochFigures(
            state.epoch + 1,
            loss / self.ranks.world_size,
            correct / config.batch_size,
            val.loss if val else None,
            val.accuracy if val else None,
            self.lr(self.steps - 1),
            images_per_second,
            time.perf_counter() - self.start,
        )
        if val is not None:
            state.stopping.update(state.epoch, val.accuracy)
        state.figures.append(figures)
        state.epoch, state.history.count = state.epoch + 1, 0
        if self._just_selected or self.finished or state.epoch % self.checkpoint_every == 0:
            self.save()
        if self._just_selected:
            self.save_selected(figures)  # after last.pt, so that no run ever has the weights of epochs that it lost
        self.progress.overhead = 0.0  # from here on it is in the time measured
        self.progress.line(_epoch_line(figures, config.epochs))
        self.tell(lambda callback: callback.on_epoch(figures, state))

    @property
    def _just_selected(self) -> bool:
        """Whether the selected weights are those of the epoch that has just ended."""
        state = self.state
        chosen = state.stopping.best_epoch == state.epoch - 1 if self.config.select == "best" else self.finished
        return state.epoch > 0 and state.history.count == 0 and chosen

    def evaluate(self, dataset: CIFAR10) -> Evaluation:
        model, dtype, mirror = self.state.eval_model, self.config.torch_dtype, self.config.test_mirror
        return evaluate(model, dataset, self.normalize, dtype=dtype, mirror=mirror, ranks=self.ranks)

    def save(self) -> None:
        """Write ``last.pt``, unless that would lose the last good one to a bad one."""
        state = self.state
        state.seconds = time.perf_counter() - self.start
        if not state.is_finite():
            raise self.not_finite(f"a weight is no longer finite in epoch {state.epoch + 1}")
        values = state.to_dict(self.ranks, self.images)
        if self.ranks.first:
            self._write(LAST, values | self._normalization())

    def save_selected(self, figures: EpochFigures) -> None:
        """Write ``model.pt``: configuration, weights, normalisation."""
        if self.ranks.first:
            recipe = {"config": self.config.to_dict(), "asked": {"dtype": self.state.asked_dtype}}
            values = recipe | {"model": self.state.eval_model.state_dict(), "figures": dataclasses.asdict(figures)}
            self._write(SELECTED, values | self._normalization())

    def _write(self, name: str, values: dict[str, Any]) -> None:
        try:
            self.lock.require()
        except FolderInUseError as error:
            raise CheckpointError(f"cannot write {self.out_dir / name}: {error}") from error
        save_checkpoint(self.out_dir / name, values)

    def _normalization(self) -> dict[str, Any]:
        return {"normalize": {"scale": self.normalize.scale, "offset": self.normalize.offset}}

    def not_finite(self, what: str) -> NonFiniteError:
        last = self.out_dir / LAST
        kept = f"; {last} holds the last good state" if last.exists() else ""
        lr, dtype = self.lr(min(self.state.history.count, self.steps - 1)), self.config.dtype
        return NonFiniteError(
            f"{what}: train anew with a lower --lr (it is {lr:.3g}) or with --dtype float32 (it is {dtype}){kept}"
        )

    def select(self) -> None:
        """Put the selected weights into the model."""
        if self.ranks.world_size > 1:
            torch.distributed.barrier()  # the first process may still be writing them
        selected = self._read_selected()
        with misfit_explained(self.out_dir / SELECTED):
            load_weights("model", self.state.model, selected["model"])
        self.state.ema = None
        self.state.model.eval()

    def _read_selected(self) -> dict[str, Any]:
        """What ``model.pt`` holds, if it is of the epoch that this run has selected."""
        path = self.out_dir / SELECTED
        selected = read_entries(path, ("model",), self.ranks.device)
        own = dataclasses.asdict(self.state.figures[self.selected_epoch - 1])
        with misfit_explained(path):
            if self.ranks.first and selected.get("figures") != own:  # the others have measured other times
                raise Misfit(f"it is not of epoch {self.selected_epoch} of this run")
        return selected

    @property
    def selected_epoch(self) -> int:
        """Whose weights ``model.pt`` holds, from 1; 0 for none."""
        return self.state.stopping.best_epoch + 1 if self.config.select == "best" else self.state.epoch

    def result(self, test: Evaluation | None, interrupted: bool) -> Result:
        """What the run hands back."""
        config, state = self.config, self.state
        best, selected = state.stopping.best_epoch + 1 or None, self.selected_epoch or None
        early = state.stopping.should_stop and state.epoch < config.epochs
        return Result(config, state.figures, best, selected, test, state.seconds, early, interrupted, self.kind)


def _epoch_line(figures: EpochFigures, epochs: int) -> str:
    val = ""
    if figures.val_loss is not None:
        val = f", validation loss {figures.val_loss:.3f}, accuracy {figures.val_accuracy:.4f}"
    return (
        f"epoch {figures.epoch}/{epochs}: training loss {figures.train_loss:.3f}, accuracy {figures.train_accuracy:.4f}"
        f"{val}; lr {figures.lr:.2e}, {figures.images_per_second:.0f} images/s, {duration(figures.seconds)}"
    )
