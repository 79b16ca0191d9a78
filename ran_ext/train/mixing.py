"""Mixup (Zhang et al. 2018, arXiv:1710.09412): training on what lies between two images."""

from __future__ import annotations

import torch
from torch import Tensor


def mixup(batch: Tensor, share: Tensor) -> Tensor:
    """``share`` of each row of ``batch`` and the rest of its partner's, the row at the same place from the other end.

    A batch in random order so gets random partners without a further draw. ``share`` uniform in [0, 1) is the paper's
    choice for CIFAR-10 (alpha = 1), here one for each row. For images and, as one-hot rows, for their labels.

    Args:
        batch: float ``(N, ...)``.
        share: float ``(N,)`` on the same device.

    >>> mixup(torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([0.75, 0.5, 0.25])).flatten().tolist()
    [1.0, 1.0, 1.0]
    """
    return torch.lerp(batch.flip(0), batch, share.view(-1, *[1] * (batch.dim() - 1)))
