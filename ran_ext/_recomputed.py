"""What is differentiated by computing a recipe's value again in backward, so that nothing of it is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _backend
from ._paths import paths
from ._recipe import Activation, Dropped, Norm, Optional, Recipe, identity, joined, save, saved, split, value_of
from .ops.conv2d import conv2d


def _gradients(
    compute: Callable[..., Tensor], tensors: Sequence[Optional], wanted: Sequence[bool], dout: Tensor
) -> list[Optional]:
    """Those of ``compute(*tensors)`` in the wanted tensors, to be differentiated again; None in the others.

    In each with the others held: one may have been made of another, as a piece of the pieces before it.
    """
    held: Any = [t.view_as(t) if t is not None and want else t for t, want in zip(tensors, wanted, strict=True)]
    inputs = [t for t, want in zip(held, wanted, strict=True) if want]
    if not inputs:
        return [None] * len(wanted)
    found = iter(torch.autograd.grad(compute(*held), inputs, dout, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted]


class _Again:
    """A value computed again in backward, from the statistics that forward took."""

    def __init__(self, norm: Norm, act: Activation, tensors: Sequence[Optional]):
        self.norm, self.act, self.tensors = norm, act, tensors
        with torch.no_grad():
            self.x, z = _normalised(norm, *tensors)
        self.z = z.detach()
        if act is identity:
            self._value = self.z
        else:
            with torch.enable_grad():
                self._value = act(self.z.requires_grad_())

    def value(self) -> Tensor:
        """Past the activation."""
        return self._value.detach()

    def gradients(self, wanted: Sequence[bool], dvalue: Tensor) -> list[Optional]:
        """Those of the tensors, from that of the value."""
        if not any(wanted):
            return [None] * len(wanted)
        dx, dweight, dbias = self._of_norm(dvalue, [any(wanted[4:]), wanted[2], wanted[3]])
        found = [None, None, dweight, dbias, *split(dx, self.tensors[4:])]
        return [d if want else None for d, want in zip(found, wanted, strict=True)]

    def _of_norm(self, dvalue: Tensor, wanted: list[bool]) -> tuple[Optional, Optional, Optional]:
        """Those of the pieces joined, the weight and the bias."""
        dz = dvalue if self.act is identity else torch.autograd.grad(self._value, self.z, dvalue)[0]
        mean, var, weight = self.tensors[:3]
        if mean is None or var is None:
            return dz, None, None
        weight = None if weight is None else weight.contiguous()
        kept: tuple[Optional, ...] = (mean, var, None, None)
        if self.norm.batch_stats:
            kept = (None, None, mean, (var + self.norm.eps).rsqrt())
        return torch.ops.aten.native_batch_norm_backward(  # type: ignore[no-any-return]
            dz, self.x, weight, *kept, self.norm.batch_stats, self.norm.eps, wanted
        )


class _CompiledAgain(_Again):
    """The same by kernels that pass over the memory once for the value, and twice for the gradients."""

    def __init__(self, norm: Norm, act: tuple[Any, ...], tensors: Sequence[Optional]):
        self.norm, self.compiled, self.tensors = norm, act, tensors
        self.x = joined(tensors[4:])

    def value(self) -> Tensor:
        return _activated(self.norm, self.compiled, self.x, self.tensors)

    def _of_norm(self, dvalue: Tensor, wanted: list[bool]) -> tuple[Optional, Optional, Optional]:
        mean, var, weight, bias = self.tensors[:4]
        dx, dweight, dbias = torch.ops.ran_ext.bn_act_backward(
            dvalue, self.x, weight, bias, mean, var, self.norm.eps, self.norm.batch_stats, *self.compiled, wanted
        )
        return dx, None if weight is None else dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


class _DroppedAgain(_Again):
    """A value past dropout, by the random numbers that forward drew."""

    def __init__(self, before: _Again, act: Dropped):
        self.before, self.noise = before, act.noise(before.x.dtype)

    def value(self) -> Tensor:
        return self.before.value() * self.noise

    def gradients(self, wanted: Sequence[bool], dvalue: Tensor) -> list[Optional]:
        return self.before.gradients(wanted, dvalue * self.noise)


def _activated(norm: Norm, compiled: tuple[Any, ...], x: Tensor, tensors: Sequence[Optional]) -> Tensor:
    mean, var, weight, bias = tensors[:4]
    return torch.ops.ran_ext.bn_act(x, weight, bias, mean, var, norm.eps, *compiled)  # type: ignore[no-any-return]


#: Of torch's activations the compiled op's name, and the two numbers that it takes: by name, with torch's defaults.
_COMPILED: dict[Activation, tuple[str, dict[str, float]]] = {
    identity: ("none", {}),
    F.relu: ("relu", {}),
    F.relu6: ("hardtanh", {"min_val": 0.0, "max_val": 6.0}),
    F.leaky_relu: ("leaky_relu", {"negative_slope": 0.01}),
    F.hardtanh: ("hardtanh", {"min_val": -1.0, "max_val": 1.0}),
    F.hardswish: ("hardswish", {}),
    F.silu: ("silu", {}),
    F.gelu: ("gelu", {}),
}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}  # by the approximation


def _compiled(norm: Norm, act: Activation, tensors: Sequence[Optional]) -> tuple[str, float, float] | None:
    """The activation as the compiled passes take it; None where they do not serve."""
    mean, x = tensors[0], tensors[4]
    if not norm.native or mean is None or x is None or not x.is_cpu:
        return None
    given: dict[str, Any] = {}
    if isinstance(act, partial):
        given, act = act.keywords, act.func
    if act not in _COMPILED:
        return None
    name, defaults = _COMPILED[act]
    if act is F.gelu and given:
        name = _GELU.get(given["approximate"], "")
    a, b = [*(float(given.get(key, value)) for key, value in defaults.items()), 0.0, 0.0][:2]
    return None if not name or (name == "hardtanh" and not a <= b) else (name, a, b)  # torch has the error's text


def _again(norm: Norm, act: Activation, tensors: Sequence[Optional]) -> _Again:
    if isinstance(act, Dropped):
        return _DroppedAgain(_again(norm, act.act, tensors), act)
    compiled = _compiled(norm, act, tensors)
    return _Again(norm, act, tensors) if compiled is None else _CompiledAgain(norm, compiled, tensors)


def _forward(norm: Norm, act: Activation, tensors: Sequence[Optional]) -> Tensor:
    """``act(value)``, of the statistics that are given, below autograd."""
    if isinstance(act, Dropped):
        value = _forward(norm, act.act, tensors)
        return value * act.noise(value.dtype)
    compiled = _compiled(norm, act, tensors)
    with torch.no_grad():
        if compiled is None:
            return act(_normalised(norm, *tensors)[1])
        return _activated(norm, compiled, joined(tensors[4:]), tensors)


def _normalised(
    norm: Norm, mean: Optional, var: Optional, weight: Optional, bias: Optional, *pieces: Any
) -> tuple[Tensor, Tensor]:
    """The pieces joined, and the value before the activation, of the statistics that are given."""
    x = joined(pieces)
    if mean is None:
        return x, x
    if mean.dtype != (x if weight is None else weight).dtype:  # torch does not normalise with such statistics
        return x, value_of(norm, mean, var, weight, bias, x)
    return x, F.batch_norm(x, mean, var, weight, bias, False, 0.0, norm.eps)


def _value_gradients(
    norm: Norm, act: Activation, tensors: Sequence[Optional], wanted: Sequence[bool], dout: Tensor
) -> list[Optional]:
    """Those of ``act(value)``."""
    if not torch.is_grad_enabled():
        return _again(norm, act, tensors).gradients(wanted, dout)
    return _gradients(lambda *held: act(value_of(norm, *held)), tensors, wanted, dout)


def _convolved(
    norm: Norm, act: Activation, geometry: tuple[Any, ...], weight: Tensor, bias: Tensor | None, *tensors: Optional
) -> Tensor:
    """The convolution of ``act(value)``, as torch's own functions have it."""
    return F.conv2d(act(value_of(norm, *tensors)), weight, bias, *geometry)


class Value(torch.autograd.Function):
    """``act(recipe.value())``, of which backward keeps what it depends on."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, act: Activation, *tensors: Optional) -> Tensor:  # type: ignore[override]
        save(ctx, recipe, act, tensors)
        return _forward(recipe.norm, act, tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        return None, None, *_value_gradients(*saved(ctx), ctx.needs_input_grad[2:], dout)


class _Node(Value):
    """The history of a tensor that is not written, without the compiled module."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, act: Activation, make: Callable[[], Tensor], *tensors: Any) -> Tensor:  # type: ignore[override]
        save(ctx, recipe, act, tensors)
        return make()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        return None, None, None, *_value_gradients(*saved(ctx), ctx.needs_input_grad[3:], dout)


def with_history(make: Callable[[], Tensor], recipe: Recipe, act: Activation) -> Tensor:
    """The unwritten tensor that ``make`` makes; autograd takes it for ``act(recipe.value())``."""
    if not torch.is_grad_enabled():
        return make()
    if _backend._C is None:
        return _Node.apply(recipe, act, make, *recipe.tensors)  # type: ignore[no-any-return]
    out = make()
    backward = partial(_history_gradients, recipe, act)
    _backend._C.set_deferred_history(out, (recipe.weight, recipe.bias, *recipe.pieces), backward)
    return out


def _history_gradients(recipe: Recipe, act: Activation, dout: Tensor) -> list[Optional]:
    wanted = [t is not None and t.requires_grad for t in recipe.tensors]
    return _value_gradients(recipe.norm, act, recipe.tensors, wanted, dout)[2:]


class Convolution(torch.autograd.Function):
    """A convolution of ``act(recipe.value())``, which backward computes again."""

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
        save(ctx, recipe, act, (weight, bias, *tensors))
        ctx.geometry = geometry
        ctx.fast = paths(recipe.pieces[0]) if recipe.native and geometry[2:] == ((1, 1), 1) else None
        value = _forward(recipe.norm, act, tensors)
        with torch.no_grad():
            convolve = F.conv2d if ctx.fast is None else conv2d
            return convolve(value, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        wanted = ctx.needs_input_grad[3:]
        norm, act, held = saved(ctx)
        if torch.is_grad_enabled():
            convolved = partial(_convolved, norm, act, ctx.geometry)
            return None, None, None, *_gradients(convolved, held, wanted, dout)
        weight: Any = held[0]
        bias, *tensors = held[1:]
        again = _again(norm, act, tensors)
        value = again.value()
        stride, padding, dilation, groups = ctx.geometry
        masks = [any(wanted[2:]), wanted[0], wanted[1]]
        if ctx.fast is not None and dout.is_cpu:
            dvalue, dweight, dbias = torch.ops.ran_ext.conv2d_backward(
                dout, value, weight, stride, padding, masks, ctx.fast
            )
        else:
            dvalue, dweight, dbias = torch.ops.aten.convolution_backward(
                dout, value, weight, None if bias is None else list(bias.shape), stride, padding, dilation,
                False, [0, 0], groups, masks,
            )  # fmt: skip
        rest = again.gradients(wanted[2:], dvalue)
        return None, None, None, dweight if wanted[0] else None, dbias if wanted[1] else None, *rest


def activated(recipe: Recipe, act: Activation) -> Tensor:
    """``act(recipe.value())``, of which backward keeps what it depends on."""
    value = recomputed(recipe, act)
    return Value.apply(recipe, act, *recipe.tensors) if value is None else value  # type: ignore[no-any-return]


def recomputed(recipe: Recipe, act: Activation) -> Tensor | None:
    """The same by a kernel; None where there is none."""
    compiled = _compiled(recipe.norm, act, recipe.tensors) if len(recipe.pieces) == 1 else None
    if compiled is None:
        return None
    x, norm = recipe.pieces[0], recipe.norm
    native: Any = _backend._C
    return native.bn_act_recomputed(  # type: ignore[no-any-return]
        x, recipe.weight, recipe.bias, recipe.mean, recipe.var, norm.batch_stats, norm.eps, *compiled
    )  # fmt: skip


def convolved(
    recipe: Recipe,
    act: Activation,
    geometry: tuple[Any, ...],
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor | None = None,
) -> Tensor:
    """The convolution of ``act(recipe.value())``, which backward computes again; ``geometry`` from the stride on.

    ``value``: what :func:`recomputed` has made of the same.
    """
    compiled = _compiled(recipe.norm, act, recipe.tensors) if len(recipe.pieces) == 1 else None
    if compiled is None:
        return Convolution.apply(recipe, act, geometry, weight, bias, *recipe.tensors)  # type: ignore[no-any-return]
    x, norm = recipe.pieces[0], recipe.norm
    native: Any = _backend._C
    value = recomputed(recipe, act) if value is None else value
    return native.bn_act_conv2d(  # type: ignore[no-any-return]
        value, x, recipe.weight, recipe.bias, recipe.mean, recipe.var, norm.batch_stats, norm.eps, *compiled,
        weight, bias, *geometry, paths(x) if geometry[2:] == ((1, 1), 1) else None,
    )  # fmt: skip


class JoinedConvolution(torch.autograd.Function):
    """The compiled BN-ReLU-convolution of pieces, which are joined, if at all, for the time of a call."""

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
        ctx.norm, ctx.geometry, ctx.paths = recipe.norm, (stride, padding), paths(recipe.pieces[0])
        ctx.save_for_backward(weight, bias, *tensors)
        return torch.ops.ran_ext._joined_bn_relu_conv2d(  # type: ignore[no-any-return]
            recipe.pieces, weight, bias, recipe.weight, recipe.bias, recipe.mean, recipe.var, recipe.eps, stride,
            padding, ctx.paths,
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        wanted = ctx.needs_input_grad[3:]
        weight, _, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            convolved = partial(_convolved, ctx.norm, F.relu, ctx.geometry)
            return None, None, None, *_gradients(convolved, ctx.saved_tensors, wanted, dout)
        mean, var, bn_weight, bn_bias = tensors[:4]
        pieces: Any = tensors[4:]
        dx, dbn_weight, dbn_bias, dweight, dbias = torch.ops.ran_ext._joined_bn_relu_conv2d_backward(
            dout, pieces, bn_weight, bn_bias, mean, var, weight, *ctx.geometry, ctx.norm.eps, ctx.norm.batch_stats,
            [any(wanted[4:]), wanted[0], wanted[1]], ctx.paths,
        )  # fmt: skip
        found = [dweight, dbias, None, None, dbn_weight, dbn_bias]
        found += dx.split([piece.shape[1] for piece in pieces], 1) if any(wanted[4:]) else [None] * len(pieces)
        return None, None, None, *(d if want else None for d, want in zip(found, wanted, strict=True))
