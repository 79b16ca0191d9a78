"""A lower level of a pyramid added to the one above it: nearest x2 up-sampling and the addition in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _backend, _tracing
from . import _checks as checks


def upsample_add(
    lower: Tensor, skip: Tensor | None = None, size: Sequence[int] | None = None, interpolation: str = "nearest"
) -> Tensor:
    """``lower`` up-sampled by two (nearest) and cropped, plus ``skip``; differentiable in both.

    Equivalent to::

        wide = F.interpolate(lower, scale_factor=2.0, mode="nearest")[..., : size[0], : size[1]]
        wide if skip is None else wide + skip

    in one pass forward and one backward: the up-sampled tensor is never written out. Backward keeps no tensor.
    With ``interpolation="bilinear"`` ``wide`` is ``F.interpolate(lower, size, mode="bilinear", align_corners=False)``,
    in PyTorch's own ops.

    Args:
        lower: ``(N, C, ceil(H / 2), ceil(W / 2))``, float16, bfloat16, float32 or float64.
        skip: ``(N, C, H, W)``, of ``lower``'s dtype and device; None adds nothing.
        size: ``(H, W)`` of the result; None for ``skip``'s, or for twice ``lower``'s where there is no ``skip``.
        interpolation: ``"nearest"`` or ``"bilinear"``.

    Returns:
        ``(N, C, H, W)`` of ``lower``'s dtype, in the memory format of ``skip``, or of ``lower`` where there is none.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it, the rule, and what was given.

    >>> upsample_add(torch.tensor([[[[1.0, 2.0]]]]), torch.full((1, 1, 2, 3), 0.5))
    tensor([[[[1.5000, 1.5000, 2.5000],
              [1.5000, 1.5000, 2.5000]]]])
    """
    if _tracing.is_symbolic(lower):
        return _plain(lower, skip, size, interpolation)
    if skip is None:
        checks.tensor("upsample_add", "lower", lower)
    else:
        lower, skip = checks.alike("upsample_add", ("lower", "skip"), lower, skip)
    height, width = _check(lower, skip, size, interpolation)
    # Inductor fuses the plain form into its neighbours; it cannot fuse an opaque op.
    if interpolation == "bilinear" or torch.compiler.is_compiling() or not _backend.use_native(lower, skip):
        return _plain(lower, skip, (height, width), interpolation)
    return torch.ops.ran_ext.upsample_add(lower, skip, height, width)


def upsample_add_ref(
    lower: Tensor, skip: Tensor | None = None, size: Sequence[int] | None = None, interpolation: str = "nearest"
) -> Tensor:
    """:func:`upsample_add` in plain PyTorch: the fallback, and what the kernels are held to."""
    return _plain(lower, skip, _check(lower, skip, size, interpolation), interpolation)


def _plain(lower: Tensor, skip: Tensor | None, size: Sequence[int] | None, interpolation: str) -> Tensor:
    size = skip.shape[-2:] if size is None and skip is not None else size
    if interpolation == "bilinear":
        target = (2 * lower.shape[-2], 2 * lower.shape[-1]) if size is None else (size[0], size[1])
        wide = F.interpolate(lower, size=target, mode="bilinear", align_corners=False)
    elif size is not None and _tracing.is_symbolic(lower):
        wide = F.interpolate(lower, size=(size[0], size[1]), mode="nearest")  # a graph for every size: nothing to crop
    else:
        wide = F.interpolate(lower, scale_factor=2.0, mode="nearest")
        wide = wide if size is None else wide[..., : size[0], : size[1]]
    return wide if skip is None else wide + skip


def _check(lower: Tensor, skip: Tensor | None, size: Sequence[int] | None, interpolation: str) -> tuple[int, int]:
    """Height and width of the result; raises where an argument does not fit."""
    checks.choice("upsample_add", "interpolation", interpolation, checks.INTERPOLATIONS)
    if lower.dim() != 4 or 0 in lower.shape[1:]:
        raise ValueError(
            f"upsample_add: lower must be (N, C, H, W) with at least one channel and pixel, got {list(lower.shape)}"
        )
    n, c, h, w = lower.shape
    name = "size" if skip is None or size is not None else "skip's height and width"
    if size is not None:
        size = checks.pair("upsample_add", "size", size, 1)
    else:
        size = (2 * h, 2 * w) if skip is None else skip.shape[-2:]
    if len(size) != 2 or size[0] not in (2 * h - 1, 2 * h) or size[1] not in (2 * w - 1, 2 * w):
        raise ValueError(
            f"upsample_add: {name} must be ({2 * h - 1} or {2 * h}, {2 * w - 1} or {2 * w}) for lower "
            f"{list(lower.shape)}, got {tuple(size)}"
        )
    if skip is not None and list(skip.shape) != [n, c, *size]:
        raise ValueError(
            f"upsample_add: skip must be {[n, c, *size]} for lower {list(lower.shape)}, got {list(skip.shape)}"
        )
    return size[0], size[1]
