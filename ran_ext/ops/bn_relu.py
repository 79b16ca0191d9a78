"""``relu(batch_norm(x))`` in one op: pre-activation's first half, and the networks' stem and head."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _backend, _tracing
from .._paths import gpu_paths
from . import _checks as checks

#: What a batch normalisation has for each channel: weight, bias, running_mean, running_var.
Vectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_VECTORS = ("weight", "bias", "running_mean", "running_var")
_CONV_VECTORS = ("bn_weight", "bn_bias", "running_mean", "running_var")


class Settings(TypedDict):
    """The other arguments of a batch normalisation, as :func:`bn_relu` names them."""

    training: bool
    momentum: float | None
    eps: float
    num_batches_tracked: Tensor | None


def vectors_of(bn: Any) -> Vectors:
    """The arguments for each channel of an ``nn.BatchNorm2d``."""
    return bn.weight, bn.bias, bn.running_mean, bn.running_var


def settings_of(bn: Any) -> Settings:
    """The other arguments of an ``nn.BatchNorm2d``."""
    return {
        "training": bn.training,
        "momentum": bn.momentum,
        "eps": bn.eps,
        "num_batches_tracked": bn.num_batches_tracked,
    }


def bn_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """``relu(batch_norm(x))``, differentiable in ``x``, ``weight`` and ``bias``.

    Equivalent to::

        F.relu(F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps))

    and to ``F.relu(bn(x))`` of an ``nn.BatchNorm2d`` where ``num_batches_tracked`` is given too. Backward keeps the raw
    ``x`` and two per-channel vectors.

    Args:
        x: ``(N, C, H, W)``, contiguous or channels_last (kept as given); float16, bfloat16, float32 or float64.
        weight, bias: ``(C,)`` or None (1 and 0).
        running_mean, running_var: ``(C,)`` of one dtype, or None. In training they are updated in place, once, also
            where activation checkpointing runs the forward pass twice; by an empty batch not at all.
        training: normalise with the batch's own statistics (also done where there are no running statistics).
        momentum: weight of the new statistics; None for the cumulative average, which needs ``num_batches_tracked``.
        eps: added to the variance; positive where the batch's own statistics are used, else at least 0.
        num_batches_tracked: int64 scalar, incremented by one in training.

    Returns:
        A tensor of ``x``'s shape, dtype and memory format.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it, the rule, and what was given.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167; He et al. 2016, arXiv:1603.05027.

    >>> x = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    >>> bn_relu(x, None, None, None, None, training=True).flatten()
    tensor([0.0000, 1.0000])
    """
    vectors = weight, bias, running_mean, running_var
    settings: Settings = {
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "num_batches_tracked": num_batches_tracked,
    }
    if not _tracing.is_symbolic(x):
        check_batch_norm("bn_relu", x, vectors, settings)
    if not _backend.use_native(x, *vectors):
        return bn_relu_ref(x, *vectors, **settings)
    mean, var, running = split_statistics(vectors, settings)
    out: Tensor = torch.ops.ran_ext.bn_relu(
        x, weight, bias, mean, var, False, running, settings["momentum"], settings["eps"], gpu_paths(x)
    )[0]
    return out


def bn_relu_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """:func:`bn_relu` in plain PyTorch: the fallback, and what the kernels are held to."""
    factor = 0.0 if momentum is None else momentum
    if training and running_mean is not None:
        if in_backward():  # an activation checkpoint's second forward pass: the statistics have been counted
            factor = 0.0
        elif num_batches_tracked is not None:
            num_batches_tracked.add_(1)
            if momentum is None:
                factor = 1.0 / float(num_batches_tracked)
    batch_stats = training or running_mean is None
    # In channels_last torch's derivative takes these for contiguous, whatever their strides are (2.13, on the CPU).
    weight = None if weight is None else weight.contiguous()
    if running_mean is not None and running_var is not None and not batch_stats:
        running_mean, running_var = running_mean.contiguous(), running_var.contiguous()
    return F.relu(F.batch_norm(x, running_mean, running_var, weight, bias, batch_stats, factor, eps))


def split_statistics(vectors: Vectors, settings: Settings) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Mean and variance to normalise with, or None for the batch's own; and what the batch's are blended into."""
    _, _, running_mean, running_var = vectors
    if running_mean is None or running_var is None:
        return None, None, []
    if not settings["training"]:
        return running_mean, running_var, []
    return None, None, [t for t in (running_mean, running_var, settings["num_batches_tracked"]) if t is not None]


def in_backward() -> bool:
    """Whether autograd's engine is running on this thread: a forward pass then is a checkpoint's second."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def check_batch_norm(op: str, x: Tensor, vectors: Vectors, settings: Settings) -> None:
    """Raise what :func:`bn_relu` documents, in the name of ``op``; makes Python's numbers of those in ``settings``."""
    checks.activation(op, "x", x)
    checks.vectors(op, x, _CONV_VECTORS if op.endswith("conv2d") else _VECTORS, vectors)
    _, _, running_mean, running_var = vectors
    training, momentum, eps = settings["training"], settings["momentum"], settings["eps"]
    num_batches_tracked = settings["num_batches_tracked"]
    if training is not True and training is not False:
        settings["training"] = training = checks.flag(op, "training", training)
    if momentum is not None and type(momentum) is not float:
        settings["momentum"] = momentum = checks.number(op, "momentum", momentum)
    if type(eps) is not float:
        settings["eps"] = eps = checks.number(op, "eps", eps)
    if running_mean is None or running_var is None:
        if running_mean is not running_var:
            raise ValueError(f"{op}: running_mean and running_var must be given both or neither")
    elif running_mean.dtype != running_var.dtype:
        raise TypeError(
            f"{op}: running_var must have running_mean's dtype {running_mean.dtype}, got {running_var.dtype}"
        )
    batch_stats = training or running_mean is None
    if eps < 0 or (eps == 0 and batch_stats):
        raise ValueError(f"{op}: eps must be {'positive' if batch_stats else '>= 0'}, got {eps}")
    if num_batches_tracked is None:
        if training and momentum is None and running_mean is not None:
            raise ValueError(f"{op}: momentum=None (cumulative average) needs num_batches_tracked")
    elif (
        not isinstance(num_batches_tracked, Tensor)
        or num_batches_tracked.dtype != torch.int64
        or num_batches_tracked.layout is not torch.strided
        or num_batches_tracked.numel() != 1
        or num_batches_tracked.device != x.device
    ):
        kind = ValueError if isinstance(num_batches_tracked, Tensor) else TypeError
        raise kind(
            f"{op}: num_batches_tracked must be one int64 on x's device {x.device}, got "
            f"{checks.shown(num_batches_tracked)}"
        )
    if batch_stats:
        n, _, h, w = x.shape
        if n * h * w == 1:
            raise ValueError(f"{op}: expected more than 1 value per channel when training, got x {list(x.shape)}")
