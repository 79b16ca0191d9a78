"""The attention combine of Wang et al. 2017, eq. 3: ``(1 + sigmoid(mask)) * trunk`` in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend, _tracing


def attention_gate(trunk: Tensor, mask: Tensor, scale_factor: int = 1) -> Tensor:
    """``(1 + sigmoid(mask)) * trunk``, differentiable in both.

    Equivalent to::

        m = mask if scale_factor == 1 else F.interpolate(mask, scale_factor=scale_factor, mode="nearest")
        (1 + torch.sigmoid(m[..., :H, :W])) * trunk

    in one pass each way: the up-sampled mask and the sigmoid are never written out, and backward keeps ``trunk`` and
    ``mask`` alone.

    Args:
        trunk: ``(N, C, H, W)``, contiguous or channels_last (kept as given), float16, bfloat16, float32 or float64.
            With ``scale_factor=1`` any shape will do.
        mask: logits, same dtype and device as ``trunk``; ``(N, C, ceil(H / s), ceil(W / s))`` for ``scale_factor`` s.
        scale_factor: nearest-neighbour up-sampling of the mask, >= 1.

    Returns:
        A tensor of ``trunk``'s shape, dtype and memory format.

    Raises:
        TypeError: the dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit.

    Source: Wang et al. 2017, arXiv:1704.06904, eq. 3.

    >>> attention_gate(torch.tensor([2.0, -4.0]), torch.zeros(2))
    tensor([ 3., -6.])
    >>> attention_gate(torch.ones(1, 1, 3, 3), torch.zeros(1, 1, 2, 2), scale_factor=2).shape
    torch.Size([1, 1, 3, 3])
    """
    if _tracing.is_symbolic(trunk):
        return attention_gate_ref(trunk, mask, scale_factor)
    if trunk.dtype != mask.dtype and _backend.autocasts(trunk):
        wider = torch.promote_types(trunk.dtype, mask.dtype)  # what `*` does in eager PyTorch
        trunk, mask = trunk.to(wider), mask.to(wider)
    _check(trunk, mask, scale_factor)
    # Inductor fuses the plain form into its neighbours; an opaque op would stand in its way.
    if torch.compiler.is_compiling() or not _backend.use_native(trunk, mask):
        return attention_gate_ref(trunk, mask, scale_factor)
    return torch.ops.ran_ext.attention_gate(trunk, mask, scale_factor)


def attention_gate_ref(trunk: Tensor, mask: Tensor, scale_factor: int = 1) -> Tensor:
    """:func:`attention_gate` in plain PyTorch: the fallback, and what the kernels are held to."""
    if scale_factor != 1:
        mask = mask.repeat_interleave(scale_factor, -2).repeat_interleave(scale_factor, -1)
        mask = mask[..., : trunk.shape[-2], : trunk.shape[-1]]  # not unpacked: torch.fx cannot
    return (1 + torch.sigmoid(mask)) * trunk


def _check(trunk: Tensor, mask: Tensor, scale_factor: int) -> None:
    if not trunk.is_floating_point() or trunk.dtype != mask.dtype:
        raise TypeError(
            f"attention_gate: trunk and mask must have the same floating-point dtype, got trunk {trunk.dtype} and mask "
            f"{mask.dtype}"
        )
    if trunk.device != mask.device:
        raise ValueError(
            f"attention_gate: trunk and mask must be on the same device, got trunk on {trunk.device} and mask on "
            f"{mask.device}"
        )
    if scale_factor == 1:
        if trunk.shape != mask.shape:
            raise ValueError(
                f"attention_gate: trunk and mask must have the same shape, got trunk {list(trunk.shape)} and mask "
                f"{list(mask.shape)}"
            )
        return
    if not isinstance(scale_factor, int) or scale_factor < 1:
        raise ValueError(f"attention_gate: scale_factor must be a whole number >= 1, got {scale_factor!r}")
    if trunk.dim() != 4 or mask.dim() != 4:
        raise ValueError(
            f"attention_gate: trunk and mask must be (N, C, H, W) for scale_factor {scale_factor}, got trunk "
            f"{list(trunk.shape)} and mask {list(mask.shape)}"
        )
    n, c, h, w = trunk.shape
    expected = [n, c, -(-h // scale_factor), -(-w // scale_factor)]
    if list(mask.shape) != expected:
        raise ValueError(
            f"attention_gate: mask must be {expected} for trunk {list(trunk.shape)} and scale_factor {scale_factor} "
            f"(height and width divided, rounded up), got mask {list(mask.shape)}"
        )
