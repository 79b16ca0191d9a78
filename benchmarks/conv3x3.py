#!/usr/bin/env python
"""Measures 3x3 convolutions in float32 on the CPU against PyTorch's, pass by pass, interleaved in one run.

Ours has batch normalisation and ReLU before it and their gradients behind it; PyTorch's is the convolution alone, and
so is NNPACK's, which torch carries for NCHW tensors, forward only.

python -m benchmarks.conv3x3 --rounds 21
python -m benchmarks.conv3x3 --isa avx2     the same as on a processor with AVX2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import ran_ext
from ran_ext._command import Parser
from ran_ext._explain import layers
from ran_ext.nn import BNReLUConv2d

from . import isa
from .table import Table
from .timing import Spread, interleave, ratios

#: Channels (in and out), pixels along a side.
SIZES = [
    (32, 32), (64, 32), (64, 56), (64, 16), (64, 14), (64, 7), (96, 28), (128, 16), (128, 15), (128, 8), (256, 8),
    (256, 7), (256, 4), (512, 7), (512, 4), (24, 32), (40, 28), (48, 57), (100, 15),
]  # fmt: skip


def functions(channels: int, pixels: int, batch: int) -> dict[str, dict[str, Callable[[], object]]]:
    """For each task the calls of both, by name; tensors are channels_last."""
    ours, aten = torch.ops.ran_ext, torch.ops.aten

    def drawn(*size: int) -> Tensor:
        return torch.randn(size).to(memory_format=torch.channels_last)

    x, weight = drawn(batch, channels, pixels, pixels), drawn(channels, channels, 3, 3)
    dout = torch.randn_like(x)
    mean, var, one = torch.zeros(channels), torch.ones(channels), [1, 1]
    x_nchw, weight_nchw = x.contiguous(), weight.contiguous()  # all that NNPACK takes
    return {
        "forward": {
            "PyTorch": lambda: aten.convolution(x, weight, None, one, one, one, False, [0, 0], 1),
            "NNPACK": lambda: torch._nnpack_spatial_convolution(x_nchw, weight_nchw, None, one),
            "ran_ext": lambda: ours.bn_relu_conv2d(x, weight, running=[], mean=mean, var=var, padding=one),
        },
        "backward": {
            "PyTorch": lambda: aten.convolution_backward(
                dout, x, weight, None, one, one, one, False, [0, 0], 1, [True, True, False]
            ),
            "ran_ext": lambda: ours.bn_relu_conv2d_backward(
                dout, x, None, None, mean, var, weight, one, one, 1e-5, False, [True, True, False], None
            ),
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mode", choices=["fast", "strict", "library"], default="fast", help="of set_conv3x3")
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    options = isa.parse(parser, argv)
    device = torch.device("cpu")
    columns = ["channels", "pixels", "PyTorch, ms", "ran_ext, ms", "forward", "backward", "both"]
    columns += ["forward, NNPACK", "taken"]
    title = f"3x3 convolutions, batch {options.batch}, set_conv3x3({options.mode!r}), times as fast"
    table, gains, over_nnpack = Table(title, columns, options.out), [], []
    with ran_ext.set_conv3x3(options.mode), torch.no_grad():
        for channels, pixels in SIZES:
            x = torch.zeros(options.batch, channels, pixels, pixels).to(memory_format=torch.channels_last)
            [row] = layers(BNReLUConv2d(channels, channels, 3, padding=1), x)
            total, gain = {"PyTorch": 0.0, "ran_ext": 0.0}, {}
            for task, calls in functions(channels, pixels, options.batch).items():
                if not torch._nnpack_available():
                    calls.pop("NNPACK", None)
                seconds = interleave(calls, options.rounds, device)
                total = {name: total[name] + Spread.of(seconds[name]).median for name in total}
                gain[task] = ratios(seconds, "PyTorch")["ran_ext"].median
                if "NNPACK" in seconds:
                    over_nnpack.append(ratios(seconds, "NNPACK")["ran_ext"].median)
            gains.append(total["PyTorch"] / total["ran_ext"])
            taken = ", ".join(why.removeprefix("Winograd ") or path for path, why in row.paths.values())
            milliseconds = (1e3 * seconds for seconds in total.values())
            table.add(
                f"{channels}",
                f"{pixels}",
                *milliseconds,
                gain["forward"],
                gain["backward"],
                gains[-1],
                over_nnpack[-1] if over_nnpack else "",
                taken,
            )
    means = [math.exp(sum(map(math.log, of)) / len(of)) if of else "" for of in (gains, over_nnpack)]
    table.add("geometric mean", "", "", "", "", "", *means, f"least {min(gains):.2f}")


if __name__ == "__main__":
    main()
