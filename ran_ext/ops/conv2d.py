"""``F.conv2d`` with the fast 3x3 kernels of the CPU: a convolution with nothing to fuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _backend, _paths, _tracing
from . import _checks as checks
from . import _convolution

Pair = int | tuple[int, int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d(x, weight, bias, stride, padding, dilation, groups)``, differentiable; faster on the CPU.

    Of channels_last tensors on the CPU, 3x3 convolutions of stride 1 and padding 1 with 16 channels or more run by
    Winograd's method, forward and backward, where that pays and :func:`ran_ext.set_conv3x3` allows it; 16-bit tensors
    on a processor whose library is slow for them are convolved in float32. All else is PyTorch's own.

    Args:
        x: ``(N, C_in, H, W)`` or ``(C_in, H, W)``; float16, bfloat16, float32 or float64. The fast kernels need
            channels_last.
        weight: ``(C_out, C_in / groups, kH, kW)``, dtype of ``x`` (under autocast both are cast).
        bias: ``(C_out,)`` or None.
        stride, padding, dilation, groups: as in ``F.conv2d``.

    Returns:
        ``(N, C_out, H_out, W_out)``, as ``F.conv2d`` gives it.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it, the rule, and what was given.

    Source: Lavin and Gray 2016, arXiv:1509.09308.

    >>> x, weight = torch.ones(1, 16, 4, 4), torch.ones(16, 16, 3, 3)
    >>> conv2d(x, weight, padding=1)[0, 0]
    tensor([[ 64.,  96.,  96.,  64.],
            [ 96., 144., 144.,  96.],
            [ 96., 144., 144.,  96.],
            [ 64.,  96.,  96.,  64.]])
    """
    op = "conv2d"
    if _tracing.is_symbolic(x):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    checks.tensor(op, "x", x)
    checks.operand(op, "weight", weight, x)
    if bias is not None:
        checks.operand(op, "bias", bias, x)
    stride, dilation = checks.pair(op, "stride", stride, 1), checks.pair(op, "dilation", dilation, 1)
    groups = checks.whole(op, "groups", groups, 1)
    if not isinstance(padding, str):
        padding = checks.pair(op, "padding", padding, 0)
    elif padding == "valid":
        padding = (0, 0)
    elif padding == "same" and stride == (1, 1) and tuple(weight.shape[2:]) == (3, 3) and dilation == (1, 1):
        padding = (1, 1)
    if x.dim() not in (3, 4) or weight.dim() != 4 or 0 in weight.shape or weight.shape[1] * groups != x.shape[-3]:
        raise ValueError(
            f"{op}: weight must be (C_out, C_in / groups, kH, kW) for x (N, C_in, H, W) or (C_in, H, W), got "
            f"{list(weight.shape)} with groups={groups} and x {list(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        rows = weight.shape[0]
        raise ValueError(f"{op}: bias must be [{rows}] for weight {list(weight.shape)}, got {list(bias.shape)}")
    if isinstance(padding, str) or x.dim() == 3 or groups > 1 or dilation != (1, 1):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    for i in (0, 1):
        if x.shape[2 + i] + 2 * padding[i] < weight.shape[2 + i]:
            raise ValueError(
                f"{op}: x {list(x.shape)} with padding {list(padding)} is smaller than the kernel "
                f"{list(weight.shape[2:])}"
            )
    if not _has_kernels(x, weight, stride, padding) or not _backend.use_native(x, weight, bias):
        return _convolution.conv2d(x, weight, bias, stride, padding)
    out: Tensor = torch.ops.ran_ext.conv2d(x, weight, bias, stride, padding, _paths.paths(x))
    return out


def conv2d_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """:func:`conv2d` in plain PyTorch: the fallback, and what the kernels are held to."""
    return F.conv2d(x, weight, bias, *args, **kwargs)


def is_3x3(kernel: Sequence[int], stride: Any, padding: Any, dilation: Any = (1, 1), groups: int = 1) -> bool:
    """Whether the 3x3 kernels know a convolution of this geometry."""
    return tuple(kernel) == (3, 3) and stride == padding == dilation == (1, 1) and groups == 1


def has_fast_3x3(weight: Sequence[int], stride: Any, padding: Any, dilation: Any = (1, 1), groups: int = 1) -> bool:
    """Whether a convolution with a weight of this shape is worth to be given to the 3x3 kernels."""
    return is_3x3(weight[2:], stride, padding, dilation, groups) and min(weight[:2]) >= 16


def _has_kernels(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Whether the compiled op may do better than the library: it looks closer."""
    if not x.is_cpu:
        return False
    if is_3x3(weight.shape[2:], stride, padding):
        return True
    return x.dtype in (torch.bfloat16, torch.float16) or _backend.autocasts(x)
