"""``conv2d(relu(batch_norm(x))) + residual`` in one op: a pre-activation convolution (He et al. 2016)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import _backend, _paths, _tracing
from . import _checks as checks
from ._convolution import conv2d
from .bn_relu import Settings, bn_relu_ref, check_batch_norm, settings_of, split_statistics, vectors_of


class BatchStatistics(NamedTuple):
    """Mean and biased variance of each channel over one batch, ``(C,)`` each, float32 (float64 of float64)."""

    mean: Tensor
    var: Tensor


class Chained(NamedTuple):
    """What :func:`chained_bn_relu_conv2d` returns."""

    out: Tensor
    statistics: BatchStatistics | None
    identity: Tensor


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
    >>> bn_relu_conv2d(x, None, None, None, None, w, training=True, residual=x).flatten()
    tensor([1.0000, 5.0000])
    """
    op = "bn_relu_conv2d"
    stride, padding = checks.pair(op, "stride", stride, 1), checks.pair(op, "padding", padding, 0)
    vectors = bn_weight, bn_bias, running_mean, running_var
    settings: Settings = {
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "num_batches_tracked": num_batches_tracked,
    }
    if not _tracing.is_symbolic(x):
        check_batch_norm(op, x, vectors, settings)
        _check_conv(x, weight, bias, stride, padding, residual)
    if not _backend.use_native(x, *vectors, weight, bias, residual):
        return bn_relu_conv2d_ref(
            x, *vectors, weight, bias, stride=stride, padding=padding, residual=residual, **settings
        )
    mean, var, running = split_statistics(vectors, settings)
    out: Tensor = torch.ops.ran_ext.bn_relu_conv2d(
        x,
        weight,
        bias,
        running=running,
        bn_weight=bn_weight,
        bn_bias=bn_bias,
        mean=mean,
        var=var,
        momentum=settings["momentum"],
        eps=settings["eps"],
        residual=residual,
        stride=stride,
        padding=padding,
        paths=_paths.paths(x),
    )[0]
    return out


def chained_bn_relu_conv2d(
    x: Tensor,
    bn: nn.BatchNorm2d,
    conv: nn.Conv2d,
    residual: Tensor | None = None,
    statistics: BatchStatistics | None = None,
    next_bn: nn.BatchNorm2d | None = None,
) -> Chained:
    """:func:`bn_relu_conv2d` of two modules in training, which takes and gives what lies between it and its neighbours.

    A convolution has every output value at hand when it writes it; with ``next_bn`` it also takes the statistics that
    the next batch normalisation will need, so that no pass over the tensor is left for them. And where ``x`` is used
    elsewhere too, as by a residual unit's shortcut, ``identity`` in its place saves the pass that adds the two
    gradients: they meet where this op's backward writes that of ``x``.

    Args:
        x: ``(N, C_in, H, W)``.
        bn, conv: the parameters; ``bn`` in training mode, ``conv`` neither grouped nor dilated.
        residual: added to the result, or None.
        statistics: those of ``x``, as a call with ``next_bn=bn`` gave them; ``bn``'s running statistics are up to date
            then. None: taken here.
        next_bn: normalises the result next, in training mode; its running statistics are updated here. None: no
            statistics are taken.

    Returns:
        The result; its statistics, or None (without ``next_bn``, and where plain PyTorch runs); and ``x`` again.

    Raises:
        TypeError, ValueError: an argument does not fit, as in :func:`bn_relu_conv2d`.

    >>> first, second = (nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)), (nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
    >>> h = chained_bn_relu_conv2d(torch.randn(2, 8, 4, 4), *first, next_bn=second[0])
    >>> chained_bn_relu_conv2d(h.out, *second, h.identity, statistics=h.statistics).out.shape
    torch.Size([2, 8, 4, 4])
    """
    op = "bn_relu_conv2d"
    vectors, settings = vectors_of(bn), settings_of(bn)
    settings["training"] = True
    if statistics:
        vectors = *vectors[:2], None, None
    stride, padding = conv.stride, conv.padding
    if not _tracing.is_symbolic(x):
        check_batch_norm(op, x, vectors, settings)
        _check_conv(x, conv.weight, conv.bias, stride, padding, residual)  # type: ignore[arg-type]
    if not _backend.use_native(x, *vectors, conv.weight, conv.bias, residual):
        out = bn_relu_conv2d_ref(
            x,
            *vectors,
            conv.weight,
            conv.bias,
            stride=stride,  # type: ignore[arg-type]
            padding=padding,  # type: ignore[arg-type]
            residual=residual,
            **settings,
        )
        return Chained(out, None, x)
    mean, var = statistics or (None, None)
    running, next_running = split_statistics(vectors, settings)[2], []
    if next_bn:
        next_running = split_statistics(vectors_of(next_bn), {**settings_of(next_bn), "training": True})[2]
    norm = (bn.weight, bn.bias, mean, var, True, running, settings["momentum"], settings["eps"])
    of_next = (next_bn is not None, next_running, next_bn.momentum if next_bn else None)
    # An output that is the input is autograd's alone: a traced graph could not say so.
    fork = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    out, _, _, next_mean, next_var, identity = torch.ops.ran_ext._chained_bn_relu_conv2d(
        x, *norm, conv.weight, conv.bias, residual, stride, padding, *of_next, fork, _paths.paths(x)
    )
    return Chained(out, BatchStatistics(next_mean, next_var) if next_bn else None, identity if fork else x)


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
    settings: Settings = {
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "num_batches_tracked": num_batches_tracked,
    }
    a = bn_relu_ref(x, bn_weight, bn_bias, running_mean, running_var, **settings)
    out = conv2d(a, weight, bias, stride, padding)
    return out if residual is None else out + residual


def _check_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    residual: Tensor | None,
) -> None:
    op = "bn_relu_conv2d"
    checks.operand(op, "weight", weight, x)
    if bias is not None:
        checks.operand(op, "bias", bias, x)
    if residual is not None:
        checks.operand(op, "residual", residual, x)
    n, c_in, height, width = x.shape
    if weight.dim() != 4 or weight.shape[1] != c_in or 0 in weight.shape:
        raise ValueError(
            f"{op}: weight must be (C_out, {c_in}, kH, kW) for x {list(x.shape)}, none of them 0, got "
            f"{list(weight.shape)} (grouped convolutions are not part of this op)"
        )
    c_out, _, k_height, k_width = weight.shape
    if bias is not None and bias.shape != (c_out,):
        raise ValueError(f"{op}: bias must be [{c_out}] for weight {list(weight.shape)}, got {list(bias.shape)}")
    over = height + 2 * padding[0] - k_height, width + 2 * padding[1] - k_width
    if over[0] < 0 or over[1] < 0 or height == 0 or width == 0:
        raise ValueError(
            f"{op}: x {list(x.shape)} with padding {list(padding)} is smaller than the kernel {[k_height, k_width]}"
        )
    if residual is not None:
        expected = [n, c_out, over[0] // stride[0] + 1, over[1] // stride[1] + 1]
        if list(residual.shape) != expected:
            raise ValueError(
                f"{op}: residual must be {expected}, the shape of the result with stride {list(stride)} and padding "
                f"{list(padding)}, got {list(residual.shape)}"
            )
