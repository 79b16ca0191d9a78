"""The training loop: :func:`fit`, and the :class:`Run` behind it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .._errors import one_line
from .._lock import FolderLock
from .._lower_weights import LowerWeights
from .._optimizers import GivenOptimizer, given_optimizer, set_lr
from ..data import Images, Normalize
from ..data.sources import Source, count_images, require_source
from .checkpoint import TRAINING, load_weights, misfit_explained, read_entries
from .config import Config
from .evaluation import EpochFigures, Evaluation, Result, evaluate, frozen, train_all_but
from .recipe import learning_rate, require_trainable, train_batches
from .report import VALIDATION, WARNING, Progress, epoch_line
from .state import LAST, Callback, RunFiles, TrainingState, resolve_dtype, run_normalize, slow_dtype
from .step import CapturedStep, CompiledModel, Step, TrainStep, choose_step
from .system import (
    CheckpointError,
    NonFiniteError,
    Ranks,
    StopRequest,
    choose_device,
    out_of_memory_explained,
    require_memory,
    run_folder,
)


def fit(
    model: nn.Module,
    train_set: Source,
    val_set: Source | None,
    config: Config,
    out_dir: str | Path,
    *,
    test_set: Source | None = None,
    ranks: Ranks | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    step: str = "auto",
    make_step: Callable[[TrainStep], Step] | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    normalize: Normalize | None = None,
    workers: int = 0,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    scheduler_interval: str = "epoch",
    checkpoint_every: int = 1,
    quiet: bool = False,
) -> Result:
    """Train ``model`` and leave ``last.pt`` (to resume) and ``model.pt`` (the selected weights) in ``out_dir``.

    Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint of exactly that step. One run at a time
    writes to ``out_dir``.

    Args:
        model: classifier of images, trained in place, on the device of ``ranks``. At the end it holds the selected
            weights, in evaluation mode. Modules that come in evaluation mode inside a model in training mode are
            frozen, and stay in evaluation mode: batch normalisations keep their running statistics. For the dense
            layer's penalty (``config.weight_decay_scope``) it needs a method ``l2_penalty()``, as the networks of
            :mod:`ran_ext.models` have.
        train_set: :class:`ran_ext.data.Images` (CIFAR-10 and the like), any ``Dataset`` of ``(image, label)``, or a
            ``DataLoader`` of such batches, with a length. uint8 images are augmented and normalised on the device;
            floating ones are taken as they are (``config.augment`` "none").
        val_set: likewise; validates each epoch. Without it nothing is selected or stopped early (``config.select``
            "last", ``patience`` 0).
        config: the recipe; what says how to make the model and the data sets (``model``, ``model_options``,
            ``dropout``, ``protocol``, ``val_images``) is recorded, not acted upon.
        out_dir: made if it is missing.
        test_set: likewise; read once, at the end.
        ranks: device and place among the processes, of :func:`process_group`; by default this process alone, on CUDA
            where there is one.
        resume: continue from ``last.pt`` where there is one; on the CPU bit for bit, but for a ``DataLoader``, which
            shuffles by itself. ``config.dtype`` "auto" is then the checkpoint's.
        callbacks: told of the steps, the epochs and the end, in the first process.
        step: ``eager``; ``graph``, one CUDA graph from augmentation to optimizer (:class:`CapturedStep`); ``compile``,
            the network through ``torch.compile``; or ``auto``: ``graph`` on one GPU, else ``eager``. Where the one
            asked for cannot run, the step runs eagerly, and a line says why. Each kind resumes the others' checkpoints.
        make_step: replaces the training step, given the plain one; with ``step="graph"`` it is captured too.
        augment: replaces what ``config.augment`` and ``config.cutout`` name: an :class:`~ran_ext.data.Augment` with the
            normalisation of :func:`build_normalize`, or a function of uint8 images ``(N, C, H, W)`` that returns such
            images, as torchvision's transforms v2 do; they are normalised after it.
        normalize: replaces that by ``config.normalize``, of all images in memory or 1,000 of others.
        workers: processes that read data sets that are not in memory.
        optimizer: any of ``torch.optim``, over ``model``'s parameters: replaces the optimizer, schedule and decay that
            ``config`` names. The step is then eager or compiled. To resume, give a new one of the same kind.
        scheduler: any of ``torch.optim.lr_scheduler``, over ``optimizer``; without one its rates are constant.
            ``ReduceLROnPlateau`` is told the validation loss, or with ``mode="max"`` the accuracy.
        scheduler_interval: whether the scheduler moves on after each ``epoch`` or each ``step``.
        checkpoint_every: epochs between two checkpoints; the last epoch and an interruption always write one.
        quiet: show no progress on standard error, and tell the logger ``ran_ext`` nothing.

    Raises:
        TrainingError: NaN, out of memory, full disk, another run in ``out_dir``, unreadable or foreign checkpoint, in
            one sentence that says what to do. The last good checkpoint is intact.
        TypeError: a data set gives no images and labels, or ``augment`` returns no uint8 images.
        ValueError: the arguments do not fit together, or a setting would have no effect.
    """
    ranks = ranks or Ranks(0, 1, choose_device("auto"))
    train_set = require_source("fit", "train_set", train_set)
    val_set = None if val_set is None else require_source("fit", "val_set", val_set)
    test_set = None if test_set is None else require_source("fit", "test_set", test_set)
    require_trainable(model, train_set, val_set, config, ranks)
    asked_dtype = config.dtype
    config = resolve_dtype(config, ranks, Path(out_dir) / LAST if resume else None)
    if augment and config.cutout:
        raise ValueError(f"fit: augment takes the place of config.cutout, which must be 0, got {config.cutout}")
    normalize = normalize or run_normalize(train_set, config, Path(out_dir) / LAST if resume else None, workers)
    given = given_optimizer(optimizer, scheduler, scheduler_interval, model, val_set is not None)
    if not resume:  # of a run that goes on, the settings are what they were
        config.require_effect(given is not None)
    if checkpoint_every < 1:
        raise ValueError(f"fit: checkpoint_every must be at least 1, got {checkpoint_every}")
    parameters = sum(p.numel() for p in model.parameters())
    copies = 3 + (not given and config.optimizer != "nesterov") + (config.ema > 0)
    require_memory(parameters, copies, ranks.device)
    with (
        StopRequest() as stop,
        out_of_memory_explained(ranks.device, config.batch_size),
        run_folder(Path(out_dir), ranks) as lock,
    ):
        run = Run(
            model,
            train_set,
            val_set,
            config,
            Path(out_dir),
            ranks,
            lock,
            callbacks=callbacks,
            augment=augment,
            normalize=normalize,
            workers=workers,
            given=given,
            checkpoint_every=checkpoint_every,
            asked_dtype=asked_dtype,
        )
        if resume:
            run.resume()
        run.prepare("eager" if make_step and step == "auto" else step, make_step, quiet)
        try:
            interrupted = run.train(stop)
        finally:
            run.progress.close()
        if not interrupted:
            run.select()
        test = None if interrupted or test_set is None else run.evaluate(test_set)
        result = run.state.result(test, interrupted, run.kind)
        run.tell(lambda callback: callback.on_end(result))
    return result


class Run:
    """One call of :func:`ran_ext.train.fit`; its arguments are explained there."""

    step: Callable[..., tuple[Tensor, Tensor]]  # called with what a batch is made of, as the batches' plan gives it
    kind: str  # of the step: eager, graph or compile
    progress: Progress

    def __init__(
        self,
        model: nn.Module,
        train_set: Source,
        val_set: Source | None,
        config: Config,
        out_dir: Path,
        ranks: Ranks,
        lock: FolderLock,
        *,
        callbacks: Sequence[Callback] = (),
        augment: Callable[[Tensor], Tensor] | None = None,
        normalize: Normalize | None = None,
        workers: int = 0,
        given: GivenOptimizer | None = None,
        checkpoint_every: int = 1,
        asked_dtype: str | None = None,
    ):
        self.config, self.ranks, self.val_set, self.checkpoint_every = config, ranks, val_set, checkpoint_every
        self.callbacks = list(callbacks) if ranks.first else []
        self.images, self.workers = count_images(train_set, config.batch_size), workers
        self.normalize = normalize
        self.files = RunFiles(out_dir, lock, self.normalize, train_set)
        self.batches = train_batches(train_set, config, ranks, self.normalize, augment, workers)
        self.steps = len(self.batches)
        self.state = TrainingState.begin(model, config, ranks, self.steps, asked_dtype or config.dtype, given)
        self.frozen = frozen(self.state.model)

    def resume(self) -> None:
        """Continue from ``last.pt`` where there is one."""
        path = self.files.last
        if os.path.lexists(path):
            state = read_entries(path, TRAINING, self.ranks.device)
            with misfit_explained(path):
                self.state.load_dict(state, self.ranks, self.images)
            if self.ranks.first and self.state.just_selected:
                try:
                    self._read_selected()
                except CheckpointError:  # the run died before it wrote them
                    self.files.write_selected(self.state)

    def prepare(self, kind: str, make_step: Callable[[TrainStep], Step] | None, quiet: bool) -> None:
        """Build the step; start the clock and the progress bar."""
        state = self.state
        done = state.epoch * self.steps + state.history.count
        images = 0 if self.val_set is None else count_images(self.val_set, self.config.batch_size)
        self.progress = Progress(
            self.config.epochs * self.steps,
            done,
            enabled=self.ranks.first and not quiet,
            overhead=VALIDATION * images / (self.steps * self.config.batch_size),
            may_stop=self.config.patience > 0,
        )
        if slow := slow_dtype(self.config.dtype, self.ranks.device):
            self.progress.log(slow, WARNING)
        self.step = self._new_step(kind, make_step)
        self.start = time.perf_counter() - state.seconds
        self.tell(lambda callback: callback.on_start(state, done))

    def _new_step(self, kind: str, make_step: Callable[[TrainStep], Step] | None) -> Step:
        config, state = self.config, self.state
        self.kind, reason = choose_step(kind, self.ranks, state.given is not None)
        if reason:
            self.fall_back(reason)
        model = self.ranks.wrap(state.model)
        wrapped: Callable[..., Any] = CompiledModel(model, self.fall_back) if self.kind == "compile" else model
        lower = config.torch_dtype != torch.float32 and config.accumulate == 1
        if self.kind == "graph" and lower and LowerWeights.serves(state.model):
            wrapped = LowerWeights(state.model, config.torch_dtype)
        self.plain = state.train_step(wrapped)
        step, batches = make_step(self.plain) if make_step else self.plain, self.batches
        share = config.batch_size // self.ranks.world_size

        def whole(*parts: Tensor) -> tuple[Tensor, Tensor]:
            images, labels = batches.load(*parts)
            loss, right = step(images, labels)
            return loss, right if len(labels) == share else right * (share / len(labels))  # a loader's last batch

        return CapturedStep(whole, on_fallback=self.fall_back) if self.kind == "graph" else whole

    def fall_back(self, reason: str) -> None:
        """Note that the step runs eagerly, and say why."""
        self.kind = "eager"
        self.progress.log(f"the training step runs eagerly: {reason}", WARNING)

    def train(self, stop: StopRequest) -> bool:
        """Train to the end or until a stop is requested; whether it was. Either way a checkpoint is written."""
        self.progress.begin()
        while not self.state.finished:
            images_per_second = self.train_epoch(stop)
            if images_per_second is not None:
                self.finish_epoch(images_per_second)
            if not self.state.finished and stop.agreed(self.ranks, self.state.history.count):
                self.save()
                return True
        return False

    def train_epoch(self, stop: StopRequest) -> float | None:
        """Images a second of the epoch's steps; None if it was left before its last step."""
        state, history = self.state, self.state.history
        train_all_but(self.frozen, state.model)
        self.batches.set_epoch(state.epoch, first_batch=history.count)
        first = shown = history.count
        start = time.perf_counter()
        images_per_second = 0.0
        for parts in self.batches.plan():
            self.plain.highest_label = self.batches.highest_label
            if state.given is None:
                set_lr(state.optimizer, self.lr(history.count))
            history.record(*self.step(*parts))
            if history.count == self.steps:
                self.last_lr = self.lr(history.count - 1)
            if state.given:
                state.given.after_step()
            self.progress.advance()
            if self.progress.due or history.count == self.steps:
                rows = history.read(shown)  # waits for the device, so the clock is read after it
                images_per_second = (history.count - first) * self.config.batch_size / (time.perf_counter() - start)
                self.report(shown, rows, images_per_second)
                shown = history.count
            if history.count < self.steps and stop.agreed(self.ranks, self.state.history.count):
                return None
        return images_per_second

    def lr(self, step: int) -> float:
        """The learning rate of step ``step`` of the current epoch; an optimizer of the user's has that of now alone."""
        if self.state.given:
            return self.state.given.lr()
        return learning_rate(self.config, self.state.epoch * self.steps + step, self.steps)

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
        """Call each callback; one that raises ``OSError`` is dropped, and the training goes on."""
        for callback in tuple(self.callbacks):
            try:
                event(callback)
            except OSError as error:
                self.callbacks.remove(callback)
                text = f"{type(callback).__name__} stopped, the training goes on: {one_line(error)}"
                self.progress.log(text, WARNING)

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
            self.last_lr,
            images_per_second,
            time.perf_counter() - self.start,
        )
        if val is not None:
            state.stopping.update(state.epoch, val.accuracy)
        if state.given:
            state.given.after_epoch(figures.val_loss, figures.val_accuracy)
        state.figures.append(figures)
        state.epoch, state.history.count = state.epoch + 1, 0
        if state.just_selected or state.finished or state.epoch % self.checkpoint_every == 0:
            self.save()
        if state.just_selected and self.ranks.first:
            self.files.write_selected(state)  # after last.pt: no run ever has the weights of epochs that it lost
        self.progress.overhead = 0.0  # from here on it is in the time measured
        self.progress.log(epoch_line(figures, config.epochs))
        self.tell(lambda callback: callback.on_epoch(figures, state))

    def evaluate(self, dataset: Source) -> Evaluation:
        config, workers = self.config, self.workers
        dtype, mirror = config.torch_dtype, config.test_mirror
        size = 512 if isinstance(dataset, Images) else config.batch_size  # of others, an image may be of any size
        model, normalize, ranks = self.state.eval_model, self.normalize, self.ranks
        return evaluate(
            model, dataset, normalize, batch_size=size, dtype=dtype, mirror=mirror, ranks=ranks, workers=workers
        )

    def save(self) -> None:
        """Write ``last.pt``; where a weight is not finite, raise and keep the last good one."""
        state = self.state
        state.seconds = time.perf_counter() - self.start
        if not state.is_finite():
            raise self.not_finite(f"a weight is no longer finite in epoch {state.epoch + 1}")
        values = state.to_dict(self.ranks, self.images)
        if self.ranks.first:
            self.files.write_last(values)

    def not_finite(self, what: str) -> NonFiniteError:
        last = self.files.last
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
        with misfit_explained(self.files.selected):
            load_weights("model", self.state.model, selected["model"])
        self.state.ema = None
        self.state.model.eval()

    def _read_selected(self) -> dict[str, Any]:
        """What ``model.pt`` holds, if it is of the epoch that this run has selected."""
        state = self.state
        own = state.figures[state.selected_epoch - 1] if self.ranks.first else None  # the others measured other times
        return self.files.read_selected(self.ranks.device, own)
