"""``conv2d(relu(batch_norm(x))) + residual`` in one op: a pre-activation convolution (He et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _backend
from .bn_relu import bn_relu_ref, check_batch_norm, update_running_stats


def bn_relu_conv2d(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """``conv2d(relu(batch_norm(x)), weight, bias) + residual``, differentiable in every tensor but the statistics.

    Equivalent to::

        a = F.relu(F.batch_norm(x, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps))
        F.conv2d(a, weight, bias, stride, padding) + residual

    Between forward and backward it keeps the raw ``x`` and two per-channel vectors; the activation is computed again
    in backward instead of being stored.

    Args:
        x: ``(N, C_in, H, W)``, contiguous or channels_last (kept as given); float16, bfloat16, float32 or float64.
        bn_weight, bn_bias: ``(C_in,)`` or None (1 and 0); usually float32, whatever ``x`` is.
        running_mean, running_var: ``(C_in,)`` or None; in training updated in place, once, also where activation
            checkpointing runs the forward pass twice.
        weight: ``(C_out, C_in, kH, kW)``, dtype of ``x`` (under autocast both are cast).
        bias: ``(C_out,)`` or None.
        stride, padding: of the convolution; one number or ``(height, width)``. Padding comes after the ReLU.
        training, momentum, eps, num_batches_tracked: as in :func:`ran_ext.ops.bn_relu`.
        residual: added to the result: its shape and dtype, or None.

    Returns:
        ``(N, C_out, H_out, W_out)`` in ``x``'s memory format.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it, the rule, and what was given.

    Source: He et al. 2016, arXiv:1603.05027, figure 4(e).

    >>> x = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    >>> w = torch.full((1, 1, 1, 1), 2.0)
    >>> bn_relu_conv2d(x, None, None, None, None, w, training=True, eps=0.0, residual=x).flatten()
    tensor([1., 5.])
    """
    op = "bn_relu_conv2d"
    stride, padding = _pair(op, "stride", stride, 1), _pair(op, "padding", padding, 0)
    check_batch_norm(op, x, bn_weight, bn_bias, running_mean, running_var, training, momentum, num_batches_tracked)
    _check_conv(x, weight, bias, stride, padding, residual)
    if not _backend.use_native(x):
        return bn_relu_conv2d_ref(
            x,
            bn_weight,
            bn_bias,
            running_mean,
            running_var,
            weight,
            bias,
            stride=stride,
            padding=padding,
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            num_batches_tracked=num_batches_tracked,
        )
    mean, var = (None, None) if training or running_mean is None else (running_mean, running_var)
    out, mean, var = torch.ops.ran_ext.bn_relu_conv2d(
        x, bn_weight, bn_bias, mean, var, weight, bias, residual, stride, padding, eps
    )
    if training:
        update_running_stats(x, mean, var, running_mean, running_var, momentum, num_batches_tracked)
    return out


def bn_relu_conv2d_ref(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """:func:`bn_relu_conv2d` in plain PyTorch: the fallback, and what the kernels are held to."""
    a = bn_relu_ref(
        x,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        num_batches_tracked=num_batches_tracked,
    )
    out = F.conv2d(a, weight, bias, stride, padding)
    return out if residual is None else out + residual


def _pair(op: str, name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{op}: {name} must be one number or a pair, each >= {least}, got {value!r}")
    return pair


def _check_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    residual: Tensor | None,
) -> None:
    op = "bn_relu_conv2d"
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: weight must be (C_out, {x.shape[1]}, kH, kW) for x {list(x.shape)}, got {list(weight.shape)} "
            "(grouped convolutions are not part of this op)"
        )
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {tensor.device}")
        if tensor.dtype != x.dtype and not autocast:
            raise TypeError(f"{op}: {name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(
            f"{op}: bias must be [{weight.shape[0]}] for weight {list(weight.shape)}, got {list(bias.shape)}"
        )
    size = [(x.shape[2 + i] + 2 * padding[i] - weight.shape[2 + i]) // stride[i] + 1 for i in (0, 1)]
    if min(size) < 1:
        raise ValueError(
            f"{op}: x {list(x.shape)} with padding {list(padding)} is smaller than the kernel {list(weight.shape[2:])}"
        )
    if residual is not None and list(residual.shape) != [x.shape[0], weight.shape[0], *size]:
        raise ValueError(
            f"{op}: residual must be {[x.shape[0], weight.shape[0], *size]}, the shape of the result, got "
            f"{list(residual.shape)}"
        )
