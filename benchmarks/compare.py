#!/usr/bin/env python
"""Measures ran_ext against plain PyTorch and torch.compile, interleaved in one run; prints ratios of medians.

python benchmarks/compare.py --suite model --out benchmarks/results/cpu_model.json     tables, JSON and a chart
python benchmarks/compare.py --suite model --against benchmarks/results/cpu_model.json a gate: 1 where a ratio got worse
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import Case, op_cases
from contenders import (
    BASELINES,
    Contender,
    Subject,
    contenders,
    model_oracle,
    model_subject,
    network,
    op_oracle,
    op_subject,
    verify,
)
from memory import saved_bytes
from report import Row, read_json, regressions, tables, write_chart, write_json
from timing import Spread, environment, interleave, peaks, ratios

from ran_ext import _backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Comparison:
    """The settings of one run, and its suites, each of which yields rows."""

    def __init__(self, options: argparse.Namespace):
        self.device = torch.device(options.device)
        self.rounds, self.quick = options.rounds, options.quick
        self.batches, self.compiled = options.batch, options.compile
        self.dtypes = [DTYPES[name] for name in options.dtype]
        self.rates: dict[str, float] = {}

    def ops(self) -> Iterator[Row]:
        """Every op at the network's shapes, forward and forward + backward."""
        self.rates = peaks(self.device, [torch.float32, *self.dtypes], self.quick)
        for batch in self.batches:
            for task in ("forward", "forward + backward"):
                for dtype in self.dtypes:
                    yield from self._ops(batch, task, dtype)

    def _ops(self, batch: int, task: str, dtype: torch.dtype) -> Iterator[Row]:
        sums: dict[str, list[float]] = {}
        summed = 0
        for case in self._cases(batch):
            rows = contenders(dtype, self.device, self.compiled, task)
            torch.compiler.reset()  # a new shape is compiled anew, not with symbolic sizes
            subjects = {row.name: op_subject(case, row, task, self.device) for row in rows}
            verify(subjects, dtype, op_oracle(case, task, self.device))
            seconds = self._time(subjects, f"{case.name}, {task}, {_name(dtype)}")
            for row in self._rows("ops", case.name, task, dtype, seconds):
                own = next(contender.dtype for contender in rows if contender.name == row.contender)
                yield self._rated(row, case, task, own)
            if case.flops(False):
                summed += 1
                for name, values in seconds.items():
                    sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * self.rounds), values, strict=True)]
        yield from self._rows("ops", f"bn_relu_conv2d, sum of {summed} shapes, batch {batch}", task, dtype, sums)

    def model(self) -> Iterator[Row]:
        """The training step and inference of ``ran_compact``."""
        for batch in self.batches:
            for task in ("training step", "inference"):
                oracle = model_oracle(task, self.device, batch)
                for dtype in self.dtypes:
                    torch.compiler.reset()
                    rows = contenders(dtype, self.device, self.compiled, task)
                    subjects = {row.name: model_subject(row, task, self.device, batch) for row in rows}
                    verify(subjects, dtype, oracle)
                    seconds = self._time(subjects, f"ran_compact batch {batch}, {task}, {_name(dtype)}")
                    yield from self._rows("model", f"ran_compact batch {batch}", task, dtype, seconds)

    def memory(self) -> Iterator[Row]:
        """Bytes kept between forward and backward: each op, and ``ran_compact`` (on a GPU its peak too)."""
        for batch in self.batches:
            for dtype in self.dtypes:
                for case in self._cases(batch):
                    yield from self._memory(case.name, "saved for backward", dtype, self._op_bytes(case, dtype))
                measured = {row.name: self._model_bytes(row, batch) for row in self._keepers(dtype)}
                yield from self._memory(f"ran_compact batch {batch}", "saved for backward", dtype, measured)
                if self.device.type == "cuda":
                    measured = {row.name: self._peak(row, batch) for row in self._keepers(dtype)}
                    yield from self._memory(f"ran_compact batch {batch}", "peak in a training step", dtype, measured)

    def _keepers(self, dtype: torch.dtype) -> list[Contender]:
        """torch.compile saves what it chooses inside one autograd function; it is compared in time, not here."""
        rows = contenders(dtype, self.device, False, "training step")
        return [row for row in rows if row.dtype == dtype and not row.graph and row.layout == torch.channels_last]

    def _op_bytes(self, case: Case, dtype: torch.dtype) -> dict[str, int]:
        inputs = case.inputs(dtype, torch.channels_last, self.device)
        leaves = inputs[1:] if case.name.startswith("bn_relu") else ()  # x counts: without the op it would be freed
        return {
            BASELINES[0]: saved_bytes(lambda: case.plain(*inputs), leaves),
            "ran_ext": saved_bytes(lambda: case.ours(*inputs), leaves),
        }

    def _model_bytes(self, contender: Contender, batch: int) -> int:
        model = network(contender, self.device, True)
        images = torch.randn(batch, 3, 32, 32, device=self.device).to(memory_format=contender.layout)
        half = contender.dtype != torch.float32

        def forward() -> Any:
            with (
                _backend.set_backend(contender.backend if contender.ours else "auto"),
                torch.autocast(self.device.type, contender.dtype if half else None, enabled=half),
            ):
                return model(images)

        return saved_bytes(forward, [images, *model.parameters(), *model.buffers()])

    def _peak(self, contender: Contender, batch: int) -> int:
        subject = model_subject(contender, "training step", self.device, batch)
        for _ in range(3):
            subject.run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        subject.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _cases(self, batch: int) -> list[Case]:
        cases = op_cases(batch)
        return [cases[0], cases[1], cases[-4], cases[-1]] if self.quick else cases

    def _time(self, subjects: dict[str, Subject], what: str) -> dict[str, list[float]]:
        print(f"timing {what}", file=sys.stderr, flush=True)
        small = not what.startswith("ran_compact")
        functions = {name: subject.run for name, subject in subjects.items()}
        return interleave(functions, self.rounds, self.device, flush=small, warm_up=1 if self.quick else 3)

    def _rows(
        self, suite: str, case: str, task: str, dtype: torch.dtype, seconds: dict[str, list[float]]
    ) -> Iterator[Row]:
        faster = {name: ratios(seconds, name) for name in BASELINES if name in seconds}
        for name, values in seconds.items():
            own = {baseline: spreads[name] for baseline, spreads in faster.items()}
            yield Row(suite, case, task, _name(dtype), name, 1e3 * Spread.of(values).median, "ms", own)

    def _memory(self, case: str, task: str, dtype: torch.dtype, measured: dict[str, int]) -> Iterator[Row]:
        for name, size in measured.items():
            share = size / measured[BASELINES[0]]
            ratio = {BASELINES[0]: Spread(share, share, share)}
            yield Row("memory", case, task, _name(dtype), name, size / 1e6, "MB", ratio)

    def _rated(self, row: Row, case: Case, task: str, dtype: torch.dtype) -> Row:
        """The row with its share of the measured rate that bounds it: least traffic by copy, operations by matmul."""
        backward, seconds = task != "forward", row.value / 1e3
        if case.flops(backward) and self.device.type != "cuda":
            return row
        if case.flops(backward):
            rate = self.rates[f"matmul {_name(dtype)}, GFLOP/s"]
            work, of = case.flops(backward) / 1e9, "matmul"
        else:
            size = case.inputs(dtype, torch.channels_last, torch.device("cpu"))[0].nbytes
            rate = _nearest_copy(self.rates, size / (1 << 20))
            work, of = case.passes(backward) * size / 1e9, "copy"
        return dataclasses.replace(row, percent=(100 * work / seconds / rate, of))


def _nearest_copy(rates: dict[str, float], megabytes: float) -> float:
    sizes = {int(name.split()[1]): rate for name, rate in rates.items() if name.startswith("copy")}
    return sizes[min(sizes, key=lambda size: abs(size - megabytes))]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, with what depends on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=["ops", "model", "memory", "all"], default="all")
    add("--rounds", type=int, default=None, help="samples of each contender (default 15, with --quick 3)")
    add("--threads", type=int, default=None, help="of the CPU (default torch's)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch", type=int, nargs="+", default=None, help="default 32; on CUDA 128 and 1024; with --quick 2")
    add("--dtype", nargs="+", choices=list(DTYPES), default=None, help="default float32 bfloat16; on CUDA float16 too")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--quick", action="store_true", help="a rehearsal: tiny, without torch.compile; its times say nothing")
    add("--out", type=Path, default=None, help="JSON; the chart is drawn beside it")
    add("--against", type=Path, default=None, help="JSON of an older run: exit 1 where a ratio of ran_ext's got worse")
    add("--tolerance", type=float, default=0.05, help="by how much a ratio may be worse (default 0.05)")
    options = parser.parse_args(argv)
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if missing := _backend.why_not_native(options.device):
        parser.error(f"nothing to measure: ran_ext has no kernels for {options.device}: {missing}")
    if options.against and not options.against.is_file():
        parser.error(f"--against: there is no file {options.against}")
    options.rounds = options.rounds or (3 if options.quick else 15)
    options.batch = options.batch or ([2] if options.quick else [128, 1024] if cuda else [32])
    options.dtype = options.dtype or (list(DTYPES) if cuda else ["float32", "bfloat16"])
    options.compile = options.compile and not options.quick
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 where a ratio got worse than ``--against``."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    old = read_json(options.against)[1] if options.against else None
    comparison = Comparison(options)
    before = environment(comparison.device)
    suites = ["ops", "model", "memory"] if options.suite == "all" else [options.suite]
    rows = [row for suite in suites for row in getattr(comparison, suite)()]
    print(tables(rows))
    settings = {"rounds": options.rounds, "quick": options.quick, "rates": comparison.rates}
    after = {"load_average_after": environment(comparison.device)["load_average"]}
    print(
        f"\nMedians of {options.rounds} interleaved rounds [quartiles]; load average {before['load_average'][0]:.1f}."
    )
    print(f"{before['cpu']}, {before['threads']} threads, {before['device']}; torch {before['torch']}.")
    if options.out:
        write_json(options.out, {**before, **after, **settings}, rows)
        for suite in suites:
            chart = options.out.with_name(f"{options.out.stem}_{suite}.png")
            write_chart(chart, [row for row in rows if row.suite == suite])
            print(f"{chart}")
        print(f"{options.out}")
    if old is None:
        return 0
    worse = regressions(rows, old, options.tolerance)
    print("\n".join(f"worse by more than {options.tolerance:.0%}: {line}" for line in worse) or "no ratio got worse")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
