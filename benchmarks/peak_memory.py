#!/usr/bin/env python
"""Peak resident memory and time of a training step of DenseNet-121 on the CPU: as written, checkpointed, and converted.

Each is measured in a process of its own, by turns. "checkpointed" is what torchvision does with memory_efficient=True.

python -m benchmarks.peak_memory --out FILE
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

import ran_ext
from ran_ext._command import Parser

from .other_cnns import densenet121
from .table import Table
from .timing import Spread

KINDS = ("as written", "checkpointed", "converted")


def measure(kind: str, batch: int, pixels: int, steps: int) -> dict[str, float]:
    """Seconds of a step, and MiB that the process held at most, beyond what it held before the first."""
    torch.manual_seed(0)
    model = densenet121(checkpointed=kind == "checkpointed")
    model = ran_ext.convert(model) if kind == "converted" else model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,))
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(steps + 1):
        began = time.perf_counter()
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        seconds.append(time.perf_counter() - began)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": Spread.of(seconds[1:]).median, "MiB": held / 1024, "step MiB": (held - before) / 1024}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row a kind."""
    parser = Parser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--steps", type=int, default=2, help="timed in a process, after the first")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind")
    parser.add_argument("--kind", choices=KINDS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    options = parser.parse_args(argv)
    size = options.batch, options.pixels, options.steps
    if options.kind:
        return print(json.dumps(measure(options.kind, *size)))
    columns = [
        "DenseNet-121",
        "batch",
        "pixels",
        "s a step",
        "of eager's",
        "MiB",
        "of eager's",
        "of the step alone",
    ]
    table = Table("training step, float32, channels_last", columns, options.out)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    flags = [f"--{name}={value}" for name, value in zip(("batch", "pixels", "steps"), size, strict=True)]
    for _ in range(options.rounds):
        for kind in KINDS:
            command = [sys.executable, "-m", "benchmarks.peak_memory", "--kind", kind, *flags]
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[kind].append(json.loads(ran.stdout))
    medians = {
        kind: {what: Spread.of([one[what] for one in rows]).median for what in rows[0]} for kind, rows in found.items()
    }
    first = medians[KINDS[0]]
    for kind, own in medians.items():
        shares = [own[what] / first[what] for what in ("seconds", "MiB")]
        table.add(
            kind, options.batch, options.pixels, own["seconds"], shares[0], own["MiB"], shares[1], own["step MiB"]
        )


if __name__ == "__main__":
    main()
