"""What the ops check alike before they compute: a refusal names the op, the argument, the rule and what it got.

Each check is one condition where all is well, since a network makes hundreds of calls a step; what is wrong is found
out afterwards. Sizes may be symbolic (``torch.SymInt``).
"""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _backend

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Products of sizes and numbers up to this one stay within int64.
LARGEST = 2**31 - 1
#: How a tensor of low resolution is read at a higher one.
INTERPOLATIONS = ("nearest", "bilinear")


def shown(value: object) -> str:
    """``value`` for a message: a tensor by what it is, anything else as written, cut where that is long."""
    if isinstance(value, Tensor):
        layout = "nested " if value.is_nested else f"{value.layout} ".removeprefix("torch.").replace("strided ", "")
        shape = "" if value.is_nested else f" {list(value.shape)}"
        return f"{layout}{value.dtype}{shape} on {value.device}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def tensor(op: str, name: str, value: Tensor | None) -> None:
    """Raise TypeError unless ``value`` is a dense tensor of a floating-point type that the ops take."""
    if (
        not isinstance(value, Tensor)
        or value.layout is not torch.strided
        or value.is_nested
        or value.dtype not in FLOATS
    ):
        _refuse_tensor(op, name, value)


def _refuse_tensor(op: str, name: str, value: object) -> NoReturn:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {shown(value)}")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {shown(value)}")
    rule = "float32, bfloat16, float16 or float64" if value.is_floating_point() else "floating point"
    raise TypeError(f"{op}: {name} must be {rule}, got {value.dtype}")


def activation(op: str, name: str, value: Tensor) -> None:
    """Raise unless ``value`` is a dense ``(N, C, H, W)`` of a floating-point type that the ops take."""
    if (
        not isinstance(value, Tensor)
        or value.layout is not torch.strided
        or value.is_nested
        or value.dtype not in FLOATS
        or value.dim() != 4
    ):
        tensor(op, name, value)
        raise ValueError(f"{op}: {name} must be (N, C, H, W), got {list(value.shape)}")


def vectors(op: str, x: Tensor, names: tuple[str, ...], values: tuple[Tensor | None, ...]) -> None:
    """Raise unless each is None, or holds one number a channel of ``x`` on the same device."""
    size, device = x.shape[1:2], x.device
    for name, value in zip(names, values, strict=True):
        if value is not None and (
            not isinstance(value, Tensor)
            or value.layout is not torch.strided
            or value.is_nested
            or value.dtype not in FLOATS
            or value.shape != size
            or value.device != device
        ):
            tensor(op, name, value)
            same_device(op, name, value, x)
            raise ValueError(
                f"{op}: {name} must be [{x.shape[1]}], one number a channel of x {list(x.shape)}, got "
                f"{list(value.shape)}"
            )


def operand(op: str, name: str, value: Tensor, x: Tensor) -> None:
    """Raise unless ``value`` is dense, on ``x``'s device, and of its dtype where autocast does not see to that."""
    if (
        not isinstance(value, Tensor)
        or value.layout is not torch.strided
        or value.is_nested
        or value.dtype != x.dtype
        or value.device != x.device
    ):
        tensor(op, name, value)
        same_device(op, name, value, x)
        if not _backend.autocasts(x):
            raise TypeError(f"{op}: {name} must have x's dtype {x.dtype}, got {value.dtype}")


def same_device(op: str, name: str, value: Tensor, x: Tensor) -> None:
    """Raise ValueError unless both are on one device."""
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {value.device}")


def alike(op: str, names: tuple[str, str], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The two, of one device and dtype, or raise; under autocast of the wider, as in eager PyTorch's arithmetic."""
    tensor(op, names[0], first)
    tensor(op, names[1], second)
    if first.device != second.device:
        raise ValueError(
            f"{op}: {names[0]} and {names[1]} must be on the same device, got {names[0]} on {first.device} and "
            f"{names[1]} on {second.device}"
        )
    if first.dtype != second.dtype:
        if not _backend.autocasts(first):
            raise TypeError(
                f"{op}: {names[0]} and {names[1]} must have the same floating-point dtype, got {names[0]} "
                f"{first.dtype} and {names[1]} {second.dtype}"
            )
        wider = torch.promote_types(first.dtype, second.dtype)
        return first.to(wider), second.to(wider)
    return first, second


def flag(op: str, name: str, value: bool) -> bool:
    """``value`` as True or False; TypeError where it is neither (1, 0 and NumPy's are)."""
    if value is True or value is False:
        return value
    if isinstance(value, Tensor) or value not in (True, False):
        raise TypeError(f"{op}: {name} must be True or False, got {shown(value)}")
    return bool(value)


def choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def number(op: str, name: str, value: float) -> float:
    """``value`` as a float (NumPy's too, and symbolic ones as they are); TypeError where it is no real number."""
    if type(value) is float or isinstance(value, torch.SymFloat):
        return value
    if not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number, got {shown(value)}")
    return float(value)


def whole(op: str, name: str, value: int, least: int, form: str = "a whole number >= {}") -> int:
    """``value`` as an int >= ``least`` (NumPy's too, and symbolic ones as they are); ``form`` words the rule.

    What is larger than :data:`LARGEST` is refused: products of it would leave int64.
    """
    if type(value) is not int and not isinstance(value, torch.SymInt):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{op}: {name} must be {form.format(least)}, got {shown(value)}") from None
    if value < least:
        raise ValueError(f"{op}: {name} must be {form.format(least)}, got {value}")
    if value > LARGEST:
        raise ValueError(f"{op}: {name} must be at most 2**31 - 1, got {value}")
    return value


def pair(op: str, name: str, value: Any, least: int) -> tuple[int, int]:
    """``value``, one number or two, as two ints >= ``least``."""
    if type(value) is tuple and len(value) == 2:
        high, wide = value
        if type(high) is int and type(wide) is int and least <= high <= LARGEST and least <= wide <= LARGEST:
            return value
    form = "one whole number or a pair of them, each >= {}"
    if type(value) is int:
        return (number_ := whole(op, name, value, least, form), number_)
    try:
        parts = tuple(value)
    except TypeError:
        one = whole(op, name, value, least, form)
        return one, one
    if len(parts) != 2:
        raise ValueError(f"{op}: {name} must be {form.format(least)}, got {shown(value)}")
    return whole(op, name, parts[0], least, form), whole(op, name, parts[1], least, form)
