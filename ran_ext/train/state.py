"""All that a run must remember to continue bit for bit, its files, and what it tells to callbacks."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._hardware import multiplies_bfloat16
from .._lock import FolderInUseError, FolderLock
from .._muon import Muon
from .._optimizers import GivenOptimizer, load_optimizer
from ..data import Images, Normalize
from ..data.sources import Source, class_names, image_shape
from .checkpoint import (
    Misfit,
    describe,
    kept_normalize,
    load_config,
    load_weights,
    misfit_explained,
    read_entries,
    save_checkpoint,
)
from .config import Config
from .evaluation import EarlyStopping, EpochFigures, Evaluation, Result
from .recipe import ExponentialMovingAverage, build_normalize, build_optimizer
from .step import StepHistory, TrainStep
from .system import CheckpointError, Ranks

#: The whole state, to resume from; and the selected weights.
LAST, SELECTED = "last.pt", "model.pt"


@dataclasses.dataclass
class TrainingState:
    """Model, optimizer, scaler, average and counters; everything else follows from the configuration.

    Attributes:
        model: the plain network, not the distributed wrapper.
        epoch: the one being trained, from 0.
        history: of that epoch's steps so far.
        seconds: wall time before this process took over.
        asked_dtype: what the run was begun with; ``config.dtype`` is what that stood for.
        given: the user's own optimizer and scheduler; None where ``config`` names them.
    """

    config: Config
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    ema: ExponentialMovingAverage | None
    stopping: EarlyStopping
    history: StepHistory
    asked_dtype: str
    given: GivenOptimizer | None = None
    epoch: int = 0
    seconds: float = 0.0
    figures: list[EpochFigures] = dataclasses.field(default_factory=list)

    @classmethod
    def begin(
        cls, model: nn.Module, config: Config, ranks: Ranks, steps: int, asked_dtype: str, given: GivenOptimizer | None
    ) -> TrainingState:
        """The state of a run of ``steps`` steps an epoch before its first; ``model`` is moved to the device."""
        device = ranks.device
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model = ranks.convert(model.to(device=device, memory_format=layout))  # type: ignore[call-overload]
        torch.manual_seed(config.seed + ranks.rank)  # dropout differs from process to process
        return cls(
            config,
            model,
            given.optimizer if given else build_optimizer(model, config, device),
            torch.amp.GradScaler(device.type) if config.dtype == "float16" else None,
            ExponentialMovingAverage(model, config.ema) if config.ema else None,
            EarlyStopping(config.patience),
            StepHistory(steps, config.batch_size // ranks.world_size, device),
            asked_dtype,
            given,
        )

    def train_step(self, model: Callable[[Tensor], Tensor]) -> TrainStep:
        """One of this run; ``model`` is the network as it is called, wrapped or compiled."""
        config = self.config
        penalise = config.weight_decay > 0 and config.weight_decay_scope == "dense"
        return TrainStep(
            model,
            self.optimizer,
            l2=config.weight_decay,
            penalty=self.model.l2_penalty if penalise else None,  # type: ignore[arg-type]
            label_smoothing=config.label_smoothing,
            mix=config.mixup,
            dtype=config.torch_dtype,
            scaler=self.scaler,
            ema=(self.ema, self.model) if self.ema else None,
            accumulate=config.accumulate,
        )

    @property
    def eval_model(self) -> nn.Module:
        """The weights that are validated and kept."""
        return self.model if self.ema is None else self.ema.average

    @property
    def asked(self) -> dict[str, str]:
        """What the run was begun with and its configuration does not say."""
        return {"dtype": self.asked_dtype} | ({"optimizer": self.given.name} if self.given else {})

    @property
    def finished(self) -> bool:
        """Whether the last epoch is over, or the accuracy has stopped growing."""
        return self.epoch >= self.config.epochs or self.stopping.should_stop

    @property
    def selected_epoch(self) -> int:
        """Whose weights ``model.pt`` holds, from 1; 0 for none."""
        return self.stopping.best_epoch + 1 if self.config.select == "best" else self.epoch

    @property
    def just_selected(self) -> bool:
        """Whether the selected weights are those of the epoch that has just ended."""
        chosen = self.stopping.best_epoch == self.epoch - 1 if self.config.select == "best" else self.finished
        return self.epoch > 0 and self.history.count == 0 and chosen

    def result(self, test: Evaluation | None, interrupted: bool, step: str) -> Result:
        """What a run hands back, with steps of the kind ``step``."""
        best, selected = self.stopping.best_epoch + 1 or None, self.selected_epoch or None
        early = self.stopping.should_stop and self.epoch < self.config.epochs
        return Result(self.config, self.figures, best, selected, test, self.seconds, early, interrupted, step)

    def to_dict(self, ranks: Ranks, images: int) -> dict[str, Any]:
        """A checkpoint; every process must call it. ``images`` is the training set's size, checked when resuming."""
        return {
            "config": self.config.to_dict(),
            "asked": self.asked,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.given.scheduler.state_dict() if self.given and self.given.scheduler else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "ema": {"average": self.ema.average.state_dict(), "steps": self.ema.steps} if self.ema else None,
            "stopping": dataclasses.asdict(self.stopping),
            "history": self.history.values[: self.history.count].clone(),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "figures": [dataclasses.asdict(row) for row in self.figures],
            "rng": ranks.gather(_rng_state(ranks.device)),
            "images": images,
        }

    def load_dict(self, state: Mapping[str, Any], ranks: Ranks, images: int) -> None:
        """Continue from a checkpoint of :meth:`to_dict`, whose entries have been checked by themselves.

        Raises:
            CheckpointError: it was written by a run with another configuration, data set or number of processes; the
                text names the field.
            Misfit: it holds the state of another network; then nothing here has changed.
        """
        differences = self.config.differences(Config.from_dict(state["config"]))
        if state["images"] != images:
            differences.append(f"the training set has {images} images here and {state['images']} there")
        if len(state["rng"]) != ranks.world_size:
            differences.append(f"the number of processes is {ranks.world_size} here and {len(state['rng'])} there")
        here, there = self.asked.get("optimizer"), state.get("asked", {}).get("optimizer")
        if here != there:
            differences.append(f"the optimizer is {here or 'of the recipe'} here and {there or 'of the recipe'} there")
        if differences:
            raise CheckpointError(
                f"the checkpoint belongs to another run: {'; '.join(differences)}; resume with the checkpoint's "
                "settings, or train anew in another folder"
            )
        self._require_like(state)
        if self.given:
            self.given.load(state["optimizer"], state.get("scheduler"))
        if self.ema:  # before the model, which is not this run's alone
            load_weights("ema.average", self.ema.average, state["ema"]["average"])
            self.ema.steps.copy_(state["ema"]["steps"])
        load_weights("model", self.model, state["model"])
        if self.given is None:  # settings follow from the configuration, so the file's are not needed
            settings = self.optimizer.state_dict()["param_groups"]
            load_optimizer(self.optimizer, {"state": state["optimizer"]["state"], "param_groups": settings})
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.stopping = EarlyStopping(**state["stopping"])
        self.history.count = len(state["history"])
        self.history.values[: self.history.count] = state["history"]
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        self.asked_dtype = state.get("asked", {}).get("dtype", self.config.dtype)  # older files had no "auto"
        self.figures = [EpochFigures(**row) for row in state["figures"]]
        _restore_rng(state["rng"][ranks.rank], ranks.device)

    def _require_like(self, state: Mapping[str, Any]) -> None:
        """Check what is not the networks' weights against this run's own."""
        for name, own in (("scaler", self.scaler), ("ema", self.ema)):
            if (own is None) != (state[name] is None):
                raise Misfit(f"{name!r} must be {'None' if own is None else 'there'}, got {describe(state[name])}")
        if self.scaler and state["scaler"].keys() != self.scaler.state_dict().keys():
            raise Misfit(f"'scaler' must hold {', '.join(self.scaler.state_dict())}")
        if self.given and (self.given.scheduler is None) != (state.get("scheduler") is None):
            raise Misfit(f"'scheduler' must be that of {self.given.name}, got {describe(state.get('scheduler'))}")
        if len(state["history"]) > len(self.history.values):
            raise Misfit(f"'history' must be of at most {len(self.history.values)} steps, got {len(state['history'])}")
        if state["stopping"]["patience"] != self.stopping.patience:
            raise Misfit(f"'stopping.patience' must be {self.stopping.patience}, got {state['stopping']['patience']}")
        require_optimizer_like(self.optimizer, state["optimizer"], given=self.given is not None)

    def is_finite(self) -> bool:
        """Whether every weight is; one synchronisation."""
        return bool(torch.stack([p.detach().isfinite().all() for p in self.model.parameters()]).all())


def _rng_state(device: torch.device) -> list[torch.Tensor]:
    """Of the generators that dropout draws from; augmentation has its own, which follow from seed and epoch."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _restore_rng(state: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0].cpu())
    if device.type == "cuda" and len(state) > 1:
        torch.cuda.set_rng_state(state[1].cpu(), device)


def run_normalize(train_set: Source, config: Config, last: Path | None = None, workers: int = 0) -> Normalize | None:
    """The normalisation of a run: that of the checkpoint ``last``, if it is there, else :func:`build_normalize`'s.

    That of images in memory follows from them. A loader may give others each time.
    """
    if last is not None and os.path.lexists(last) and not isinstance(train_set, Images):
        return kept_normalize(last, config)
    return build_normalize(train_set, config, workers)


class RunFiles:
    """The two checkpoints in a run's folder, whose lock the run holds.

    Attributes:
        last: the whole state, to resume from.
        selected: recipe and selected weights.
    """

    def __init__(self, folder: Path, lock: FolderLock, normalize: Normalize | None, train_set: Source):
        self.last, self.selected, self.lock = folder / LAST, folder / SELECTED, lock
        self.normalize = normalize
        self.of_data = {"classes": class_names(train_set), "shape": image_shape(train_set)}

    def write_last(self, values: dict[str, Any]) -> None:
        """Write ``last.pt``: what :meth:`TrainingState.to_dict` made."""
        self._write(self.last, values)

    def write_selected(self, state: TrainingState) -> None:
        """Write ``model.pt``: configuration, weights, normalisation, figures of the epoch that has just ended."""
        recipe = {"config": state.config.to_dict(), "asked": state.asked}
        figures = dataclasses.asdict(state.figures[-1])
        self._write(self.selected, recipe | {"model": state.eval_model.state_dict(), "figures": figures})

    def read_selected(self, device: torch.device, figures: EpochFigures | None) -> dict[str, Any]:
        """What ``model.pt`` holds.

        Raises:
            CheckpointError: it cannot be read, or holds the weights of another epoch than that of ``figures``.
        """
        state = read_entries(self.selected, ("model",), device)
        with misfit_explained(self.selected):
            if figures and state.get("figures") != dataclasses.asdict(figures):
                raise Misfit(f"it is not of epoch {figures.epoch} of this run")
        return state

    def _write(self, path: Path, values: dict[str, Any]) -> None:
        try:
            self.lock.require()
        except FolderInUseError as error:
            raise CheckpointError(f"cannot write {path}: {error}") from error
        normalize = self.normalize and {"scale": self.normalize.scale, "offset": self.normalize.offset}
        save_checkpoint(path, values | {"normalize": normalize} | self.of_data)


class Callback:
    """Methods that a run calls, in its first process only; each does nothing by default.

    An ``OSError`` from one of them (a full disk, say) ends the calls, not the training.
    """

    def on_start(self, state: TrainingState, step: int) -> None:
        """Training begins with step ``step`` of the run, 0 or that of a resumed checkpoint."""

    def on_steps(self, first: int, rows: list[tuple[float, float]], images_per_second: float) -> None:
        """Steps ``first``, ``first + 1``, ... of the run took place, with these losses and accuracies."""

    def on_epoch(self, figures: EpochFigures, state: TrainingState) -> None:
        """An epoch has been validated."""

    def on_end(self, result: Result) -> None:
        """The run has come to its end, or was interrupted."""


def resolve_dtype(config: Config, ranks: Ranks, last: Path | None = None) -> Config:
    """``config`` with a dtype in the place of ``auto``: bfloat16 where the device multiplies it, else float32.

    Args:
        config: of the run.
        ranks: its processes, which must all call this; one without bfloat16 decides for all.
        last: a checkpoint that the run goes on from, if it is there: its dtype is kept.

    Raises:
        CheckpointError: ``last`` cannot be read.
        ValueError: the device cannot train in the dtype asked for.

    >>> resolve_dtype(Config(dtype="auto"), Ranks(0, 1, torch.device("cpu"))).dtype in ("bfloat16", "float32")
    True
    """
    if config.dtype == "float16" and ranks.device.type != "cuda":
        raise ValueError(f"fit: dtype float16 needs CUDA, got device {ranks.device}; choose auto")
    if config.dtype != "auto":
        return config
    if last is not None and os.path.lexists(last):
        dtype = load_config(last).dtype
    else:
        dtype = "float32" if ranks.any(not multiplies_bfloat16(ranks.device)) else "bfloat16"
    return dataclasses.replace(config, dtype=dtype)


def slow_dtype(dtype: str, device: torch.device) -> str:
    """A sentence for the user where ``dtype`` is slow on ``device``; "" elsewhere. Measures for up to a second."""
    if dtype != "bfloat16" or multiplies_bfloat16(device):
        return ""
    ratio = conv_seconds(torch.bfloat16, device) / conv_seconds(torch.float32, device)
    if ratio < 1.2:  # by this package's kernels, which multiply in float
        return ""
    return (
        f"dtype bfloat16 is emulated on this {device.type}: a 3x3 convolution of 128 channels, forward and backward, "
        f"takes {ratio:.1f} times as long as in float32 (measured just now); a new run with --dtype auto is faster"
    )


def conv_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a convolution, forward and backward: the shortest of three after one that is not counted."""
    x = torch.ones(8, 128, 8, 8, dtype=dtype, device=device).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.ones(128, 128, 3, 3, dtype=dtype, device=device, requires_grad=True)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        out = ops.conv2d(x, weight, padding=1)
        gradients = torch.autograd.grad(out, (x, weight), torch.ones_like(out))
        for gradient in gradients:
            gradient.flatten()[0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


#: What each keeps for a parameter, by name; all but the step has the parameter's shape.
KEPT: dict[type[torch.optim.Optimizer], set[str]] = {
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.SGD: {"momentum_buffer"},
    Muon: {"momentum_buffer"},
}


def require_optimizer_like(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], given: bool = False) -> None:
    """Check that ``state`` is of an optimizer like this one, over parameters like its own.

    What an optimizer of the user's (``given``) keeps for a parameter is its own affair.

    Raises:
        Misfit: it is not; the text names the entry.
    """
    own = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    if [group["params"] for group in state["param_groups"]] != own:
        raise Misfit("'optimizer.param_groups' must be of as many parameters as the network has here")
    if given:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = KEPT[type(optimizer)]
    for index, entry in state["state"].items():
        if index >= len(parameters) or entry.keys() != names:
            raise Misfit(
                f"{f'optimizer.state[{index}]'!r} must hold {', '.join(sorted(names))} of one of {len(parameters)} "
                f"parameters, got {', '.join(sorted(entry)) or 'nothing'}"
            )
        for name, tensor in entry.items():
            shape = torch.Size() if name == "step" else parameters[index].shape
            if not isinstance(tensor, Tensor) or tensor.shape != shape or not tensor.is_floating_point():
                raise Misfit(
                    f"{f'optimizer.state[{index}].{name}'!r} must be floating point {list(shape)}, got "
                    f"{describe(tensor)}"
                )
