"""Batch normalisation over all processes of a group, through the fused ops (``nn.SyncBatchNorm`` keeps the fusion).

Forward merges every process's (count, mean, M2) by Chan's formula; backward adds up the two sums that batch
normalisation's gradient needs. Source: Chan, Golub and LeVeque 1979; Ioffe and Szegedy 2015.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import _backend
from ._convolution import bounded, conv2d, is_faulty
from .bn_relu import check_batch_norm, in_backward, settings_of, vectors_of


def sync_bn_relu(x: Tensor, bn: nn.SyncBatchNorm) -> Tensor:
    """``relu(bn(x))`` with the statistics of all processes; ``bn`` is in training mode and its group is set up.

    Args:
        x: this process's ``(N, C, H, W)``; N may differ between processes, and be 0.
        bn: holds the parameters, the running statistics (updated in place) and the process group.

    Raises:
        TypeError, ValueError: an argument does not fit, as in :func:`ran_ext.ops.bn_relu`.
    """
    mean, var, count = _merged_stats("sync_bn_relu", x, bn)
    return _SyncBNReLU.apply(x, bn.weight, bn.bias, mean, var, count, bn.eps, bn.process_group)


def sync_bn_relu_conv2d(x: Tensor, bn: nn.SyncBatchNorm, conv: nn.Conv2d, residual: Tensor | None) -> Tensor:
    """``conv(relu(bn(x))) + residual`` with the statistics of all processes; see :func:`sync_bn_relu`.

    Raises:
        TypeError, ValueError: an argument does not fit, as in :func:`ran_ext.ops.bn_relu_conv2d`.
    """
    device = x.device.type
    weight, bias = conv.weight, conv.bias
    if _backend.autocasts(x):
        lower = torch.get_autocast_dtype(device)
        weight, bias = weight.to(lower), None if bias is None else bias.to(lower)
    padding: Any = conv.padding
    stride = bounded(conv.stride, x, weight, padding)  # type: ignore[arg-type]
    if is_faulty(x, weight, stride, padding):
        out = conv2d(sync_bn_relu(x, bn).to(weight.dtype), weight, bias, stride, padding)
        return out if residual is None else out + residual
    mean, var, count = _merged_stats("sync_bn_relu_conv2d", x, bn)
    out = _SyncBNReLUConv.apply(
        x, bn.weight, bn.bias, mean, var, count, bn.eps, bn.process_group, weight, bias, stride, padding
    )
    return out if residual is None else out + residual


def _merged_stats(op: str, x: Tensor, bn: nn.SyncBatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count of each channel over all processes; the running statistics are updated."""
    check_batch_norm(op, x, vectors_of(bn), {**settings_of(bn), "training": False})
    with torch.no_grad():
        count = x.numel() // max(1, x.shape[1])
        mean, var = _stats(x)
        mine = torch.cat([mean, var * count, mean.new_full((1,), count)]).double()
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(bn.process_group))]
        dist.all_gather(every, mine, group=bn.process_group)
        means, m2s, counts = torch.stack(every).split([len(mean), len(mean), 1], dim=1)
        total = counts.sum()
        merged = (means * counts).sum(0) / total
        m2 = m2s.sum(0) + (counts * (means - merged).square()).sum(0)
        if count < 2 and total.item() < 2:  # asked only where it can be: reading `total` would wait for a GPU
            raise ValueError(f"{op}: expected more than 1 value per channel over all processes, got {total.item():.0f}")
        _update_running_stats(bn, merged, m2 / (total - 1))
        return merged.to(mean.dtype), (m2 / total).to(mean.dtype), total


def _update_running_stats(bn: nn.SyncBatchNorm, mean: Tensor, unbiased_var: Tensor) -> None:
    if bn.running_mean is None or bn.running_var is None or in_backward():
        return
    assert bn.num_batches_tracked is not None
    bn.num_batches_tracked.add_(1)
    factor = 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    for running, new in ((bn.running_mean, mean), (bn.running_var, unbiased_var)):
        running.lerp_(new.to(running.dtype), factor)


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _stats(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return x.new_zeros(x.shape[1], dtype=_acc(x)), x.new_zeros(x.shape[1], dtype=_acc(x))
    if _backend.use_native(x):
        mean, var = torch.ops.ran_ext.batch_norm_stats(x, [], None)
        return mean, var
    var, mean = torch.var_mean(x.to(_acc(x)), (0, 2, 3), correction=0)
    return mean, var


def _apply(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    if _backend.use_native(x):
        out: Tensor = torch.ops.ran_ext.bn_relu(x, weight, bias, mean, var, True, [], None, eps)[0]
        return out
    return F.relu(F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps))


def _reduce(
    dout: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Sums over each channel of dz (dout where the ReLU let through) and of dz * xhat."""
    if _backend.use_native(x):
        sum_dz, sum_dz_xhat = torch.ops.ran_ext.bn_relu_backward_reduce(dout, x, weight, bias, mean, var, eps)
        return sum_dz, sum_dz_xhat
    dz = torch.where(_apply(x, weight, bias, mean, var, eps) > 0, dout, 0).to(_acc(x))
    xhat = F.batch_norm(x.to(_acc(x)), mean, var, None, None, False, 0.0, eps)
    return dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3))


def _dx(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    mean_dz: Tensor,
    mean_dz_xhat: Tensor,
) -> Tensor:
    if _backend.use_native(x):
        dx: Tensor = torch.ops.ran_ext.bn_relu_backward_apply(
            dout, x, weight, bias, mean, var, eps, mean_dz, mean_dz_xhat, 1.0
        )
        return dx
    dz = torch.where(_apply(x, weight, bias, mean, var, eps) > 0, dout, 0).to(_acc(x))
    xhat = F.batch_norm(x.to(_acc(x)), mean, var, None, None, False, 0.0, eps)
    mean_dz, mean_dz_xhat = mean_dz.view(1, -1, 1, 1), mean_dz_xhat.view(1, -1, 1, 1)
    scale = torch.rsqrt(var + eps) * (1 if weight is None else weight)
    return (scale.view(1, -1, 1, 1) * (dz - mean_dz - xhat * mean_dz_xhat)).to(x.dtype)


def _backward(
    dout: Tensor,
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The input's gradient, with the sums of all processes; the parameters' are this process's own, as DDP expects."""
    sum_dz, sum_dz_xhat = _reduce(dout, x, weight, bias, mean, var, ctx.eps)
    joint = torch.cat([sum_dz, sum_dz_xhat])
    dist.all_reduce(joint, group=ctx.group)
    mean_dz, mean_dz_xhat = (joint / count).to(joint.dtype).chunk(2)
    dx = _dx(dout, x, weight, bias, mean, var, ctx.eps, mean_dz, mean_dz_xhat)
    dweight = None if weight is None else sum_dz_xhat.to(weight.dtype)
    return dx, dweight, None if bias is None else sum_dz.to(bias.dtype)


class _SyncBNReLU(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mean, var, count)
        ctx.eps, ctx.group = eps, group
        return _apply(x, weight, bias, mean, var, eps)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, mean, var, count = ctx.saved_tensors
        return *_backward(dout, ctx, x, weight, bias, mean, var, count), None, None, None, None, None


class _SyncBNReLUConv(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, bn_weight, bn_bias, mean, var, count, weight)
        ctx.eps, ctx.group, ctx.stride, ctx.padding = eps, group, stride, padding
        return F.conv2d(_apply(x, bn_weight, bn_bias, mean, var, eps).to(weight.dtype), weight, bias, stride, padding)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, bn_weight, bn_bias, mean, var, count, weight = ctx.saved_tensors
        a = _apply(x, bn_weight, bn_bias, mean, var, ctx.eps).to(weight.dtype)
        needs = ctx.needs_input_grad
        da, dweight, dbias = torch.ops.aten.convolution_backward(
            dout,
            a,
            weight,
            [weight.shape[0]],
            ctx.stride,
            ctx.padding,
            [1, 1],
            False,
            [0, 0],
            1,
            [True, needs[8], needs[9]],
        )
        grads = _backward(da.to(x.dtype), ctx, x, bn_weight, bn_bias, mean, var, count)
        return *grads, None, None, None, None, None, dweight, dbias, None, None
