#!/usr/bin/env python
"""The package's networks on the CPU: forward and backward passes against plain PyTorch, interleaved, and bytes kept.

All three run one network: by the kernels, as plain PyTorch (the reference backend), and that by ``torch.compile``.

python -m benchmarks.networks --out FILE
python -m benchmarks.networks --model attention56 --pixels 224 --batch 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import ran_ext
from ran_ext._command import Parser
from ran_ext._compare import bytes_kept

from . import isa
from .contenders import on_backend
from .table import Table
from .timing import interleave, ratios

#: Network, batch, pixels.
NETWORKS = [("attention56", 8, 224), ("attention92_cifar", 32, 32), ("vgg16_attention", 32, 32)]
COLUMNS = ["network", "batch", "pixels", "eager, ms", "compile, ms", "ran_ext, ms", "over eager", "over compile"]


def measure(name: str, batch: int, pixels: int, options: argparse.Namespace) -> list[str | float]:
    """A row: least milliseconds, medians of the rounds' ratios, and bytes kept over plain PyTorch's."""
    torch.manual_seed(0)
    model = ran_ext.models.create_model(name, num_classes=10)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,))

    def passes(backend: str, network: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad()
            F.cross_entropy(network(images), labels).backward()

        return on_backend(step, backend)

    found = {"eager": passes("reference", model), "ran_ext": passes("native", model)}
    if not options.no_compile:
        found["compile"] = passes("reference", torch.compile(model, dynamic=False))
    seconds = interleave(found, options.rounds, torch.device("cpu"), warm_up=1)
    own = {base: ratios(seconds, base)["ran_ext"].median for base in found}
    kept = [_bytes(backend, model, images) for backend in ("native", "reference")]
    cells: list[str | float] = [
        1e3 * min(seconds[of]) if of in seconds else "" for of in ("eager", "compile", "ran_ext")
    ]
    return [name, batch, pixels, *cells, own["eager"], own.get("compile", ""), kept[0] / kept[1]]


def _bytes(backend: str, model: nn.Module, images: torch.Tensor) -> int:
    with ran_ext.set_backend(backend):
        return bytes_kept(model, (images,))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row a network."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", choices=ran_ext.models.list_models(), default=None, help="this one alone")
    parser.add_argument("--batch", type=int, default=8, help="with --model (default 8)")
    parser.add_argument("--pixels", type=int, default=224, help="with --model (default 224)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    options = isa.parse(parser, argv)
    table = Table("forward and backward, float32, channels_last", [*COLUMNS, "bytes kept, of eager's"], options.out)
    chosen = [(options.model, options.batch, options.pixels)] if options.model else NETWORKS
    for name, batch, pixels in chosen:
        table.add(*measure(name, batch, pixels, options))


if __name__ == "__main__":
    main()
