"""Exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Keeps ``average``, a copy of ``model`` whose parameters follow ``decay * average + (1 - decay) * parameter``.

    Buffers (BN's running statistics, themselves averages) are copied. The decay grows from 0.1 to ``decay`` as
    ``(1 + step) / (10 + step)``, so that the random initial weights are soon forgotten; the step is counted on the
    device, and an update needs no synchronisation.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> ema = ExponentialMovingAverage(model, decay=0.5)
    >>> _ = nn.init.ones_(model.weight)
    >>> ema.update(model)
    >>> round(ema.average.weight.item(), 4)
    0.9
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.steps = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Blend in ``model``'s parameters after an optimisation step."""
        keep = ((1 + self.steps) / (10 + self.steps)).clamp_(max=self.decay)
        self.steps += 1
        average: list[Tensor] = list(self.average.parameters())
        current: list[Tensor] = list(model.parameters())
        change = list(torch._foreach_sub(current, average))
        torch._foreach_mul_(change, 1 - keep)  # not lerp: its scalar weight would be read back from the device
        torch._foreach_add_(average, change)
        for mine, theirs in zip(self.average.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
