"""What torch's functions do with a value that is not written yet: activations, dropout, pooling, convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._deferred import FUSED, RECOMPUTED, TAKEN, Deferred, name_of, tell
from ._fusion import PLAIN
from ._pooling import avg_pool2d, max_pool2d
from ._recipe import Activation
from ._recomputed import JoinedConvolution, convolved


def pair(value: Any) -> tuple[int, int]:
    """A stride and the like as two numbers."""
    if type(value) is tuple and len(value) == 2:
        return value
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


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
    recipe, x = found.recipe, found.recipe.pieces[0]
    if found.value is not None or type(weight) not in PLAIN or (bias is not None and type(bias) not in PLAIN):
        return None
    channels = x.shape[1] if len(recipe.pieces) == 1 else sum(piece.shape[1] for piece in recipe.pieces)
    if weight.dim() != 4 or weight.shape[1] * groups != channels or weight.device != x.device:
        return None  # torch has the error's text
    if isinstance(padding, str):
        return None
    autocasts = torch.is_autocast_enabled(x.device.type)
    if not autocasts and (weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype)):
        return None
    found.check_versions()
    stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
    fuses = found.act is F.relu and recipe.native and groups == 1 and dilation == (1, 1) and recipe.mean is not None
    if fuses and len(recipe.pieces) == 1:
        tell(found.owner, FUSED)
        return recipe.fused(x, weight, bias, stride, padding)  # which casts as autocast does
    if autocasts:
        lower = torch.get_autocast_dtype(x.device.type)
        if x.dtype != lower or any(t is not None and t.dtype == torch.float64 for t in (weight, bias)):
            return None  # torch casts the value; of float64 it has the error
        weight, bias = weight.to(lower), None if bias is None else bias.to(lower)
    if fuses:
        tell(found.owner, f"{FUSED}, of {len(recipe.pieces)} pieces")
        joined: Tensor = JoinedConvolution.apply(recipe, stride, padding, weight, bias, *recipe.tensors)
        return joined
    if found.is_join:
        found.take_pieces()
    grouped = "grouped " if groups > 1 else "dilated " if dilation != (1, 1) else ""
    tell(found.owner, f"{RECOMPUTED}: {name_of(found.act)}before a {grouped}convolution")
    return convolved(recipe, found.act, (stride, padding, dilation, groups), weight, bias, found.make())


def _relu(input: Any, inplace: bool = False) -> Tensor | None:
    return input.resolve().activated(F.relu, bool(inplace)) if isinstance(input, Deferred) else None


def _dropout(function: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    """What takes a call of dropout; one that drops nothing draws no random numbers."""

    def take(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
        if not isinstance(input, Deferred) or not 0 <= p <= 1:
            return None
        if p == 0 or not training:
            return input
        return input.resolve().dropped(function, p, inplace) if p < 1 else None

    return take


def _pooled(input: Any) -> Tensor | None:
    """The value of what is pooled in training; torch's pooling would keep it."""
    if not isinstance(input, Deferred) or not (torch.is_grad_enabled() and input.requires_grad):
        return None
    x = input.materialise()
    return x if x.dim() == 4 else None


def _pairs(*sizes: Any) -> list[tuple[int, int]] | None:
    """Kernel sizes and the like as pairs; None where torch has the error."""
    for size in sizes:
        numbers = size if isinstance(size, (tuple, list)) else (size,)
        if not 1 <= len(numbers) <= 2 or not all(type(n) is int for n in numbers):
            return None
    return [pair(size) for size in sizes]


def _max_pool(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    pairs = _pairs(kernel_size, kernel_size if stride is None else stride, padding, dilation)
    x = None if return_indices or pairs is None else _pooled(input)
    return None if x is None else max_pool2d(x, *pairs, ceil_mode)  # type: ignore[misc,call-arg]


def _avg_pool(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> Tensor | None:
    pairs = _pairs(kernel_size, kernel_size if stride is None else stride, padding)
    x = None if pairs is None else _pooled(input)
    return None if x is None else avg_pool2d(x, *pairs, ceil_mode, count_include_pad, divisor_override)  # type: ignore[misc]


_TABLE: dict[Any, Callable[..., Any]] = {
    F.conv2d: _convolution,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _in_place(F.relu)),
    F.dropout: _dropout(F.dropout),
    F.dropout2d: _dropout(F.dropout2d),
    F.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
    F.relu6: _activation(F.relu6),
    F.silu: _activation(F.silu),
    F.gelu: _activation(F.gelu, "approximate"),
    F.hardswish: _activation(F.hardswish),
    F.leaky_relu: _activation(F.leaky_relu, "negative_slope"),
    F.hardtanh: _activation(F.hardtanh, "min_val", "max_val"),
}
TAKEN.update(_TABLE)
