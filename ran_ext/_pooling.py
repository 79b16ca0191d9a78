"""Pooling of which backward keeps where the maxima stand, and not what was pooled: for :mod:`ran_ext._taken`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backend

aten = torch.ops.aten
Pair = tuple[int, int]


def max_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> Tensor:
    """``F.max_pool2d``, all its arguments given.

    >>> max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), (3, 3), (1, 1), (0, 0), (1, 1), False).flatten()
    tensor([10., 11., 14., 15.])
    """
    by_two = (kernel, stride, padding, dilation) == ((2, 2), (2, 2), (0, 0), (1, 1))
    whole = ceil_mode or not (x.shape[2] % 2 or x.shape[3] % 2)
    if by_two and whole and _backend.use_native(x):
        return torch.ops.ran_ext.max_pool2d(x)[0]  # type: ignore[no-any-return]
    return _MaxPool.apply(x, kernel, stride, padding, dilation, ceil_mode)  # type: ignore[no-any-return]


def avg_pool2d(x: Tensor, *geometry: Any) -> Tensor:
    """``F.avg_pool2d``, all its arguments given.

    >>> avg_pool2d(torch.arange(16.0).view(1, 1, 4, 4), (2, 2), (2, 2), (0, 0), False, True, None).flatten()
    tensor([ 2.5000,  4.5000, 10.5000, 12.5000])
    """
    return _AvgPool.apply(x, *geometry)  # type: ignore[no-any-return]


def _layout(x: Tensor) -> dict[str, Any]:
    """Of what was pooled: torch's backward looks at nothing else, and gets a tensor that nobody wrote."""
    return {"size": x.size(), "stride": x.stride(), "dtype": x.dtype, "device": x.device}


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *geometry: Any) -> Tensor:  # type: ignore[override]
        ctx.layout, ctx.geometry = _layout(x), geometry
        out, index = aten.max_pool2d_with_indices(x, *geometry)
        ctx.save_for_backward(index.int())
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        x, index = torch.empty_strided(**ctx.layout), ctx.saved_tensors[0].long()
        dx = aten.max_pool2d_with_indices_backward(dout, x, *ctx.geometry, index)
        return dx, *[None] * len(ctx.geometry)


class _AvgPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *geometry: Any) -> Tensor:  # type: ignore[override]
        ctx.layout, ctx.geometry = _layout(x), geometry
        return aten.avg_pool2d(x, *geometry)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        dx = aten.avg_pool2d_backward(dout, torch.empty_strided(**ctx.layout), *ctx.geometry)
        return dx, *[None] * len(ctx.geometry)
