"""The report's two optimizers, fused, and fit for capture in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .config import Config


def build_optimizer(model: nn.Module, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """Adam or Nesterov SGD over ``model``'s parameters, which must lie on ``device`` already.

    On CUDA the learning rate is a tensor there and Adam's step count is ``capturable``, so that a captured step sees
    the changes that :func:`set_lr` makes. ``config.weight_decay`` is taken here for ``weight_decay_scope="all"`` alone,
    by weights of two dimensions and more (biases and BN's parameters are left free); the ``dense`` scope belongs to the
    loss.
    """
    decay = config.weight_decay if config.weight_decay_scope == "all" else 0.0
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]
    on_cuda = device.type == "cuda"
    lr = torch.tensor(config.base_lr, device=device) if on_cuda else config.base_lr
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=lr, fused=True, capturable=on_cuda)
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)  # type: ignore[arg-type]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
