#!/usr/bin/env python
"""How a training step on the CPU grows with threads, batch and image size, against eager PyTorch, interleaved.

The second column, a matrix product's rate, says what the threads are worth: those of one core share its arithmetic.

python -m benchmarks.scale --out FILE
python -m benchmarks.scale --threads 1 2 4 8 --dtype bfloat16
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

import ran_ext
from ran_ext._command import Parser

from . import isa
from .contenders import on_backend
from .table import Table
from .timing import Spread, interleave, matmul_rate, ratios

#: Batches at 32 pixels, and images' sides at a batch of 8.
BATCHES, PIXELS = (1, 8, 32, 128, 512), (64, 96, 128, 224)
COLUMNS = ["threads", "matrix product, GFLOP/s", "batch", "pixels", "eager, ms", "ran_ext, ms", "times as fast"]


def steps(batch: int, pixels: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Forward and backward passes of ``ran_compact``, as plain PyTorch and by the kernels."""
    torch.manual_seed(0)
    model = ran_ext.models.create_model("ran_compact").to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, pixels, pixels).to(dtype, memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,))

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(images).float(), labels).backward()

    return {"eager": on_backend(step, "reference"), "ran_ext": on_backend(step, "native")}


def measure(table: Table, threads: int, options: argparse.Namespace) -> None:
    """The rows of one number of threads."""
    torch.set_num_threads(threads)
    device, dtype = torch.device("cpu"), getattr(torch, options.dtype)
    rate = matmul_rate(device, torch.float32, 1024) / 1e9
    sizes = [(batch, 32) for batch in options.batch] + [(8, pixels) for pixels in options.pixels]
    for batch, pixels in sizes:
        seconds = interleave(steps(batch, pixels, dtype), options.rounds, device, warm_up=1)
        eager, ours = (1e3 * Spread.of(seconds[name]).median for name in ("eager", "ran_ext"))
        cost = 1e3 * ours / (batch * pixels**2 / 1024)
        table.add(threads, rate, batch, pixels, eager, ours, ratios(seconds, "eager")["ran_ext"].median, cost)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row a size."""
    parser = Parser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--batch", type=int, nargs="*", default=BATCHES, help="at 32 pixels")
    parser.add_argument("--pixels", type=int, nargs="*", default=PIXELS, help="at a batch of 8")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    options = isa.parse(parser, argv)
    title = f"ran_compact, forward and backward, {options.dtype}, channels_last"
    table = Table(title, [*COLUMNS, "ran_ext, us per image and 1,024 pixels"], options.out)
    for threads in options.threads:
        measure(table, threads, options)


if __name__ == "__main__":
    main()
