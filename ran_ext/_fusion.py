"""What may run as one op: modules whose call does nothing but what is known here.

A fused op reads the parameters of ``bn`` and ``conv`` without calling the two. It would skip whatever acts through
a module's call: hooks (pruning, weight and spectral norm, offloading, FLOP counters), another class's ``forward``
(adapters, quantisation), a ``forward`` put on the object, sharded parameters. Where there is
any of these, or anything unknown, the modules are called one after the other, as in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

# From their own modules, because quantisation toolkits replace the names in torch.nn.
from torch.nn.modules.batchnorm import BatchNorm2d, SyncBatchNorm
from torch.nn.modules.conv import Conv2d
from torch.nn.modules.module import _has_any_global_hook

from . import _tracing, ops
from .ops.sync import sync_bn_relu, sync_bn_relu_conv2d

#: Classes that are known, each with the forward that it is known by.
Kinds = Mapping[Any, Callable[..., Any]]
NORMS: Kinds = {BatchNorm2d: BatchNorm2d.forward, SyncBatchNorm: SyncBatchNorm.forward}
CONVS: Kinds = {Conv2d: Conv2d.forward}
PLAIN = (nn.Parameter, Tensor)
OPTIONAL = (*PLAIN, type(None))


def bn_relu(bn: Any, x: Tensor) -> Tensor:
    """``relu(bn(x))`` in one op where ``bn`` is known, else as written."""
    if why_unfused(bn) or why_watched(x):
        return F.relu(bn(x))
    if isinstance(bn, SyncBatchNorm) and _synchronises(bn):
        return sync_bn_relu(x, bn)
    return ops.bn_relu(  # name by name, here and below: to unpack bundles takes 1.2 us more, a twentieth of the call
        x,
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        training=bn.training,
        momentum=bn.momentum,
        eps=bn.eps,
        num_batches_tracked=bn.num_batches_tracked,
    )


def bn_relu_conv2d(bn: Any, conv: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``conv(relu(bn(x))) + residual`` in one op where ``bn`` and ``conv`` are known, else as written."""
    if why_unfused(bn, conv) or why_watched(x) or (residual is not None and type(residual) not in PLAIN):
        out: Tensor = conv(F.relu(bn(x)))
        return out if residual is None else _tracing.plus(out, residual)
    if isinstance(bn, SyncBatchNorm) and _synchronises(bn):
        return sync_bn_relu_conv2d(x, bn, conv, residual)
    return ops.bn_relu_conv2d(
        x,
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        conv.weight,
        conv.bias,
        stride=conv.stride,
        padding=conv.padding,
        training=bn.training,
        momentum=bn.momentum,
        eps=bn.eps,
        residual=residual,
        num_batches_tracked=bn.num_batches_tracked,
    )


def conv2d(conv: Any, x: Tensor) -> Tensor:
    """``conv(x)``, by the fast kernels where ``conv`` is known."""
    if why_conv("conv", conv) or why_watched(x):
        out: Tensor = conv(x)
        return out
    return ops.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)


def chains(bn: Any, conv: Any) -> bool:
    """Whether ``bn`` can take its statistics from the op before, or ``conv`` give them to the op behind."""
    return type(bn) is BatchNorm2d and bn.training and type(conv) is Conv2d and not why_unfused(bn, conv)


def why_unfused(bn: Any, conv: Any = None) -> str:
    """What keeps ``conv(relu(bn(x)))``, or ``relu(bn(x))``, from being one op; "" where nothing does."""
    return why_called("bn", bn, NORMS) or why_norm(bn) or ("" if conv is None else why_conv("conv", conv))


def why_called(name: str, module: nn.Module, kinds: Kinds) -> str:
    """What else a call of ``module`` does; "" where it runs a forward of ``kinds`` and nothing else."""
    kind, own = type(module), module.__dict__  # a lookup through nn.Module takes many times as long
    if kinds.get(kind) is not kind.forward and (why := _why_other_kind(name, module, kinds)):
        return why
    if own["_forward_pre_hooks"]:
        return f"a forward pre-hook on {name}"
    if own["_forward_hooks"]:
        return f"a forward hook on {name}"
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return f"a backward hook on {name}"
    if "forward" in own or "_conv_forward" in own:
        return f"forward was replaced on {name}"
    if "_compiled_call_impl" in own:
        return f"{name} was compiled by itself"
    if "weight" in own or "bias" in own:
        return f"weight or bias of {name} is not a parameter of its own"
    for tensor in own["_parameters"].values():
        if type(tensor) not in OPTIONAL:
            return f"{name} has a {type(tensor).__name__} for a parameter"
    return ""


def why_conv(name: str, conv: Any) -> str:
    """What keeps ``conv`` from being part of an op; "" where nothing does."""
    if why := why_called(name, conv, CONVS):
        return why
    own = conv.__dict__
    if own["groups"] != 1 or own["dilation"] != (1, 1) or own["padding_mode"] != "zeros":
        return f"{name} has groups={own['groups']}, dilation={own['dilation']}, padding_mode={own['padding_mode']!r}"
    if type(own["stride"]) is not tuple or type(own["padding"]) is not tuple:
        return f"{name} has stride={own['stride']!r}, padding={own['padding']!r}, which are no pairs of numbers"
    return ""


def why_watched(x: Any) -> str:
    """What looks into every op on ``x``, or every module, so that all must be PyTorch's own; "" where nothing does."""
    if why := _tracing.why_watched(x):
        return why
    if x.is_meta:
        return "x is on the meta device"
    return "a hook on all modules" if _has_any_global_hook() else ""


def _why_other_kind(name: str, module: nn.Module, kinds: Kinds) -> str:
    kind: Any = type(module)
    if kind in kinds:
        return f"forward of {kind.__name__} was replaced"
    # The subclass that torch makes for one module, to work a parameter out where it is read.
    if "parametrizations" in module._modules and kinds.get(kind.__base__) is kind.forward:
        return next(
            (f"{name} has a {type(p).__name__} for a parameter" for p in module.parameters() if type(p) not in PLAIN),
            "",
        )
    return f"{name} is a {kind.__name__}, not exactly a {' or '.join(k.__name__ for k in kinds)}"


def why_norm(bn: Any) -> str:
    """What keeps the running statistics of ``bn`` from being known; "" where nothing does."""
    own = bn.__dict__
    kept, tracks = own["_buffers"], own["track_running_stats"]
    mean, var = kept.get("running_mean"), kept.get("running_var")
    if (mean is not None) is not tracks or (var is not None) is not tracks:
        return "running statistics and track_running_stats of bn do not agree"
    if type(mean) not in OPTIONAL or type(var) not in OPTIONAL:
        return f"running statistics of bn are a {type(mean).__name__} and a {type(var).__name__}"
    if own["momentum"] is None and tracks and kept.get("num_batches_tracked") is None:
        return "bn averages over all batches but does not count them"
    return ""


def _synchronises(bn: SyncBatchNorm) -> bool:
    return bn.training and dist.is_available() and dist.is_initialized()
