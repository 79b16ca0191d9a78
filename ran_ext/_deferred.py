"""A batch normalisation whose value is not written yet.

A converted batch normalisation takes its statistics at once and returns a :class:`Deferred`. An activation leaves it
deferred, and a convolution takes it in: one op that keeps the raw input alone. Whatever else uses the tensor gets its
value, written out on the spot, so that no program can tell the difference but by time and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _backend
from .ops.bn_relu import in_backward

Activation = Callable[[Tensor], Tensor]


class Recipe(NamedTuple):
    """How a value is computed: batch normalisation, where there is one, of the pieces joined along the channels.

    Attributes:
        pieces: ``(N, C_i, H, W)``; most often one.
        weight, bias: of the normalisation, or None.
        mean, var: None where nothing is normalised.
        batch_stats: whether they are the pieces' own, which the derivative must know.
        eps: added to the variance.
    """

    pieces: tuple[Tensor, ...]
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    batch_stats: bool = False
    eps: float = 0.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the derivative is for."""
        return self.weight, self.bias, *self.pieces

    def __call__(self, weight: Tensor | None, bias: Tensor | None, *pieces: Tensor) -> Tensor:
        """The value of these :attr:`tensors`."""
        x = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        if self.mean is None:
            return x
        if self.batch_stats:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        return F.batch_norm(x, self.mean, self.var, weight, bias, False, 0.0, self.eps)

    def fused(self, x: Tensor) -> tuple[Any, ...]:
        """The first arguments of the compiled ops."""
        return x, self.weight, self.bias, self.mean, self.var, self.batch_stats


#: What becomes of a normalisation's value: taken in by a kernel, computed again in backward, or neither.
FUSED, RECOMPUTED, WRITTEN_OUT, AS_WRITTEN = "fused", "recomputed", "written out", "as written"

#: What :func:`watch` was given: told of each normalisation, and of what became of its value.
_watcher: Callable[[nn.Module, str], None] | None = None


@contextmanager
def watch(told: Callable[[nn.Module, str], None]) -> Iterator[None]:
    """``told(module, outcome)`` for every use of a deferred value inside the block."""
    global _watcher
    before, _watcher = _watcher, told
    try:
        yield
    finally:
        _watcher = before


def tell(owner: nn.Module | None, outcome: str) -> None:
    """Tell whoever watches."""
    if _watcher is not None and owner is not None:
        _watcher(owner, outcome)


def _name(act: Activation) -> str:
    """For people."""
    function = act.func if isinstance(act, partial) else act
    return "" if function is identity else f"{function.__name__} "


def identity(z: Tensor) -> Tensor:
    """No activation."""
    return z


def _leaves(tensors: Sequence[Tensor | None], wanted: Sequence[bool], twice: bool) -> list[Tensor | None]:
    """``tensors`` to compute from anew: the same ones for a second derivative, else cut off from what made them."""
    if twice:
        return list(tensors)
    return [t if t is None else t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]


def _gradients(
    out: Tensor, tensors: Sequence[Tensor | None], wanted: Sequence[bool], dout: Tensor, twice: bool
) -> tuple[Tensor | None, ...]:
    """Those of ``out`` in the wanted tensors, None in the others."""
    inputs = [t for t, want in zip(tensors, wanted, strict=True) if want]
    if not inputs:
        return tuple(None for _ in wanted)
    found = iter(torch.autograd.grad(out, inputs, dout, create_graph=twice, allow_unused=True))
    return tuple(next(found) if want else None for want in wanted)


class _Value(torch.autograd.Function):
    """``act(recipe(*tensors))``, of which backward keeps the tensors alone."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, act: Activation, *tensors: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.recipe, ctx.act = recipe, act
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return act(recipe(*tensors))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        twice, wanted = torch.is_grad_enabled(), ctx.needs_input_grad[2:]
        tensors = _leaves(ctx.saved_tensors, wanted, twice)
        with torch.enable_grad():
            out = ctx.act(ctx.recipe(*tensors))
        return None, None, *_gradients(out, tensors, wanted, dout, twice)


class _Node(_Value):
    """A :class:`Deferred` with a derivative of its own, for whoever uses the tensor without torch's functions."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, act: Activation, *tensors: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.recipe, ctx.act = recipe, act
        ctx.save_for_backward(*tensors)
        return Deferred(recipe, act)


class _Convolution(torch.autograd.Function):
    """A convolution of ``act(recipe(*tensors))``, which backward computes again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        recipe: Recipe,
        act: Activation,
        geometry: tuple[Any, ...],
        weight: Tensor,
        bias: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.recipe, ctx.act, ctx.geometry = recipe, act, geometry
        ctx.save_for_backward(weight, bias, *tensors)
        with torch.no_grad():
            return F.conv2d(act(recipe(*tensors)), weight, bias, *geometry)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        twice, wanted = torch.is_grad_enabled(), ctx.needs_input_grad[3:]
        weight, bias, *tensors = _leaves(ctx.saved_tensors, wanted, twice)
        with torch.enable_grad():
            value = ctx.act(ctx.recipe(*tensors))
        if twice:
            with torch.enable_grad():
                out = F.conv2d(value, weight, bias, *ctx.geometry)  # type: ignore[arg-type]
            return None, None, None, *_gradients(out, [weight, bias, *tensors], wanted, dout, twice)
        stride, padding, dilation, groups = ctx.geometry
        dvalue, dweight, dbias = torch.ops.aten.convolution_backward(
            dout, value.detach(), weight, None if bias is None else list(bias.shape), stride, padding, dilation, False,
            [0, 0], groups, [any(wanted[2:]), wanted[0], wanted[1]],
        )  # fmt: skip
        rest = _gradients(value, tensors, wanted[2:], dvalue, False) if any(wanted[2:]) else [None] * len(tensors)
        return None, None, None, dweight, dbias, *rest


class _JoinedConvolution(torch.autograd.Function):
    """The compiled BN-ReLU-convolution of pieces, which are joined for the time of a call."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        recipe: Recipe,
        stride: tuple[int, int],
        padding: tuple[int, int],
        weight: Tensor,
        bias: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.recipe, ctx.stride, ctx.padding = recipe._replace(pieces=()), stride, padding
        ctx.save_for_backward(weight, bias, *tensors)
        return _fused(recipe, torch.cat(recipe.pieces, 1), weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        twice, wanted = torch.is_grad_enabled(), ctx.needs_input_grad[3:]
        weight, bias, *tensors = _leaves(ctx.saved_tensors, wanted, twice)
        recipe = ctx.recipe
        if twice:
            with torch.enable_grad():
                out = F.conv2d(F.relu(recipe(*tensors)), weight, bias, ctx.stride, ctx.padding)  # type: ignore[arg-type]
            return None, None, None, *_gradients(out, [weight, bias, *tensors], wanted, dout, twice)
        pieces = tensors[2:]
        dx, dbn_weight, dbn_bias, dweight, dbias = torch.ops.ran_ext.bn_relu_conv2d_backward(
            dout, torch.cat(pieces, 1), *tensors[:2], recipe.mean, recipe.var, weight, ctx.stride, ctx.padding,
            recipe.eps, recipe.batch_stats, [any(wanted[2:]), wanted[0], wanted[1]], None,
        )  # fmt: skip
        found = [dweight, dbias, dbn_weight, dbn_bias]
        found += dx.split([piece.shape[1] for piece in pieces], 1) if any(wanted[2:]) else [None] * len(pieces)
        return None, None, None, *(d if want else None for d, want in zip(found, wanted, strict=True))


def _fused(
    recipe: Recipe, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    out: Tensor = torch.ops.ran_ext.bn_relu_conv2d(
        *recipe.fused(x), [], None, recipe.eps, weight, bias, None, stride, padding, False, [], None, False
    )[0]
    return out


class Deferred(Tensor):
    """``act(recipe(*recipe.tensors))``: a tensor with shape, strides, dtype and device, not written yet."""

    recipe: Recipe
    act: Activation
    versions: list[int]
    #: The value, once something needed it.
    value: Tensor | None
    #: The module that made it; told what became of it.
    owner: nn.Module | None
    #: Of a join: called when its pieces are taken.
    join_taken: Callable[[], None] | None = None

    @staticmethod
    def __new__(cls, recipe: Recipe, act: Activation) -> Deferred:
        x = recipe.pieces[0]
        shape, stride = x.shape, x.stride()
        if len(recipe.pieces) > 1:
            shape, stride = _joined_layout(recipe.pieces)
        made = Tensor._make_wrapper_subclass(cls, shape, stride, dtype=x.dtype, device=x.device)
        made.recipe, made.act, made.value, made.owner = recipe, act, None, None
        made.versions = [piece._version for piece in recipe.pieces]
        return made

    @classmethod
    def defer(cls, recipe: Recipe, act: Activation, owner: nn.Module | None) -> Deferred:
        made: Deferred = _Node.apply(recipe, act, *recipe.tensors) if torch.is_grad_enabled() else cls(recipe, act)
        made.owner = owner
        return made

    @property
    def is_join(self) -> bool:
        """Whether it is pieces and nothing else."""
        return self.recipe.mean is None and self.act is identity and self.value is None

    def take_pieces(self) -> tuple[Tensor, ...]:
        """The pieces of a join, to be taken in whole; of anything else its value."""
        if not self.is_join:
            return (self.materialise(),)
        self.check_versions()
        if self.join_taken is not None:
            self.join_taken()
        return self.recipe.pieces

    def materialise(self) -> Tensor:
        """The value; kept where it has the history that it needs."""
        if self.value is None:
            self.check_versions()
            self._tell_owner()
            tell(self.owner, f"{WRITTEN_OUT}: {_name(self.act)}value used by something else than a convolution")
            value = self._compute()
            if not torch.is_grad_enabled():
                return value  # has no history: whoever asks next may need one
            self.value = value
        value = self.value
        return value.materialise() if isinstance(value, Deferred) else value

    def _compute(self) -> Tensor:
        recipe = self.recipe
        if self.act is identity:
            return recipe(*recipe.tensors)  # type: ignore[arg-type]
        if self.act is F.relu and len(recipe.pieces) == 1 and _backend.use_native(recipe.pieces[0]):
            out: Tensor = torch.ops.ran_ext.bn_relu(*recipe.fused(recipe.pieces[0]), [], None, recipe.eps)[0]
            return out
        out = _Value.apply(recipe, self.act, *recipe.tensors)
        return out

    def _tell_owner(self) -> None:
        """A normalisation whose value is written out as it is need not defer the next time."""
        if self.owner is not None and not is_checkpointed():
            self.owner.__dict__["_written_out"] = self.act is identity

    def check_versions(self) -> None:
        """Raises where a piece was written to since the statistics were taken."""
        if [piece._version for piece in self.recipe.pieces] != self.versions:
            raise RuntimeError(
                f"ran_ext.convert: the input of {self.owner or 'a concatenation'} was modified in place after it was "
                "taken and before the result was used; run this module as written: ran_ext.revert(module)"
            )

    def activated(self, act: Activation, inplace: bool) -> Tensor:
        """``act`` of it."""
        if self.value is not None or self.act is not identity or self.recipe.mean is None:
            value = self.materialise()
            return value.copy_(act(value)) if inplace else act(value)
        made = Deferred.defer(self.recipe, act, self.owner)
        if inplace:
            self.value = made
        return made

    def resolve(self) -> Deferred:
        """Itself, or what an activation in place made of it."""
        return self.value.resolve() if isinstance(self.value, Deferred) else self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        taken = _TAKEN.get(func)
        if taken is not None:
            found = taken(*args, **kwargs)
            if found is not None:
                return found
        return func(*map(_real, args), **{name: _real(value) for name, value in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Reached where torch's functions are not asked, as from a Function: autograd has its own node for it."""
        kwargs = kwargs or {}
        return func(*map(_bare, args), **{name: _bare(value) for name, value in kwargs.items()})

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(self.materialise())

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.materialise().__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialise().__reduce_ex__(protocol)


def _real(value: Any) -> Any:
    """``value`` with what is deferred in it written out."""
    if isinstance(value, Deferred):
        return value.materialise()
    if type(value) in (list, tuple):
        return type(value)(map(_real, value))
    return value


def _bare(value: Any) -> Any:
    """The same below autograd."""
    if isinstance(value, Deferred):
        found = value.resolve()
        if found is not value:
            raise RuntimeError(
                "ran_ext.convert: an activation in place, whose result was not used, changed the output of a batch "
                "normalisation that an autograd.Function takes; use the activation's result"
            )
        if found.value is not None:
            return found.value.detach()
        found.check_versions()
        with torch.no_grad():
            return found.act(found.recipe(*found.recipe.tensors))  # type: ignore[arg-type]
    if type(value) in (list, tuple):
        return type(value)(map(_bare, value))
    return value


def _activation(function: Activation, *names: str) -> Callable[..., Tensor | None]:
    """What takes a call of an activation with the keyword arguments ``names`` and ``inplace``."""

    def take(input: Any, *args: Any, inplace: bool = False, **kwargs: Any) -> Tensor | None:
        if not isinstance(input, Deferred) or len(args) > len(names) + 1:
            return None
        if len(args) > len(names):
            inplace, args = args[-1], args[:-1]
        kwargs |= dict(zip(names, args, strict=False))
        if kwargs.keys() - set(names):
            return None
        return input.resolve().activated(partial(function, **kwargs) if kwargs else function, bool(inplace))

    return take


def _in_place(function: Activation, *names: str) -> Callable[..., Tensor | None]:
    take = _activation(function, *names)
    return lambda input, *args, **kwargs: take(input, *args, **kwargs, inplace=True)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _joined_layout(pieces: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of the pieces joined along the channels."""
    n, _, height, width = pieces[0].shape
    channels = sum(piece.shape[1] for piece in pieces)
    shape = (n, channels, height, width)
    if all(piece.is_contiguous(memory_format=torch.channels_last) for piece in pieces):
        return shape, (channels * height * width, 1, channels * width, channels)
    return shape, (channels * height * width, height * width, width, 1)


def is_checkpointed() -> bool:
    """Whether an activation checkpoint will run this again, or does: both times must take the same path."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return in_backward() or (hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint")


def join(taken: Callable[[], None], tensors: Any, dim: Any = 0) -> Tensor | None:
    """``torch.cat`` along the channels that keeps the pieces; None where it must be written out."""
    if dim not in (1, -3) or not isinstance(tensors, (list, tuple)) or len(tensors) < 2:
        return None
    flat: list[Tensor] = []
    for piece in tensors:
        if isinstance(piece, Deferred):
            if not piece.is_join:
                return None
            flat += piece.recipe.pieces
        else:
            flat.append(piece)
    first = flat[0]
    if not all(type(t) is Tensor and t.dim() == 4 and t.dtype == first.dtype and t.numel() for t in flat):
        return None
    if any(t.shape[0] != first.shape[0] or t.shape[2:] != first.shape[2:] or t.device != first.device for t in flat):
        return None
    made = Deferred.defer(Recipe(tuple(flat)), identity, None)
    made.join_taken = taken
    return made


def _convolution(
    input: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """A convolution that takes a deferred input in; None where it has to be written out."""
    if not isinstance(input, Deferred):
        return None
    found = input.resolve()
    if found.value is not None or not all(t is None or type(t) in (Tensor, nn.Parameter) for t in (weight, bias)):
        return None
    recipe = found.recipe
    if weight.dim() != 4 or weight.shape[1] * groups != found.shape[1] or weight.device != found.device:
        return None  # torch has the error's text
    found.check_versions()
    x = recipe.pieces[0]
    plain = groups == 1 and not isinstance(padding, str) and _pair(dilation) == (1, 1) and recipe.mean is not None
    if plain and found.act is F.relu and _backend.use_native(x) and _same_dtype(x, weight, bias):
        if len(recipe.pieces) == 1:
            tell(found.owner, FUSED)
            return _fused(recipe, x, weight, bias, _pair(stride), _pair(padding))
        if not torch.is_autocast_enabled(x.device.type):
            tell(found.owner, f"{FUSED}, of {len(recipe.pieces)} pieces")
            joined: Tensor = _JoinedConvolution.apply(
                recipe, _pair(stride), _pair(padding), weight, bias, *recipe.tensors
            )
            return joined
    if isinstance(padding, str) or torch.is_autocast_enabled(x.device.type) or weight.dtype != x.dtype:
        return None
    if found.is_join:
        found.take_pieces()
    grouped = "grouped " if groups > 1 else "dilated " if _pair(dilation) != (1, 1) else ""
    tell(found.owner, f"{RECOMPUTED}: {_name(found.act)}before a {grouped}convolution")
    out: Tensor = _Convolution.apply(
        recipe, found.act, (_pair(stride), _pair(padding), _pair(dilation), groups), weight, bias, *recipe.tensors
    )
    return out


def _same_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.is_autocast_enabled(x.device.type):
        return True
    return weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)


_TAKEN: dict[Any, Callable[..., Tensor | None]] = {
    F.conv2d: _convolution,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _activation(F.relu)),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _in_place(F.relu)),
    F.relu6: _activation(F.relu6),
    F.silu: _activation(F.silu),
    F.hardswish: _activation(F.hardswish),
    F.leaky_relu: _activation(F.leaky_relu, "negative_slope"),
    F.hardtanh: _activation(F.hardtanh, "min_val", "max_val"),
}

_METADATA = {
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point")),
    *(getattr(Tensor, name) for name in ("is_complex", "element_size", "get_device", "ndimension", "__len__")),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "is_cuda")
    ),
    *(getattr(Tensor, name).__get__ for name in ("is_sparse", "is_quantized", "is_mkldnn", "is_meta", "_version")),
}
