#!/usr/bin/env python
"""Measures ran_ext against plain PyTorch and torch.compile, interleaved in one run; prints ratios of medians.

python -m benchmarks.compare --suite model --out benchmarks/results/cpu_model.json     tables, JSON and a chart
python -m benchmarks.compare --suite model --against benchmarks/results/cpu_model.json a gate: 1 where a ratio got worse
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ran_ext import _backend
from ran_ext._command import Parser
from ran_ext._hardware import multiplies_bfloat16

from . import cudnn_graphs, isa
from .agreement import admit
from .cases import Case, large_gates, op_cases
from .contenders import (
    BASELINES,
    Contender,
    Subject,
    contenders,
    model_oracle,
    model_subject,
    network,
    op_oracle,
    op_subject,
)
from .memory import saved_bytes
from .report import COLOURS, Row, read_json, regressions, tables, write_charts, write_json
from .timing import Spread, environment, interleave, peaks, ratios

SUITES = ["ops", "model", "memory"]
OP_TASKS, MODEL_TASKS = ("forward", "forward + backward"), ("training step", "inference")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Comparison:
    """The settings of one run, and its suites, each of which yields rows."""

    def __init__(self, options: argparse.Namespace):
        self.device = torch.device(options.device)
        self.rounds, self.quick, self.tasks = options.rounds, options.quick, options.task
        self.batches, self.compiled, self.chosen = options.batch, options.compile, options.contender
        self.dtypes = [DTYPES[name] for name in options.dtype]
        self.rates: dict[str, float] = {}

    def ops(self) -> Iterator[Row]:
        """Every op at the network's shapes."""
        for batch in self.batches:
            yield from self._ops("ops", self._cases(batch), f", batch {batch}")

    def bandwidth(self) -> Iterator[Row]:
        """The gate on tensors larger than any cache."""
        yield from self._ops("bandwidth", op_cases(2)[:2] if self.quick else large_gates(), "")

    def _ops(self, suite: str, cases: list[Case], note: str) -> Iterator[Row]:
        self.rates = self.rates or peaks(self.device, [torch.float32, *self.dtypes], self.quick)
        for task in [task for task in OP_TASKS if task in self.tasks]:
            for dtype in self.dtypes:
                sums: dict[str, list[list[float]]] = {}
                for case in cases:
                    seconds = yield from self._op(suite, case, task, dtype)
                    for name, values in seconds.items() if case.flops(False) else ():
                        sums.setdefault(name, []).append(values)
                count = max(map(len, sums.values()), default=0)
                whole = {name: Tensor(parts).sum(0).tolist() for name, parts in sums.items() if len(parts) == count}
                yield from self._rows(suite, f"bn_relu_conv2d, sum of {count} shapes{note}", task, dtype, whole)

    def _op(
        self, suite: str, case: Case, task: str, dtype: torch.dtype
    ) -> Generator[Row, None, dict[str, list[float]]]:
        rows = self._contenders(dtype, task)
        torch.compiler.reset()  # a new shape is compiled anew, not with symbolic sizes
        makers = {row.name: partial(op_subject, case, row, task, self.device) for row in rows}
        if self.device.type == "cuda" and cudnn_graphs.offers(case, task, dtype) and self._wanted(cudnn_graphs.NAME):
            makers[cudnn_graphs.NAME] = partial(cudnn_graphs.subject, case, task, dtype, self.device)
        subjects, why_not = admit(makers, dtype, op_oracle(case, task, self.device))
        seconds = self._time(subjects, f"{case.name}, {task}, {_name(dtype)}")
        own = {row.name: row.dtype for row in rows}
        for row in self._rows(suite, case.name, task, dtype, seconds, why_not):
            yield self._rated(row, case, task, own.get(row.contender, dtype))
        return seconds

    def model(self) -> Iterator[Row]:
        """The training step and inference of ``ran_compact``."""
        for batch in self.batches:
            for task in [task for task in MODEL_TASKS if task in self.tasks]:
                oracle = model_oracle(task, self.device, batch)
                for dtype in self.dtypes:
                    torch.compiler.reset()
                    rows = self._contenders(dtype, task)
                    makers = {row.name: partial(model_subject, row, task, self.device, batch) for row in rows}
                    subjects, why_not = admit(makers, dtype, oracle)
                    seconds = self._time(subjects, f"ran_compact batch {batch}, {task}, {_name(dtype)}")
                    yield from self._rows("model", f"ran_compact batch {batch}", task, dtype, seconds, why_not)

    def _contenders(self, dtype: torch.dtype, task: str) -> list[Contender]:
        return [row for row in contenders(dtype, self.device, self.compiled, task) if self._wanted(row.name)]

    def _wanted(self, name: str) -> bool:
        return self.chosen is None or name in (BASELINES[0], *self.chosen)

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
        """torch.compile hides what it saves in one autograd function, so it is compared in time only."""
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
        self,
        suite: str,
        case: str,
        task: str,
        dtype: torch.dtype,
        seconds: dict[str, list[float]],
        why_not: Mapping[str, str] = MappingProxyType({}),
    ) -> Iterator[Row]:
        faster = {name: ratios(seconds, name) for name in BASELINES if name in seconds}
        for name, values in seconds.items():
            own = {baseline: spreads[name] for baseline, spreads in faster.items()}
            yield Row(suite, case, task, _name(dtype), name, 1e3 * Spread.of(values).median, "ms", own)
        for name, reason in why_not.items():
            yield Row(suite, case, task, _name(dtype), name, math.nan, "ms", {}, missing=reason)

    def _memory(self, case: str, task: str, dtype: torch.dtype, measured: dict[str, int]) -> Iterator[Row]:
        if not measured[BASELINES[0]]:
            return  # an op that needs nothing kept
        for name, size in measured.items():
            share = size / measured[BASELINES[0]]
            ratio = {BASELINES[0]: Spread(share, share, share)}
            yield Row("memory", case, task, _name(dtype), name, size / 1e6, "MB", ratio)

    def _rated(self, row: Row, case: Case, task: str, dtype: torch.dtype) -> Row:
        """The row with its share of the measured rate that bounds it: least traffic by copy, operations by matmul."""
        backward, seconds = task != "forward", row.value / 1e3
        if row.missing or (case.flops(backward) and self.device.type != "cuda"):
            return row
        if case.flops(backward):
            rate = self.rates[f"matmul {_name(dtype)}, GFLOP/s"]
            work, of = case.flops(backward) / 1e9, "matmul"
        else:
            size = math.prod(case.shape) * dtype.itemsize
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
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--suite", choices=[*SUITES, "bandwidth", "all"], default="all", help="all: bandwidth only on CUDA")
    add("--task", nargs="+", choices=[*OP_TASKS, *MODEL_TASKS], default=[*OP_TASKS, *MODEL_TASKS])
    add("--contender", nargs="+", choices=list(COLOURS), metavar="NAME", help="only these, beside the baseline")
    add("--rounds", type=int, default=None, help="samples of each contender (default 15, with --quick 3)")
    add("--threads", type=int, default=None, help="of the CPU (default torch's)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch", type=int, nargs="+", default=None, help="default 32; on CUDA 128 and 1024; with --quick 2")
    add("--dtype", nargs="+", choices=list(DTYPES), default=None, help="default those in hardware; float16: CUDA")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--quick", action="store_true", help="a rehearsal: tiny, without torch.compile; its times say nothing")
    add("--out", type=Path, default=None, help="JSON; the chart is drawn beside it")
    add("--against", type=Path, default=None, help="JSON of an older run: exit 1 where a ratio of ran_ext's got worse")
    add("--tolerance", type=float, default=0.05, help="by how much a ratio may be worse (default 0.05)")
    options = isa.parse(parser, argv)
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if missing := _backend.why_not_native(options.device):
        parser.error(f"nothing to measure: ran_ext has no kernels for {options.device}: {missing}")
    if options.against and not options.against.is_file():
        parser.error(f"--against: there is no file {options.against}")
    options.rounds = options.rounds or (3 if options.quick else 15)
    options.batch = options.batch or ([2] if options.quick else [128, 1024] if cuda else [32])
    half = ["bfloat16"] if multiplies_bfloat16(options.device) else []  # emulated, it would take hours
    options.dtype = options.dtype or ["float32", *half, *(["float16"] if cuda else [])]
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
    suites = [options.suite]
    if options.suite == "all":
        suites = [*SUITES, "bandwidth"] if options.device == "cuda" else SUITES
    rows: list[Row] = []
    for suite in suites:
        for row in getattr(comparison, suite)():
            rows.append(row)
            if options.out:  # after each row, so that an interrupted run keeps what it has measured
                write_json(options.out, before | _settings(options, comparison), rows)
    print(tables(rows))
    print(
        f"\nMedians of {options.rounds} interleaved rounds [quartiles]; load average {before['load_average'][0]:.1f}."
    )
    print(f"{before['cpu']}, {before['threads']} threads, {before['device']}; torch {before['torch']}.")
    if options.out:
        after = {"load_average_after": environment(comparison.device)["load_average"]}
        write_json(options.out, before | _settings(options, comparison) | after, rows)
        for suite in suites:
            chart = options.out.with_name(f"{options.out.stem}_{suite}.png")
            print(*write_charts(chart, [row for row in rows if row.suite == suite]), sep="\n")
        print(f"{options.out}")
    broken = [row for row in rows if row.missing and row.contender.startswith("ran_ext")]
    print(*(f"NOT TIMED {', '.join(row.key)}: {row.missing}" for row in broken), sep="\n")
    return 1 if broken or (old is not None and _worse(rows, old, options.tolerance)) else 0


def _settings(options: argparse.Namespace, comparison: Comparison) -> dict[str, Any]:
    return {"rounds": options.rounds, "quick": options.quick, "rates": comparison.rates}


def _worse(rows: list[Row], old: list[Row], tolerance: float) -> bool:
    worse = regressions(rows, old, tolerance)
    print("\n".join(f"worse by more than {tolerance:.0%}: {line}" for line in worse) or "no ratio got worse")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main())
