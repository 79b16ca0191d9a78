#!/usr/bin/env python
"""What ``ran_ext.tune`` gains on this CPU: training steps of a network, tuned and by the rule on paper, interleaved.

The network is tuned first, and stays so on this machine. Both kinds of step run on one network and the same images;
"times as fast" is the median of the rounds' ratios, milliseconds are the least of the rounds. One thread is timed by
the processor time that it takes, which other programs disturb little; several by the clock.

python -m benchmarks.tuned --out FILE
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import ran_ext
from ran_ext import _backend
from ran_ext._command import Parser
from ran_ext._measured import CPU

from . import isa
from .table import Table
from .timing import interleave, ratios


def measure(options: argparse.Namespace, batch: int, dtype: torch.dtype) -> list[str | float]:
    """A row: passes, those of another path, milliseconds by rule and tuned, times as fast, quartiles."""
    torch.manual_seed(0)
    model = ran_ext.models.create_model(options.model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,))
    kernels: Any = _backend._C

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    def step(measured: list[Any]) -> Callable[[], None]:
        def run() -> None:
            kernels.set_measured(CPU, measured, [])
            model.zero_grad()
            with autocast():
                loss = F.cross_entropy(model(images), labels)
            loss.backward()

        return run

    with autocast():
        tuning = ran_ext.tune(model, images)
    rows = [(one.shape, one.times) for one in tuning.passes]
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    steps = {"rule": step([]), "tuned": step(rows)}
    seconds = interleave(steps, options.rounds, torch.device("cpu"), warm_up=2, clock=clock)
    gain = ratios(seconds, "rule")["tuned"]
    least = [1e3 * min(seconds[kind]) for kind in ("rule", "tuned")]
    return [len(rows), len(tuning.changed), *least, gain.median, f"{gain.q25:.2f} to {gain.q75:.2f}"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each batch and dtype."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", choices=ran_ext.models.list_models(), default="ran_compact")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    options = isa.parse(parser, argv)
    torch.set_num_threads(options.threads)
    columns = ["batch", "dtype", "passes", "of another path", "by rule, ms", "tuned, ms", "times as fast", "quartiles"]
    table = Table(f"training step, {options.model}, channels_last", columns, options.out)
    for batch in options.batch:
        for dtype in (torch.float32, torch.bfloat16):
            table.add(batch, str(dtype).removeprefix("torch."), *measure(options, batch, dtype))


if __name__ == "__main__":
    main()
