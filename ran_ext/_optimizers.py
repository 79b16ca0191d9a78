"""Changes an optimizer's state and rates in place, so that a captured step sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer


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
