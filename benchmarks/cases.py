"""The ops at the shapes that ``ran_compact`` gives them: inputs, both implementations, traffic and operations."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ran_ext import ops


class Case(Protocol):
    """One op at one shape. ``plain`` and ``ours`` take what ``inputs`` gives."""

    @property
    def name(self) -> str:
        """Op and shape."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the first input, NCHW."""

    def inputs(self, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> tuple[Tensor, ...]:
        """Seeded inputs, the same numbers in each dtype; those that are differentiated require gradients."""

    def plain(self, *inputs: Any) -> Tensor:
        """As written with PyTorch's own ops."""

    def ours(self, *inputs: Any) -> Tensor:
        """Through :mod:`ran_ext.ops`."""

    def passes(self, backward: bool) -> float:
        """Tensors of the size of the first input that must be read or written at least; 0 where compute bounds it."""

    def flops(self, backward: bool) -> int:
        """Floating-point operations of the convolution; 0 where memory bounds the op."""


def draw(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
) -> Tensor:
    """Normal numbers that bfloat16 holds exactly, so that all dtypes compute with the same ones."""
    values = torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).bfloat16()
    return values.to(dtype, memory_format=layout)


@dataclasses.dataclass(frozen=True)
class Gate:
    """``attention_gate``, its mask at 1 / ``scale`` of the resolution."""

    shape: tuple[int, int, int, int]
    scale: int
    interpolation: str = "nearest"

    @property
    def name(self) -> str:
        of = " bilinear" if self.interpolation == "bilinear" else ""
        return f"attention_gate {_size(self.shape)} scale {self.scale}{of}"

    def inputs(self, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> tuple[Tensor, ...]:
        n, c, h, w = self.shape
        sizes = self.shape, (n, c, h // self.scale, w // self.scale)
        return tuple(draw(size, seed, dtype, device, layout).requires_grad_() for seed, size in enumerate(sizes))

    def plain(self, trunk: Tensor, mask: Tensor) -> Tensor:
        if self.scale != 1:
            mask = F.interpolate(mask, scale_factor=float(self.scale), mode=self.interpolation)
        return (1 + torch.sigmoid(mask)) * trunk

    def ours(self, trunk: Tensor, mask: Tensor) -> Tensor:
        return ops.attention_gate(trunk, mask, self.scale, self.interpolation)

    def passes(self, backward: bool) -> float:
        mask = 1 / self.scale**2
        return 2 + mask + (3 + 2 * mask if backward else 0)

    def flops(self, backward: bool) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class ConvGate:
    """``conv_attention_gate``: the mask's last convolution at half the resolution, and the gate."""

    shape: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"conv_attention_gate {_size(self.shape)}"

    def inputs(self, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> tuple[Tensor, ...]:
        n, c, h, w = self.shape
        trunk, x = (draw(s, i, dtype, device, layout) for i, s in enumerate((self.shape, (n, c, h // 2, w // 2))))
        weight = draw((c, c, 1, 1), 2, dtype, device, layout) / 2 ** round(c.bit_length() / 2)
        bias = draw((c,), 3, dtype, device, torch.contiguous_format)
        return tuple(t.requires_grad_() for t in (trunk, x, weight, bias))

    def plain(self, trunk: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mask = F.interpolate(F.conv2d(x, weight, bias), scale_factor=2.0, mode="nearest")
        return (1 + torch.sigmoid(mask)) * trunk

    def ours(self, trunk: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.conv_attention_gate(trunk, x, weight, bias, 2)

    def passes(self, backward: bool) -> float:
        return 7 if backward else 2.5

    def flops(self, backward: bool) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class MaxPool:
    """``max_pool2d``."""

    shape: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"max_pool2d {_size(self.shape)}"

    def inputs(self, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> tuple[Tensor, ...]:
        return (draw(self.shape, 0, dtype, device, layout).requires_grad_(),)

    def plain(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2, ceil_mode=True)

    def ours(self, x: Tensor) -> Tensor:
        return ops.max_pool2d(x)

    def passes(self, backward: bool) -> float:
        return 2.5 if backward else 1.25  # and the index, whose share depends on the dtype

    def flops(self, backward: bool) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class UpsampleAdd:
    """``upsample_add`` with a skip of twice the lower's ``shape``."""

    shape: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"upsample_add {_size(self.shape)}"

    def inputs(self, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> tuple[Tensor, ...]:
        n, c, h, w = self.shape
        sizes = self.shape, (n, c, 2 * h, 2 * w)
        return tuple(draw(size, seed, dtype, device, layout).requires_grad_() for seed, size in enumerate(sizes))

    def plain(self, lower: Tensor, skip: Tensor) -> Tensor:
        return F.interpolate(lower, scale_factor=2.0, mode="nearest") + skip

    def ours(self, lower: Tensor, skip: Tensor) -> Tensor:
        return ops.upsample_add(lower, skip)

    def passes(self, backward: bool) -> float:
        return 14 if backward else 9  # the skip's gradient is dout itself

    def flops(self, backward: bool) -> int:
        return 0


class _BatchNorm:
    shape: tuple[int, int, int, int]

    def batch_norm(self, layout: torch.memory_format, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """x, weight, bias and running statistics; the vectors stay float32 (float64 for float64), as under autocast."""
        vector = torch.promote_types(dtype, torch.float32)
        c, flat = self.shape[1], torch.contiguous_format
        x = draw(self.shape, 0, dtype, device, layout).requires_grad_()
        weight = (1 + draw((c,), 1, vector, device, flat) / 4).requires_grad_()
        bias = (draw((c,), 2, vector, device, flat) / 4).requires_grad_()
        return x, weight, bias, torch.zeros(c, dtype=vector, device=device), torch.ones(c, dtype=vector, device=device)


@dataclasses.dataclass(frozen=True)
class BNReLU(_BatchNorm):
    """``bn_relu`` in training."""

    shape: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"bn_relu {_size(self.shape)}"

    def inputs(self, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> tuple[Tensor, ...]:
        return self.batch_norm(layout, dtype, device)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, mean, var, weight, bias, training=True))

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return ops.bn_relu(x, weight, bias, mean, var, training=True)

    def passes(self, backward: bool) -> float:
        return 5 if backward else 2

    def flops(self, backward: bool) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class BNReLUConv(_BatchNorm):
    """``bn_relu_conv2d`` in training, with a bias, padded to keep the size."""

    shape: tuple[int, int, int, int]
    out_channels: int
    kernel: int

    @property
    def name(self) -> str:
        k, (_, c, _, _) = self.kernel, self.shape
        return f"bn_relu_conv2d {_size(self.shape)} {k}x{k} {c}-{self.out_channels}"

    def inputs(self, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> tuple[Tensor, ...]:
        size = (self.out_channels, self.shape[1], self.kernel, self.kernel)
        weight = draw(size, 3, dtype, device, layout) / 2 ** round((size[1] * self.kernel**2).bit_length() / 2)
        bias = draw((self.out_channels,), 4, dtype, device, torch.contiguous_format)
        return *self.batch_norm(layout, dtype, device), weight.requires_grad_(), bias.requires_grad_()

    def plain(self, x: Tensor, *tensors: Tensor) -> Tensor:
        bn_weight, bn_bias, mean, var, weight, bias = tensors
        a = F.relu(F.batch_norm(x, mean, var, bn_weight, bn_bias, training=True))
        return F.conv2d(a, weight, bias, padding=self.kernel // 2)

    def ours(self, *tensors: Tensor) -> Tensor:
        return ops.bn_relu_conv2d(*tensors, padding=self.kernel // 2, training=True)  # type: ignore[misc]

    def passes(self, backward: bool) -> float:
        return 0

    def flops(self, backward: bool) -> int:
        n, c, h, w = self.shape
        return (3 if backward else 1) * 2 * n * h * w * c * self.out_channels * self.kernel**2


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


#: The seven BN-ReLU-convolutions that make up the network: channels, side of the image, channels out, kernel.
UNITS = (
    (128, 16, 128, 1),
    (128, 16, 128, 3),
    (256, 8, 256, 1),
    (256, 8, 256, 3),
    (1024, 4, 64, 1),
    (64, 4, 64, 3),
    (64, 4, 1024, 1),
)


def units(batch: int) -> list[BNReLUConv]:
    """The network's seven BN-ReLU-convolutions.

    >>> len(units(32)), units(32)[0].name
    (7, 'bn_relu_conv2d 32x128x16x16 1x1 128-128')
    """
    return [BNReLUConv((batch, c, side, side), out, kernel) for c, side, out, kernel in UNITS]


def op_cases(batch: int) -> list[Case]:
    """The gates, alone and with the convolution before them, the masks' pyramid, BN-ReLU, and BN-ReLU-conv.

    At the network's seven shapes, of which four are distinct without the convolution.

    >>> [case.name for case in op_cases(32)][:2]
    ['attention_gate 32x128x16x16 scale 1', 'attention_gate 32x128x16x16 scale 2']
    """
    convs = units(batch)
    wide, deep = convs[0].shape, convs[2].shape
    norms = [BNReLU(shape) for shape in dict.fromkeys(conv.shape for conv in convs)]
    pyramid: list[Case] = [MaxPool(wide), MaxPool(deep), UpsampleAdd((batch, 128, 4, 4))]
    gates = [Gate(wide, 1), Gate(wide, 2), Gate(deep, 1), Gate((batch, 256, 28, 28), 2, "bilinear")]
    return [*gates, *conv_gates(batch), *pyramid, *norms, *convs]


def conv_gates(batch: int) -> list[ConvGate]:
    """The network's two gates, each with its mask's last convolution."""
    return [ConvGate((batch, 128, 16, 16)), ConvGate((batch, 256, 8, 8))]


def large_gates() -> list[Case]:
    """The gate on tensors of 256 MiB in 16 bits, larger than any cache: its time is memory traffic."""
    return [Gate((4096, 128, 16, 16), scale) for scale in (1, 2)]
