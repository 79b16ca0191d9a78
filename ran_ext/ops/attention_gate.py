"""The attention combine of Wang et al. 2017, eq. 3: ``(1 + sigmoid(mask)) * trunk`` in one pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _backend, _tracing
from . import _checks as checks


def attention_gate(trunk: Tensor, mask: Tensor, scale_factor: int = 1, interpolation: str = "nearest") -> Tensor:
    """``(1 + sigmoid(mask)) * trunk``, differentiable in both.

    Equivalent to::

        m = mask if scale_factor == 1 else F.interpolate(mask, scale_factor=scale_factor, mode="nearest")
        (1 + torch.sigmoid(m[..., :H, :W])) * trunk

    in one pass forward and one backward: the up-sampled mask and the sigmoid are never written out, and
    backward keeps ``trunk`` and ``mask`` alone. With ``interpolation="bilinear"`` m is
    ``F.interpolate(mask, size=(H, W), mode="bilinear", align_corners=False)``.

    Args:
        trunk: ``(N, C, H, W)``, contiguous or channels_last (kept as given), float16, bfloat16, float32 or float64.
            With ``scale_factor=1`` any shape will do.
        mask: logits, same dtype and device as ``trunk``; ``(N, C, ceil(H / s), ceil(W / s))`` for ``scale_factor`` s.
        scale_factor: up-sampling of the mask, >= 1.
        interpolation: of the up-sampling, ``"nearest"`` or ``"bilinear"``.

    Returns:
        A tensor of ``trunk``'s shape, dtype and memory format.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it, the rule, and what was given.

    Source: Wang et al. 2017, arXiv:1704.06904, eq. 3.

    >>> attention_gate(torch.tensor([2.0, -4.0]), torch.zeros(2))
    tensor([ 3., -6.])
    >>> attention_gate(torch.ones(1, 1, 3, 3), torch.zeros(1, 1, 2, 2), scale_factor=2).shape
    torch.Size([1, 1, 3, 3])
    """
    if _tracing.is_symbolic(trunk):
        return attention_gate_ref(trunk, mask, scale_factor, interpolation)
    trunk, mask = checks.alike("attention_gate", ("trunk", "mask"), trunk, mask)
    scale_factor = _check(trunk, mask, scale_factor, interpolation)
    # Inductor fuses the plain form into its neighbours; it cannot fuse an opaque op.
    if torch.compiler.is_compiling() or not _backend.use_native(trunk, mask):
        return attention_gate_ref(trunk, mask, scale_factor, interpolation)
    return torch.ops.ran_ext.attention_gate(trunk, mask, scale_factor, interpolation == "bilinear")


def attention_gate_ref(trunk: Tensor, mask: Tensor, scale_factor: int = 1, interpolation: str = "nearest") -> Tensor:
    """:func:`attention_gate` in plain PyTorch: the fallback, and what the kernels are held to."""
    # The trunk first: its memory format is the result's where the mask, of one pixel, has either.
    return trunk * (1 + torch.sigmoid(upsampled(mask, trunk, scale_factor, interpolation)))


def upsampled(mask: Tensor, trunk: Tensor, scale_factor: int, interpolation: str = "nearest") -> Tensor:
    """``mask`` at the resolution of ``trunk``."""
    if scale_factor != 1:
        height, width = trunk.shape[-2], trunk.shape[-1]  # not unpacked: torch.fx cannot
        if interpolation == "bilinear":
            return F.interpolate(mask, size=(height, width), mode="bilinear", align_corners=False)
        if not (symbolic := _tracing.is_symbolic(trunk)):
            scale_factor = min(scale_factor, max(height, width, 1))  # a larger one only takes memory
        if symbolic and scale_factor == 2:
            mask = F.interpolate(mask, size=(height, width), mode="nearest")  # a graph for every size: nothing to crop
        else:
            mask = mask.repeat_interleave(scale_factor, -2).repeat_interleave(scale_factor, -1)[..., :height, :width]
    return mask


def _check(trunk: Tensor, mask: Tensor, scale_factor: int, interpolation: str) -> int:
    """Raises where the factor or a shape does not fit; the factor as an int."""
    op = "attention_gate"
    checks.choice(op, "interpolation", interpolation, checks.INTERPOLATIONS)
    scale_factor = checks.whole(op, "scale_factor", scale_factor, 1)
    if scale_factor == 1:
        if trunk.shape != mask.shape:
            raise ValueError(
                f"{op}: trunk and mask must have the same shape, got trunk {list(trunk.shape)} and mask "
                f"{list(mask.shape)}"
            )
        return scale_factor
    if trunk.dim() != 4 or mask.dim() != 4:
        raise ValueError(
            f"{op}: trunk and mask must be (N, C, H, W) for scale_factor {scale_factor}, got trunk "
            f"{list(trunk.shape)} and mask {list(mask.shape)}"
        )
    n, c, h, w = trunk.shape
    expected = [n, c, -(-h // scale_factor), -(-w // scale_factor)]
    if list(mask.shape) != expected:
        raise ValueError(
            f"{op}: mask must be {expected} for trunk {list(trunk.shape)} and scale_factor {scale_factor} "
            f"(height and width divided, rounded up), got mask {list(mask.shape)}"
        )
    return scale_factor
