#!/usr/bin/env python
"""Times a split of 3x3 convolutions of stride 2 into stride 1 (Huang et al. 2020, arXiv:2002.00552) against PyTorch's.

The split is made of what is here: the four pixels of a 2x2 square become channels, the weight 2x2 taps of each, and the
3x3 kernels take them with zeros for the taps that are missing. They use 36 points for a tile where F(4x4, 2x2), which a
split asks for, would use 25: the last column is what that could gain at best.

python -m benchmarks.strided --rounds 9
python -m benchmarks.strided --isa avx2     as on a processor with AVX2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import ran_ext
from ran_ext._command import Parser

from . import isa
from .table import Table
from .timing import Spread, interleave, ratios

#: Channels in, channels out, pixels along a side: ResNet-18's at 224 pixels, ran_compact's.
SIZES = ((64, 128, 56), (128, 256, 28), (256, 512, 14), (32, 32, 32), (64, 64, 16), (128, 128, 8))


def split(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv2d(x, weight, stride=2, padding=1)`` of an even number of pixels, by a convolution of stride 1.

    >>> x, weight = torch.randn(1, 16, 8, 8).double(), torch.randn(16, 16, 3, 3).double()
    >>> torch.testing.assert_close(split(x, weight), F.conv2d(x, weight, stride=2, padding=1))
    """
    squares = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
    # Row 2 i - 1 is the second of the square before, 2 i and 2 i + 1 are those of square i: taps -1 and 0 of a square.
    taps = F.pad(weight, (1, 0, 1, 0)).unfold(2, 2, 2).unfold(3, 2, 2)  # c_out, c_in, tap, tap, row, column
    taps = taps.permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
    taps = F.pad(taps, (0, 1, 0, 1)).contiguous(memory_format=torch.channels_last)
    return ran_ext.ops.conv2d(squares, taps, padding=1)


def step(convolve: Callable[..., Tensor], x: Tensor, weight: Tensor, dout: Tensor) -> None:
    """Forward and both gradients."""
    torch.autograd.grad(convolve(x, weight), (x, weight), dout)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row a size."""
    parser = Parser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    options = isa.parse(parser, argv)
    columns = ["in", "out", "pixels", "PyTorch, ms", "split, ms", "times as fast", "with 25 points for 36, at best"]
    table = Table(f"3x3 convolutions of stride 2, forward and backward, batch {options.batch}", columns, options.out)
    for c_in, c_out, pixels in SIZES:
        n, half = options.batch, pixels // 2
        sizes = (n, c_in, pixels, pixels), (c_out, c_in, 3, 3), (n, c_out, half, half)
        x, weight, dout = (torch.randn(size).to(memory_format=torch.channels_last) for size in sizes)
        given = x.requires_grad_(), weight.requires_grad_(), dout
        calls = {
            "PyTorch": partial(step, partial(F.conv2d, stride=2, padding=1), *given),
            "split": partial(step, split, *given),
        }
        seconds = interleave(calls, options.rounds, torch.device("cpu"))
        gain = ratios(seconds, "PyTorch")["split"].median
        milliseconds = (1e3 * Spread.of(values).median for values in seconds.values())
        table.add(f"{c_in}", f"{c_out}", f"{pixels}", *milliseconds, gain, gain * 36 / 25)


if __name__ == "__main__":
    main()
