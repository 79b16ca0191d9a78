"""All that a run must remember to continue bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .config import Config
from .distributed import Ranks
from .early_stopping import EarlyStopping
from .ema import ExponentialMovingAverage
from .errors import CheckpointError
from .optimizers import load_optimizer, require_optimizer_like
from .results import EpochFigures
from .schema import Misfit, describe, load_weights
from .step import StepHistory


@dataclasses.dataclass
class TrainingState:
    """Model, optimizer, scaler, average and counters; everything else follows from the configuration.

    Attributes:
        model: the plain network, not the distributed wrapper.
        epoch: the one being trained, from 0.
        history: of that epoch's steps so far.
        seconds: wall time before this process took over.
        asked_dtype: what the run was begun with; ``config.dtype`` is what that stood for.
    """

    config: Config
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    ema: ExponentialMovingAverage | None
    stopping: EarlyStopping
    history: StepHistory
    asked_dtype: str
    epoch: int = 0
    seconds: float = 0.0
    figures: list[EpochFigures] = dataclasses.field(default_factory=list)

    @property
    def eval_model(self) -> nn.Module:
        """The weights that are validated and kept."""
        return self.model if self.ema is None else self.ema.average

    def to_dict(self, ranks: Ranks, images: int) -> dict[str, Any]:
        """A checkpoint; every process must call it. ``images`` is the training set's size, checked when resuming."""
        return {
            "config": self.config.to_dict(),
            "asked": {"dtype": self.asked_dtype},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
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
        if differences:
            raise CheckpointError(
                f"the checkpoint belongs to another run: {'; '.join(differences)}; resume with the checkpoint's "
                "settings, or train anew in another folder"
            )
        self._require_like(state)
        if self.ema:  # before the model, which is not this run's alone
            load_weights("ema.average", self.ema.average, state["ema"]["average"])
            self.ema.steps.copy_(state["ema"]["steps"])
        load_weights("model", self.model, state["model"])
        # its settings follow from the configuration, so the file's are not needed
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
        if len(state["history"]) > len(self.history.values):
            raise Misfit(f"'history' must be of at most {len(self.history.values)} steps, got {len(state['history'])}")
        if state["stopping"]["patience"] != self.stopping.patience:
            raise Misfit(f"'stopping.patience' must be {self.stopping.patience}, got {state['stopping']['patience']}")
        require_optimizer_like(self.optimizer, state["optimizer"])

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
