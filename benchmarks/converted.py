#!/usr/bin/env python
"""What ``ran_ext.convert`` gains on other people's networks, on the CPU: training steps and bytes kept, float32.

Each network as it is written, in channels_last, against a converted copy, interleaved in one run.

python -m benchmarks.converted --rounds 9 --out benchmarks/results/cpu_convert.json
python -m benchmarks.converted --isa avx2                   the same as on a processor without AVX-512
python -m benchmarks.converted --compiled --network PreActResNet-18 DenseNet-BC-100-12      both under torch.compile
python -m benchmarks.converted --overhead                   what a converted layer costs beside its kernels
"""

from __future__ import annotations

import contextlib
import copy
import io
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import ran_ext
from ran_ext._command import Parser
from ran_ext._compare import bytes_kept

from . import isa
from .other_cnns import UNet, densenet_bc, preact_resnet18, resnet18, resnet50, silu_stack, vgg16_bn, wide_resnet
from .table import Table
from .timing import interleave

#: Name, network, batch, pixels.
NETWORKS: list[tuple[str, Callable[[], nn.Module], int, int]] = [
    ("ResNet-18", resnet18, 16, 128),
    ("ResNet-18, 224 pixels", resnet18, 16, 224),
    ("ResNet-50", resnet50, 16, 128),
    ("VGG-16 with batch normalisation", vgg16_bn, 16, 64),
    ("PreActResNet-18", preact_resnet18, 32, 32),
    ("WRN-16-4", lambda: wide_resnet(16, 4), 32, 32),
    ("U-Net, width 32", lambda: UNet(32), 8, 64),
    ("DenseNet-BC-100-12", densenet_bc, 16, 32),
    ("SiLU stack", silu_stack, 16, 64),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row a network."""
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    parser.add_argument("--network", nargs="+", choices=[row[0] for row in NETWORKS], help="these alone")
    parser.add_argument("--compiled", action="store_true", help="eager, compiled, and converted and compiled")
    parser.add_argument("--overhead", action="store_true", help="microseconds a layer on tiny tensors")
    options = isa.parse(parser, argv)
    if options.overhead:
        return overhead(options.out)
    chosen = [row for row in NETWORKS if not options.network or row[0] in options.network]
    if options.compiled:
        return compiled(chosen, options.rounds, options.out)
    columns = ["network", "batch", "pixels", "eager, ms", "converted, ms", "times as fast", "bytes kept, of eager's"]
    table = Table("training step, float32, channels_last", columns, options.out)
    for name, build, batch, pixels in chosen:
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            found = ran_ext.compare(build(), torch.randn(batch, 3, pixels, pixels), rounds=options.rounds)
        milliseconds = 1e3 * found.plain_seconds, 1e3 * found.converted_seconds
        table.add(name, batch, pixels, *milliseconds, found.speedup, found.converted_bytes / found.plain_bytes)


def compiled(chosen: Sequence[tuple[str, Callable[[], nn.Module], int, int]], rounds: int, out: Path | None) -> None:
    """Print a row a network: as it is written, under ``torch.compile``, and converted under ``torch.compile``."""
    columns = ["network", "batch", "pixels", "eager, ms", "compiled, ms", "converted and compiled, ms"]
    columns += ["times as fast as eager", "as compiled", "bytes kept compiled, of eager's", "converted and compiled"]
    table = Table("training step, float32, channels_last, torch.compile", columns, out)
    for name, build, batch, pixels in chosen:
        torch.manual_seed(0)
        plain = build().train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn(batch, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
        networks = {
            "eager": plain,
            "compiled": torch.compile(copy.deepcopy(plain)),
            "converted": torch.compile(ran_ext.convert(copy.deepcopy(plain))),
        }
        steps = {key: partial(step, network, x) for key, network in networks.items()}
        seconds = interleave(steps, rounds, torch.device("cpu"))
        kept = {key: bytes_kept(network, [x]) for key, network in networks.items()}
        milliseconds = [1e3 * statistics.median(times) for times in seconds.values()]
        ratios = [
            statistics.median(a / b for a, b in zip(seconds[key], seconds["converted"], strict=True))
            for key in ("eager", "compiled")
        ]
        shares = [kept[key] / kept["eager"] for key in ("compiled", "converted")]
        table.add(name, batch, pixels, *milliseconds, *ratios, *shares)


def overhead(out: Path | None, layers: int = 20, rounds: int = 400) -> None:
    """Print what a BN-ReLU-convolution of 8 channels and 4 pixels takes, one thread: nearly all of it is calls."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False))]
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), *parts).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    networks = {"eager": plain, "converted": ran_ext.convert(copy.deepcopy(plain))}
    steps = {name: partial(step, network, x) for name, network in networks.items()}
    seconds = interleave(steps, rounds, torch.device("cpu"))
    eager, converted = (1e6 * min(times) / layers for times in seconds.values())  # the least: what is more is waiting
    columns = ["layers", "eager, us a layer", "converted, us a layer", "more, us a layer"]
    Table("forward and backward, the least of the rounds", columns, out).add(
        layers, eager, converted, converted - eager
    )


def step(network: nn.Module, x: Tensor) -> None:
    """Forward and backward."""
    network.zero_grad(set_to_none=True)
    network(x).sum().backward()


if __name__ == "__main__":
    main()
