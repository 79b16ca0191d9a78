"""The classes that converted modules get: batch normalisations that defer their value, and fast 3x3 convolutions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import _backend, _compiled, _fusion, _tracing  # _taken: what torch's functions do with a Deferred
from ._deferred import AS_WRITTEN, Deferred, is_watched, tell
from ._paths import paths
from ._recipe import Recipe, counts_writes, identity, version
from .ops._convolution import has_fault
from .ops.bn_relu import in_backward
from .ops.conv2d import conv2d, has_fast_3x3


class Converted:
    """Mixed in, in place, before the class of a module: the new class has the old one's name."""

    #: The class that the module had.
    base: ClassVar[Any]
    #: What the module learned while it was converted.
    learned: ClassVar[tuple[str, ...]] = ()

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name not in self.learned}
        return _rebuild, (_mixin_of(type(self)), self.base, state)


def convert_class(module: nn.Module, mixin: type[Converted]) -> None:
    """Give ``module`` the class that ``mixin`` makes of its own."""
    module.__class__ = _made(mixin, type(module))


def revert_class(module: nn.Module) -> None:
    """Undo :func:`convert_class`; a class that torch made of the new one, as for a parametrisation, is kept."""
    kind: Any = type(module)
    for name in kind.learned:
        module.__dict__.pop(name, None)
    if kind in _CLASSES.values():
        module.__class__ = kind.base
    else:
        kind.__bases__ = tuple(one.base if one in _CLASSES.values() else one for one in kind.__bases__)


_CLASSES: dict[tuple[type, type], type] = {}


def _made(mixin: type[Converted], base: type) -> type:
    if (mixin, base) not in _CLASSES:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _CLASSES[mixin, base] = type(base.__name__, (mixin, base), {**names, "base": base})
    return _CLASSES[mixin, base]


def _mixin_of(kind: type) -> type[Converted]:
    return Deferring if issubclass(kind, Deferring) else Convolving


def _rebuild(mixin: type[Converted], base: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = base.__new__(base)
    module.__setstate__(state)
    convert_class(module, mixin)
    return module


class Convolving(Converted):
    """An ``nn.Conv2d`` that takes :func:`ran_ext.ops.conv2d` on the CPU."""

    def _conv_forward(self: Any, x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _tracing.why_watched(x, weight, bias) or not (x.is_cpu and self._fits(x, weight)):
            return self.base._conv_forward(self, x, weight, bias)  # type: ignore[no-any-return]
        if weight.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        return conv2d(x, weight, bias, self.stride, self.padding)

    def _fits(self: Any, x: Tensor, weight: Tensor) -> bool:
        """Whether there is nothing in the call that torch would refuse, or that the kernels do not have."""
        if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] or 0 in x.shape:
            return False
        return is_served(self) and (x.dtype == weight.dtype or _backend.autocasts(x))


def is_served(conv: Any) -> bool:
    """Whether :func:`ran_ext.ops.conv2d` has what torch has not: fast kernels, or a way around a fault of oneDNN."""
    shape = conv.out_channels, conv.in_channels, *conv.kernel_size
    if conv.padding_mode != "zeros":
        return False
    fast = has_fast_3x3(shape, conv.stride, conv.padding, conv.dilation, conv.groups)
    return fast or (conv.groups == 1 and has_fault(shape, conv.stride, conv.padding))


class Deferring(Converted):
    """A batch normalisation whose output is deferred where that is exact."""

    learned = ("_written_out",)

    def forward(self: Any, x: Any) -> Tensor:
        if torch.compiler.is_compiling():  # the pass fuses it, by what is chosen now: Dynamo guards on both choices
            if _backend.get_backend() != "reference" and paths(x) >= 0:
                _fuse_in_graphs()
            return self.base.forward(self, x)  # type: ignore[no-any-return]
        native = type(x) in _fusion.PLAIN and _backend.use_native(x)
        own = self.__dict__  # through nn.Module's attributes it would take many times as long
        if own["_forward_hooks"] or own["_backward_hooks"] or not _defers(self, x, native):
            if is_watched():
                tell(self, f"{AS_WRITTEN}: {_why_as_written(self, x)}")
            return self.base.forward(self, x)  # type: ignore[no-any-return]
        if self.base is not nn.BatchNorm2d:  # its own forward, in which F.batch_norm is what is deferred
            with _Capture(self):
                return self.base.forward(self, x)  # type: ignore[no-any-return]
        training, parameters, buffers = self.training, own["_parameters"], own["_buffers"]
        mean, var, batches = buffers["running_mean"], buffers["running_var"], None
        if training:
            batches = buffers["num_batches_tracked"]
            if not self.track_running_stats:
                mean = var = batches = None
        weight, bias = parameters["weight"], parameters["bias"]
        return _defer(
            x, mean, var, weight, bias, training or mean is None, self.momentum, self.eps,
            owner=self, batches=batches, native=native or None,
        )  # fmt: skip

    def train(self: Any, mode: bool = True) -> Any:
        self.__dict__.pop("_written_out", None)  # asked anew
        return super().train(mode)  # type: ignore[misc]


def defers(kind: type) -> bool:
    """Whether modules of a class are converted batch normalisations."""
    return issubclass(kind, Deferring)


def _fuse_in_graphs() -> None:
    """Have the normalisations of converted networks fused in the graph that is being traced."""
    _compiled.install(defers)


_fuse_in_graphs._dynamo_marked_constant = True  # type: ignore[attr-defined]  # called while tracing, not traced


def _defers(bn: Any, x: Any, native: bool) -> bool:
    """Whether nothing looks at what the module does, and a plain tensor comes in.

    A batch normalisation whose output was written out as it is the last time gains nothing.
    """
    if type(x) is not Deferred:
        if type(x) not in _fusion.PLAIN or bn.__dict__.get("_written_out"):
            return False
        if x.dim() != 4 or not x.is_floating_point() or x.numel() == 0 or x.is_meta:
            return False
        if not native and _tracing.why_watched(x):
            return False
        if not _counted(bn, x):
            return False
    return not _fusion.why_norm(bn)


def _counted(bn: Any, x: Tensor) -> bool:
    """Whether a write to what the value depends on would be noticed before the value is used."""
    own = bn.__dict__
    return counts_writes(x, *own["_parameters"].values(), *own["_buffers"].values())


def _why_as_written(bn: Any, x: Any) -> str:
    """Why it does not defer, for people."""
    if bn._forward_hooks or bn._backward_hooks:
        return "a hook on the module looks at its output"
    if why := _fusion.why_norm(bn) or _tracing.why_watched(x):
        return why
    if bn.__dict__.get("_written_out"):
        return "neither an activation nor a convolution takes its value"
    if not _counted(bn, x):
        return "of a tensor made in inference mode torch does not say whether it was written to meanwhile"
    return f"there is nothing to gain of x {list(x.shape)} {x.dtype} on {x.device}"


def _defer(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    owner: nn.Module,
    batches: Tensor | None = None,
    native: bool | None = None,
) -> Tensor:
    """``F.batch_norm`` that takes the statistics now and leaves the value for later; ``batches`` counts them."""
    pieces = x.take_pieces() if isinstance(x, Deferred) else (x,)
    first = pieces[0]
    too_few = training and first.numel() == first.shape[1]
    if too_few or not all(t is None or type(t) in _fusion.PLAIN for t in (weight, bias, running_mean, running_var)):
        x = first if len(pieces) == 1 else torch.cat(pieces, 1)
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, _factor(momentum, batches), eps)
    native = _backend.use_native(first) if native is None else native
    if not training and running_mean is not None and running_var is not None:
        mean, var = running_mean, running_var
    # In an activation checkpoint's second pass the op would not count the batch again, and torch does.
    elif native and len(pieces) == 1 and running_mean is not None and not in_backward():
        running = [running_mean, running_var] if batches is None else [running_mean, running_var, batches]
        with torch.no_grad():
            mean, var = torch.ops.ran_ext.batch_norm_stats(first, running, momentum)
    else:
        mean, var = _statistics(pieces, running_mean, running_var, _factor(momentum, batches), native)
    return Deferred.defer(Recipe(pieces, weight, bias, mean, var, training, eps, native), identity, owner)


def _factor(momentum: float | None, batches: Tensor | None) -> float:
    """The weight of the new statistics; counts the batch."""
    if batches is not None:
        batches.add_(1)
        return 1.0 / float(batches) if momentum is None else momentum
    return momentum or 0.0


@torch.no_grad()
def _statistics(
    pieces: tuple[Tensor, ...],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    native: bool,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel; the running ones are blended as torch does it."""
    mean, var = _batch_statistics(pieces, native)
    if running_mean is not None and running_var is not None:
        count = pieces[0].numel() // pieces[0].shape[1]
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return mean, var


def _batch_statistics(pieces: tuple[Tensor, ...], native: bool) -> tuple[Tensor, Tensor]:
    """Those of the pieces side by side; a piece that many normalisations take keeps its own."""
    found = []
    for piece in pieces:
        at, *statistics = piece.__dict__.get("_statistics", (None,))
        if at is None or at != version(piece):
            x = piece.detach()
            if native:
                statistics = list(torch.ops.ran_ext.batch_norm_stats(x, [], None))
            else:
                wide = torch.promote_types(x.dtype, torch.float32)
                var, mean = torch.var_mean(x.to(wide), (0, 2, 3), correction=0)
                statistics = [mean, var]
            if len(pieces) > 1:
                piece.__dict__["_statistics"] = (version(piece), *statistics)
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


_tracing.PASSIVE.add(_Capture)
