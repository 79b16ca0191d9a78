"""2x2 max-pooling that keeps one byte a pixel for backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _backend, _tracing
from . import _checks as checks


def max_pool2d(x: Tensor, ceil_mode: bool = True) -> Tensor:
    """The maxima of 2x2 windows at stride 2, differentiable.

    Equivalent to::

        F.max_pool2d(x, 2, ceil_mode=ceil_mode)

    but backward keeps neither ``x`` nor an int64 index, only where in its window each maximum stands: one byte. As in
    PyTorch, NaN is a maximum, and of equal values the first gets the gradient.

    Args:
        x: ``(N, C, H, W)``, contiguous or channels_last (kept as given), float16, bfloat16, float32 or float64.
        ceil_mode: an odd row or column is a window of its own; else it is left out.

    Returns:
        ``(N, C, ceil(H / 2), ceil(W / 2))``, or rounded down, of ``x``'s dtype and memory format.

    Raises:
        TypeError: ``x`` is no dense floating-point tensor, or ``ceil_mode`` no bool.
        ValueError: ``x`` is not 4-d, has no channels, or too few pixels for one window.

    >>> max_pool2d(torch.arange(9.0).view(1, 1, 3, 3)).flatten()
    tensor([4., 5., 7., 8.])
    >>> max_pool2d(torch.arange(9.0).view(1, 1, 3, 3), ceil_mode=False).flatten()
    tensor([4.])
    """
    if _tracing.is_symbolic(x):
        return max_pool2d_ref(x, ceil_mode)
    ceil_mode = _check(x, ceil_mode)
    # Inductor fuses the plain form into its neighbours; it cannot fuse an opaque op.
    if torch.compiler.is_compiling() or not _backend.use_native(x):
        return max_pool2d_ref(x, ceil_mode)
    if not ceil_mode:
        x = x[..., : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
    return torch.ops.ran_ext.max_pool2d(x)[0]


def max_pool2d_ref(x: Tensor, ceil_mode: bool = True) -> Tensor:
    """:func:`max_pool2d` in plain PyTorch: the fallback, and what the kernels are held to."""
    return F.max_pool2d(x, 2, ceil_mode=ceil_mode)


def _check(x: Tensor, ceil_mode: bool) -> bool:
    """Raises what :func:`max_pool2d` documents; ``ceil_mode`` as a bool."""
    checks.tensor("max_pool2d", "x", x)
    ceil_mode = checks.flag("max_pool2d", "ceil_mode", ceil_mode)
    least = 1 if ceil_mode else 2
    if x.dim() != 4 or x.shape[1] == 0 or min(x.shape[2:]) < least:
        raise ValueError(
            f"max_pool2d: x must be (N, C, H, W) with at least one channel and {least}x{least} pixels for ceil_mode="
            f"{ceil_mode}, got {list(x.shape)}"
        )
    return ceil_mode
