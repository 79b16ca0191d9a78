"""``ran_ext.convert(model)``: the batch normalisations of any network defer their value to the convolution behind."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from . import _backend
from ._deferred import AS_WRITTEN, Deferred, Recipe, identity, is_checkpointed, join, tell
from .ops.bn_relu import in_backward

Network = TypeVar("Network", bound=nn.Module)


class Deferring:
    """Mixed in before the class of a batch normalisation, in place: its output is deferred where that is exact."""

    def forward(self: Any, x: Tensor) -> Tensor:
        base = type(self).__mro__[2]
        if not _defers(self, x):
            tell(self, AS_WRITTEN)
            return base.forward(self, x)  # type: ignore[no-any-return]
        if base is not nn.BatchNorm2d:  # its own forward, in which F.batch_norm is what is deferred
            with _Capture(self):
                return base.forward(self, x)  # type: ignore[no-any-return]
        return _defer_module(self, x)

    def train(self: Any, mode: bool = True) -> Any:
        self.__dict__.pop("_written_out", None)  # asked anew
        return super().train(mode)  # type: ignore[misc]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "_written_out"}
        return _rebuild, (type(self).__mro__[2], state)


def _rebuild(base: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = base.__new__(base)
    module.__setstate__(state)
    module.__class__ = _deferring(base)
    return module


_CLASSES: dict[type, type] = {}


def _deferring(base: type) -> type:
    """The class that a batch normalisation of class ``base`` gets; it has its name."""
    if base not in _CLASSES:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _CLASSES[base] = type(base.__name__, (Deferring, base), names)
    return _CLASSES[base]


def _defers(module: Any, x: Any) -> bool:
    """Whether this call may defer: nothing looks at the module's output, and a plain tensor comes in.

    A batch normalisation whose output was written out as it is the last time gains nothing.
    """
    if type(x) is Deferred:
        return not module._forward_hooks and not module._backward_hooks
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return False
    if module.__dict__.get("_written_out") or module._forward_hooks or module._backward_hooks:
        return False
    if x.dim() != 4 or not x.is_floating_point() or x.numel() == 0 or x.device.type == "meta":
        return False
    return not _is_traced()


def _defer_module(bn: Any, x: Tensor) -> Tensor:
    """``bn(x)`` of an ``nn.BatchNorm2d``."""
    training, mean, var = bn.training, bn.running_mean, bn.running_var
    factor = bn.momentum
    if training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1.0 / float(bn.num_batches_tracked)
    if training and not bn.track_running_stats:
        mean = var = None
    return _defer(x, mean, var, bn.weight, bn.bias, training or mean is None, factor or 0.0, bn.eps, owner=bn)


def _defer(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    owner: nn.Module,
) -> Tensor:
    """``F.batch_norm`` that takes the statistics now and leaves the value for later."""
    if isinstance(x, Deferred):
        pieces = x.take_pieces()
    else:
        pieces = (x,)
    if training and x.numel() == x.shape[1]:  # torch has the error's text
        return F.batch_norm(torch.cat(pieces, 1), running_mean, running_var, weight, bias, training, momentum, eps)
    if training or running_mean is None or running_var is None:
        mean, var = _statistics(pieces, running_mean, running_var, momentum)
    else:
        mean, var = running_mean, running_var
    return Deferred.defer(Recipe(pieces, weight, bias, mean, var, training, eps), identity, owner)


@torch.no_grad()
def _statistics(
    pieces: tuple[Tensor, ...], running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel; the running ones are blended as torch does it."""
    x = pieces[0].detach()
    if running_mean is None or running_var is None:
        return _batch_statistics(pieces)
    # In an activation checkpoint's second pass the op would not count the batch again, and torch does.
    if len(pieces) == 1 and _backend.use_native(x) and not in_backward():
        mean, var = torch.ops.ran_ext.batch_norm_stats(x, [running_mean, running_var], momentum)
        return mean, var
    mean, var = _batch_statistics(pieces)
    count = x.numel() // x.shape[1]
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return mean, var


def _batch_statistics(pieces: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Those of the pieces side by side; a piece that many normalisations take keeps its own."""
    found = []
    for piece in pieces:
        version, *statistics = piece.__dict__.get("_statistics", (-1,))
        if version != piece._version:
            x = piece.detach()
            if _backend.use_native(x):
                statistics = list(torch.ops.ran_ext.batch_norm_stats(x, [], None))
            else:
                wide = torch.promote_types(x.dtype, torch.float32)
                var, mean = torch.var_mean(x.to(wide), (0, 2, 3), correction=0)
                statistics = [mean, var]
            if len(pieces) > 1:
                piece.__dict__["_statistics"] = (piece._version, *statistics)
        found.append(statistics)
    if len(found) == 1:
        return found[0][0], found[0][1]
    return torch.cat([mean for mean, _ in found]), torch.cat([var for _, var in found])


class _Capture(TorchFunctionMode):
    """Inside the forward pass of ``owner``, ``F.batch_norm`` defers."""

    def __init__(self, owner: nn.Module):
        self.owner = owner
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return _defer(*args, **(kwargs or {}), owner=self.owner)
        return func(*args, **(kwargs or {}))


class _Joins(TorchFunctionMode):
    """Inside a network's forward pass, ``torch.cat`` along the channels keeps its pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.made = self.taken = 0

    def _take(self) -> None:
        self.taken += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CAT and torch.is_grad_enabled() and not is_checkpointed():
            found = join(self._take, *args, **(kwargs or {}))
            if found is not None:
                self.made += 1
                return found
        return func(*args, **(kwargs or {}))


_CAT = (torch.cat, torch.concat, torch.concatenate)
#: By thread: the networks whose forward pass runs, each with its mode, if any.
_RUNNING = threading.local()


def _enter(module: nn.Module, args: Any) -> None:
    """Before the forward pass of a converted network."""
    running = _RUNNING.__dict__.setdefault("modes", [])
    mode = None
    # A network in whose first step no join was taken is not looked through again: a mode costs time at every function.
    if torch.is_grad_enabled() and module.__dict__.get("_joins", True) and not _is_traced():
        mode = _Joins()
        mode.__enter__()
    running.append(mode)


def _leave(module: nn.Module, args: Any, out: Any) -> Any:
    """After it: what leaves the network is written out."""
    mode = _RUNNING.modes.pop()
    if mode is not None:
        mode.__exit__(None, None, None)
        module.__dict__["_joins"] = mode.taken > 0
    return tree_map(lambda value: value.materialise() if isinstance(value, Deferred) else value, out)


def _is_traced() -> bool:
    """Whether something looks into the functions that are called, so that each must be torch's own."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def convert(model: Network, channels_last: bool = True) -> Network:
    """Make ``model`` use the fused kernels, in place, whoever wrote it.

    Its modules, parameters, buffers, hooks and state_dict stay what and where they are.

    Args:
        model: any network; what is found in it are ``nn.BatchNorm2d`` and classes made of it.
        channels_last: also put the weights into that memory format, which the kernels want; inputs of either format
            are taken.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is scripted or compiled: convert the network that was, then script or compile it.

    >>> model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    >>> x = torch.randn(2, 8, 4, 4)
    >>> expected = model.eval()(x)
    >>> bool((convert(model)(x) - expected).abs().max() < 1e-5)
    True
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"ran_ext.convert: model must be an nn.Module that is not scripted, got {type(model).__name__}; convert "
            "the network first, then script it"
        )
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise TypeError("ran_ext.convert: model is compiled; convert the network first, then compile it")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and not isinstance(m, torch.jit.ScriptModule)]
    if not norms:
        warnings.warn(
            "ran_ext.convert: found no nn.BatchNorm2d in the network; it is left as it is", UserWarning, stacklevel=2
        )
        return model
    for module in norms:
        if not isinstance(module, Deferring):
            module.__class__ = _deferring(type(module))
    if _leave not in model._forward_hooks.values():
        model.register_forward_pre_hook(_enter)
        model.register_forward_hook(_leave, always_call=True)
    return model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload]


def revert(model: Network) -> Network:
    """Undo :func:`convert`, but for the weights' memory format; the network itself is returned.

    >>> type(revert(convert(nn.Sequential(nn.BatchNorm2d(8))))[0]) is nn.BatchNorm2d
    True
    """
    for module in model.modules():
        if isinstance(module, Deferring):
            module.__dict__.pop("_written_out", None)
            module.__class__ = type(module).__mro__[2]
        module.__dict__.pop("_joins", None)
        for hooks, mine in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
            for key in [key for key, hook in hooks.items() if hook is mine]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
    return model


@contextmanager
def fused(model: Network, channels_last: bool = True) -> Iterator[Network]:
    """:func:`convert` for the time of a ``with`` block."""
    convert(model, channels_last)
    try:
        yield model
    finally:
        revert(model)
