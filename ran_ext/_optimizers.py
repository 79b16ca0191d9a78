"""Optimizers: state and rates changed in place, so that a captured step sees them; and the user's own, checked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a ``state_dict()``, also of another device, into the tensors that ``optimizer`` has already.

    ``optimizer.load_state_dict`` puts new tensors in their place, which a captured step would not see.

    >>> from copy import deepcopy
    >>> weight = torch.ones(1, requires_grad=True)
    >>> adam = torch.optim.Adam([weight], lr=torch.tensor(0.1), fused=True)
    >>> weight.grad = torch.ones(1)
    >>> adam.step()
    >>> state, held = deepcopy(adam.state_dict()), adam.state[weight]["step"]
    >>> adam.step()
    >>> load_optimizer(adam, state)
    >>> held
    tensor(1.)
    """
    held = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    names = ("lr", "capturable")  # as this device needs them
    settings: list[dict[str, Any]] = [
        {name: group[name] for name in names if name in group} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(dict(state))
    for parameter, values in held.items():
        loaded = optimizer.state[parameter]
        for name, tensor in values.items():
            loaded[name] = tensor.copy_(loaded.get(name, torch.zeros(())))  # none: a state before the first step
    for group, mine in zip(optimizer.param_groups, settings, strict=True):
        lr = float(group["lr"])
        group.update(mine)
        _set_group_lr(group, lr)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group, in place where it is a tensor."""
    for group in optimizer.param_groups:
        _set_group_lr(group, lr)


def _set_group_lr(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


class GivenOptimizer:
    """An optimizer of the user's, and a scheduler or none: what ``fit(optimizer=..., scheduler=...)`` was given.

    Args:
        optimizer: any of ``torch.optim`` that steps without a closure.
        scheduler: any of ``torch.optim.lr_scheduler`` over ``optimizer``, or None. ``ReduceLROnPlateau`` is told the
            validation loss, or with ``mode="max"`` the validation accuracy.
        interval: ``epoch`` or ``step``: when the scheduler moves on.

    Raises:
        TypeError: an argument is none.
        ValueError: the arguments do not fit together.

    >>> given = GivenOptimizer(torch.optim.AdamW([torch.zeros(1, requires_grad=True)]), None, "epoch")
    >>> given.name
    'AdamW'
    """

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler | None, interval: str):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"fit: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(f"fit: optimizer must step without a closure, got {type(optimizer).__name__}")
        if scheduler is not None and not isinstance(scheduler, LRScheduler):
            raise TypeError(f"fit: scheduler must be a torch.optim.lr_scheduler.LRScheduler, got {scheduler!r}")
        if scheduler is not None and scheduler.optimizer is not optimizer:
            raise ValueError("fit: scheduler must be over the optimizer that fit is given, got one over another")
        if interval not in ("epoch", "step"):
            raise ValueError(f"fit: scheduler_interval must be epoch or step, got {interval!r}")
        if interval == "step" and isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError("fit: scheduler_interval must be epoch for ReduceLROnPlateau, which waits for validations")
        self.optimizer, self.scheduler, self.interval = optimizer, scheduler, interval

    @property
    def name(self) -> str:
        """The classes, by which a checkpoint tells one from another."""
        scheduler = f", {type(self.scheduler).__name__} each {self.interval}" if self.scheduler else ""
        return type(self.optimizer).__name__ + scheduler

    def load(self, optimizer: Mapping[str, Any], scheduler: Mapping[str, Any] | None) -> None:
        """Continue from the state_dicts of an optimizer and a scheduler of the same kinds."""
        self.optimizer.load_state_dict(dict(optimizer))
        if self.scheduler is not None and scheduler is not None:
            self.scheduler.load_state_dict(dict(scheduler))

    def lr(self) -> float:
        """The learning rate of the first group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        """Move a scheduler on that counts steps."""
        if self.scheduler is not None and self.interval == "step":
            self.scheduler.step()

    def after_epoch(self, val_loss: float | None, val_accuracy: float | None) -> None:
        """Move a scheduler on that counts epochs."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            value = val_loss if self.scheduler.mode == "min" else val_accuracy
            assert value is not None  # given_optimizer
            self.scheduler.step(value)
        elif self.scheduler is not None and self.interval == "epoch":
            self.scheduler.step()


def given_optimizer(
    optimizer: Optimizer | None,
    scheduler: LRScheduler | None,
    interval: str,
    model: nn.Module,
    validates: bool,
) -> GivenOptimizer | None:
    """What ``fit`` was given, checked; None where it was given no optimizer."""
    if optimizer is None:
        if scheduler is not None:
            raise ValueError("fit: scheduler needs the optimizer that it is over: give both")
        return None
    given = GivenOptimizer(optimizer, scheduler, interval)
    own = set(model.parameters())
    if not all(parameter in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("fit: optimizer must be over model's parameters, got one over others")
    if not validates and isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("fit: ReduceLROnPlateau needs val_set, by which it plans")
    return given
