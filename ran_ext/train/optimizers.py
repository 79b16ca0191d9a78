"""The report's two optimizers, fused, and fit for capture in a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .config import Config
from .schema import Misfit, describe

#: What each keeps for a parameter, by name; all but the step has the parameter's shape.
KEPT: dict[type[torch.optim.Optimizer], set[str]] = {
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.SGD: {"momentum_buffer"},
}


def build_optimizer(model: nn.Module, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """Adam or Nesterov SGD over ``model``'s parameters, which must lie on ``device`` already.

    The learning rate is a tensor on the device, which the fused kernels read there, so that a captured step sees the
    changes that :func:`set_lr` makes; foreach and plain SGD would wait for the device to read it.
    ``config.weight_decay`` is taken here for ``weight_decay_scope="all"`` alone, by weights of two dimensions and more
    (biases and BN's parameters are left free); the ``dense`` scope belongs to the loss.
    """
    decay = config.weight_decay if config.weight_decay_scope == "all" else 0.0
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]
    lr = torch.tensor(config.base_lr, device=device)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=lr, fused=True, capturable=device.type == "cuda")
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)


def require_optimizer_like(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Check that ``state`` is of an optimizer like this one of :func:`build_optimizer`, over parameters like its own.

    Raises:
        Misfit: it is not; the text names the entry.
    """
    own = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    if [group["params"] for group in state["param_groups"]] != own:
        raise Misfit("'optimizer.param_groups' must be of as many parameters as the network has here")
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
            if tensor.shape != shape or not tensor.is_floating_point():
                raise Misfit(
                    f"{f'optimizer.state[{index}].{name}'!r} must be floating point {list(shape)}, got "
                    f"{describe(tensor)}"
                )


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
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


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, in place where it is a tensor."""
    for group in optimizer.param_groups:
        _set_group_lr(group, lr)


def _set_group_lr(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
