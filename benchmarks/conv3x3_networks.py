#!/usr/bin/env python
"""Measures training steps of other networks on the CPU, float32, batch 32, channels_last, interleaved in one run.

ResNet-18 at 128 pixels and VGG-16 at 64 in plain PyTorch, with their 3x3 convolutions by ``ran_ext.ops.conv2d`` against
PyTorch's; and residual units of several widths, by ran_ext against plain PyTorch.

python -m benchmarks.conv3x3_networks --rounds 9 --compile
python -m benchmarks.conv3x3_networks --isa avx2     as on a processor with AVX2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ran_ext
from ran_ext._command import Parser
from ran_ext.nn import ResidualUnit

from . import isa
from .other_cnns import resnet18, vgg16_bn
from .table import Table
from .timing import Spread, interleave, ratios

#: Channels of the networks of residual units.
WIDTHS = (24, 40, 48, 96, 100)


def unit_network(width: int) -> nn.Module:
    """Three residual units of ``width`` channels throughout."""
    units = [ResidualUnit(width, width, width) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *units, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def step(model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> None:
    """Forward and backward; gradients add up, alike for all."""
    F.cross_entropy(model(x), labels).backward()


def plainly(call: Callable[[], None]) -> None:
    """A call with the reference backend."""
    with ran_ext.set_backend("reference"):
        call()


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line a network."""
    parser = Parser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the plain network")
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    options = isa.parse(parser, argv)
    rivals = ["eager", *(["compile"] if options.compile else [])]
    columns = [
        "network",
        "ran_ext, ms",
        *(f"{rival}, ms" for rival in rivals),
        *(f"of {rival}'s speed" for rival in rivals),
    ]
    table = Table(f"training step, float32, batch {options.batch}, channels_last", columns, options.out)

    def measure(name: str, pixels: int, ours: nn.Module, plain: nn.Module, in_ran_ext: bool) -> None:
        x = torch.randn(options.batch, 3, pixels, pixels).to(memory_format=torch.channels_last)
        labels = torch.randint(10, (options.batch,))
        plain.load_state_dict(ours.state_dict())
        ours, plain = (model.to(memory_format=torch.channels_last) for model in (ours, plain))  # type: ignore[call-overload]
        eager = partial(step, plain, x, labels)
        calls = {"eager": partial(plainly, eager) if in_ran_ext else eager, "ran_ext": partial(step, ours, x, labels)}
        if options.compile:
            compiled = partial(step, torch.compile(plain), x, labels)
            calls["compile"] = partial(plainly, compiled) if in_ran_ext else compiled
        seconds = interleave(calls, options.rounds, torch.device("cpu"), warm_up=2)
        milliseconds = (1e3 * Spread.of(seconds[one]).median for one in ("ran_ext", *rivals))
        table.add(name, *milliseconds, *(ratios(seconds, rival)["ran_ext"].median for rival in rivals))

    conv = ran_ext.ops.conv2d
    measure("ResNet-18, 128 pixels", 128, resnet18(conv), resnet18(), in_ran_ext=False)
    measure("VGG-16, 64 pixels", 64, vgg16_bn(conv), vgg16_bn(), in_ran_ext=False)
    for width in WIDTHS:
        name = f"residual units, {width} channels, 16 pixels"
        measure(name, 16, unit_network(width), unit_network(width), in_ran_ext=True)


if __name__ == "__main__":
    main()
