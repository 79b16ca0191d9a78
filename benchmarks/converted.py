#!/usr/bin/env python
"""What ``ran_ext.convert`` gains on other people's networks, on the CPU: training steps and bytes kept, float32.

Each network as it is written, in channels_last, against a converted copy, interleaved in one run.

python -m benchmarks.converted --rounds 9 --out benchmarks/results/cpu_convert.json
python -m benchmarks.converted --isa avx2                   the same as on a processor without AVX-512
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

import ran_ext
from ran_ext._command import Parser

from . import isa
from .other_cnns import UNet, densenet_bc, preact_resnet18, resnet18, silu_stack, vgg16_bn, wide_resnet
from .table import Table

#: Name, network, batch, pixels.
NETWORKS: list[tuple[str, Callable[[], nn.Module], int, int]] = [
    ("ResNet-18", resnet18, 16, 128),
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
    options = isa.parse(parser, argv)
    columns = ["network", "batch", "pixels", "eager, ms", "converted, ms", "times as fast", "bytes kept, of eager's"]
    table = Table("training step, float32, channels_last", columns, options.out)
    for name, build, batch, pixels in NETWORKS:
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            found = ran_ext.compare(build(), torch.randn(batch, 3, pixels, pixels), rounds=options.rounds)
        milliseconds = 1e3 * found.plain_seconds, 1e3 * found.converted_seconds
        table.add(name, batch, pixels, *milliseconds, found.speedup, found.converted_bytes / found.plain_bytes)


if __name__ == "__main__":
    main()
