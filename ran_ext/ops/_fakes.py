"""Shapes, dtypes and strides of the compiled ops for ``torch.compile`` and fake tensors, and operation counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

from .. import _backend


def _vector(x: Tensor, size: Any) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty([size], dtype=dtype)


def _dense_like(x: Tensor) -> Tensor:
    """As the C++ ``dense``: NCHW or channels_last, whichever x is, or its strides suggest."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x)
    last = x.dim() == 4 and torch._prims_common.suggest_memory_format(x) == torch.channels_last
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)


def _empty_at(x: Tensor, height: Any, width: Any, dtype: torch.dtype | None = None) -> Tensor:
    """As the C++ ``empty_at``: another height and width, in the memory format that x's strides suggest."""
    size, layout = (*x.shape[:2], height, width), torch._prims_common.suggest_memory_format(x)
    return torch.empty(size, dtype=dtype or x.dtype, device=x.device, memory_format=layout)


def _register() -> None:
    fake: Any = torch.library.register_fake

    def flops(op: Any) -> Any:
        flop_registry.pop(op, None)  # this file may run again: a reload, an import after the modules were purged
        return register_flop_formula(op)

    @fake("ran_ext::attention_gate")
    def _(trunk: Tensor, mask: Tensor, scale_factor: int, bilinear: bool = False) -> Tensor:
        return _gate_like(trunk, scale_factor)

    @fake("ran_ext::attention_gate_backward")
    def _(
        dout: Tensor, trunk: Tensor, mask: Tensor, scale_factor: int, bilinear: bool = False
    ) -> tuple[Tensor, Tensor]:
        dtrunk = _gate_like(trunk, scale_factor)
        if scale_factor == 1:
            return dtrunk, torch.empty_like(dtrunk)
        return dtrunk, mask.contiguous(memory_format=_format(dtrunk)).new_empty(mask.shape).contiguous(
            memory_format=_format(dtrunk)
        )

    @fake("ran_ext::conv_attention_gate")
    def _(
        trunk: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale_factor: int, paths: int = 0
    ) -> tuple[Tensor, Tensor]:
        return _gate_like(trunk, scale_factor), F.conv2d(x, weight, bias)

    @fake("ran_ext::max_pool2d")
    def _(x: Tensor) -> tuple[Tensor, Tensor]:
        out = _empty_at(x, -(-x.shape[2] // 2), -(-x.shape[3] // 2))
        return out, torch.empty_like(out, dtype=torch.uint8)

    @fake("ran_ext::max_pool2d_backward")
    def _(dout: Tensor, index: Tensor, height: int, width: int) -> Tensor:
        return _empty_at(index, height, width, dout.dtype)

    @fake("ran_ext::upsample_add")
    def _(lower: Tensor, skip: Tensor | None, height: int, width: int) -> Tensor:
        return _empty_at(lower if skip is None else skip, height, width)

    @fake("ran_ext::upsample_add_backward")
    def _(dout: Tensor) -> Tensor:
        return _empty_at(dout, -(-dout.shape[2] // 2), -(-dout.shape[3] // 2))

    @fake("ran_ext::batch_norm_stats")
    def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return _vector(x, x.shape[1]), _vector(x, x.shape[1])

    @fake("ran_ext::bn_relu")
    def _(x: Tensor, weight: Any, bias: Any, mean: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        size = x.shape[1] if mean is None else 0
        return _dense_like(x), _vector(x, size), _vector(x, size)

    @fake("ran_ext::bn_relu_backward")
    def _(dout: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _dense_like(x), _vector(x, x.shape[1]), _vector(x, x.shape[1])

    @fake("ran_ext::bn_relu_backward_reduce")
    def _(dout: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return _vector(x, x.shape[1]), _vector(x, x.shape[1])

    @fake("ran_ext::bn_relu_backward_apply")
    def _(dout: Tensor, x: Tensor, *args: Any) -> Tensor:
        return _dense_like(x)

    @fake("ran_ext::bn_act")
    def _(x: Tensor, *args: Any) -> Tensor:
        return _dense_like(x)

    @fake("ran_ext::bn_act_backward")
    def _(
        dout: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        batch_stats: bool,
        act: str,
        a: float = 0,
        b: float = 0,
        wanted: tuple[bool, bool, bool] = (True, True, True),
    ) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [x.shape[1] if want else 0 for want in wanted[1:]]
        return _dense_like(x) if wanted[0] else x.new_empty([0]), _vector(x, sizes[0]), _vector(x, sizes[1])

    @fake("ran_ext::_chained_bn_relu_conv2d")
    def _(
        x: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        batch_stats: bool,
        running: list[Tensor],
        momentum: float | None,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        stride: list[int],
        padding: list[int],
        next_stats: bool,
        *args: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        size = x.shape[1] if mean is None else 0
        next_size = weight.shape[0] if next_stats else 0
        out = F.conv2d(_dense_like(x), weight, bias, stride, padding)
        vectors = _vector(x, size), _vector(x, size), _vector(x, next_size), _vector(x, next_size)
        return out, *vectors, x.new_empty([0])

    @fake("ran_ext::conv2d")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], *args: Any) -> Tensor:
        return F.conv2d(_dense_like(x), weight, bias, stride, padding)

    @fake("ran_ext::conv2d_backward")
    def _(
        dout: Tensor,
        x: Tensor,
        weight: Tensor,
        stride: list[int],
        padding: list[int],
        wanted: list[bool],
        paths: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, dweight, dbias = torch.ops.aten.convolution_backward(
            dout, x, weight, [weight.shape[0]], stride, padding, [1, 1], False, [0, 0], 1, [False, wanted[1], wanted[2]]
        )
        return (
            _dense_like(x) if wanted[0] else x.new_empty([0]),
            dweight if wanted[1] else x.new_empty([0]),
            dbias if wanted[2] else x.new_empty([0]),
        )

    @fake("ran_ext::bn_relu_conv2d_backward")
    def _(
        dout: Tensor,
        x: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        stride: list[int],
        padding: list[int],
        eps: float,
        batch_stats: bool,
        wanted: list[bool],
        dfork: Tensor | None,
        paths: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        _, dweight, dbias = torch.ops.aten.convolution_backward(
            dout, x, weight, [weight.shape[0]], stride, padding, [1, 1], False, [0, 0], 1, [False, wanted[1], wanted[2]]
        )
        channels = x.shape[1]
        return (
            _dense_like(x) if wanted[0] else x.new_empty([0]),
            _vector(x, channels) if wanted[0] else x.new_empty([0]),
            _vector(x, channels) if wanted[0] else x.new_empty([0]),
            dweight if wanted[1] else x.new_empty([0]),
            dbias if wanted[2] else x.new_empty([0]),
        )

    @flops(torch.ops.ran_ext._chained_bn_relu_conv2d)
    def _(
        x: Any,
        bn_weight: Any,
        bn_bias: Any,
        mean: Any,
        var: Any,
        batch_stats: Any,
        running: Any,
        momentum: Any,
        eps: Any,
        weight: Any,
        *args: Any,
        out_shape: Any,
        **kwargs: Any,
    ) -> int:
        return conv_flop_count(x, weight, out_shape[0])

    @flops(torch.ops.ran_ext.conv2d)
    def _(x: Any, weight: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        return conv_flop_count(x, weight, out_shape)

    @flops(torch.ops.ran_ext.conv2d_backward)
    def _(dout: Any, x: Any, weight: Any, stride: Any, padding: Any, wanted: Any, *args: Any, **kwargs: Any) -> int:
        return conv_flop_count(x, weight, dout) * (int(wanted[0]) + int(wanted[1]))

    @flops(torch.ops.ran_ext.conv_attention_gate)
    def _(trunk: Any, x: Any, weight: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        return conv_flop_count(x, weight, out_shape[1])

    @flops(torch.ops.ran_ext.bn_relu_conv2d_backward)
    def _(
        dout: Any,
        x: Any,
        bn_weight: Any,
        bn_bias: Any,
        mean: Any,
        var: Any,
        weight: Any,
        stride: Any,
        padding: Any,
        eps: Any,
        batch_stats: Any,
        wanted: Any,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        return conv_flop_count(x, weight, dout) * (int(wanted[0]) + int(wanted[1]))


def _format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _gate_like(trunk: Tensor, scale_factor: int) -> Tensor:
    return torch.empty_like(trunk) if scale_factor == 1 else _dense_like(trunk)


if _backend._C is not None:
    _register()
