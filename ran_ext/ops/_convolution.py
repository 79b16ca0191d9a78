"""``F.conv2d`` around two faults of oneDNN; ``csrc/conv/library.h`` is the same for the compiled ops."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .. import _tracing


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
) -> Tensor:
    """``F.conv2d(x, weight, bias, stride, padding)``; where its derivative is faulty, of the pixels that it reads.

    oneDNN in torch 2.13 and 2.14, on a processor with AVX2 and no AVX-512, writes beyond its workspace in the weight
    gradient of a channels_last 1x1 convolution with a stride and fewer than 8 input channels: docs/upstream.md.
    """
    if _tracing.is_symbolic(x):
        return F.conv2d(x, weight, bias, stride, padding)
    strides = bounded((stride, stride) if isinstance(stride, int) else stride, x, weight, padding)
    if is_faulty(x, weight, strides, padding):
        return F.conv2d(x[..., :: strides[0], :: strides[1]], weight, bias)
    return F.conv2d(x, weight, bias, strides, padding)


def bounded(stride: tuple[int, int], x: Tensor, weight: Tensor, padding: int | tuple[int, int]) -> tuple[int, int]:
    """``stride``, no larger than it takes to read one pixel: far beyond that oneDNN's derivative divides by 0."""
    if max(stride) < 256:
        return stride
    pads = (padding, padding) if isinstance(padding, int) else padding
    high, wide = (min(s, x.shape[2 + i] + 2 * pads[i] - weight.shape[2 + i] + 1) for i, s in enumerate(stride))
    return high, wide


def is_faulty(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: int | tuple[int, int]) -> bool:
    """Whether the library's convolution of ``x`` has a derivative that writes where it must not."""
    return x.device.type == "cpu" and has_fault(tuple(weight.shape), stride, padding)


def has_fault(weight: tuple[int, ...], stride: tuple[int, int], padding: int | tuple[int, int] | str) -> bool:
    """The same of a weight of this shape, on a CPU."""
    return weight[1] < 8 and weight[2:] == (1, 1) and max(stride) > 1 and padding in (0, (0, 0), [0, 0])
