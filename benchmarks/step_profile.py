#!/usr/bin/env python
"""Where a training step's time goes on the CPU: op by op, beside the rate that the machine was measured to reach.

python -m benchmarks.step_profile                            ran_compact, batch 32, float32, one thread
python -m benchmarks.step_profile --backend reference        the same in plain PyTorch
python -m benchmarks.step_profile --isa avx2 --dtype bfloat16

Convolutions have an arithmetic rate: multiplications and additions of the direct algorithm, so that one by Winograd's
method may lie above the machine's. It is measured by a matrix product, the memory's by a copy of 64 MB.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import ran_ext
from ran_ext._backend import BACKENDS
from ran_ext._command import Parser
from ran_ext.models import create_model, list_models

from . import isa
from .timing import environment

STEPS = 5
#: Rows below this share of the step are added up in one.
LEAST = 0.005


def best_seconds(call: Callable[[], object], times: int = 10) -> float:
    """The shortest of some calls."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine() -> tuple[float, float]:
    """GFLOP/s of a matrix product in float32, and GB/s of a copy, read and write counted."""
    a, b, source = torch.randn(512, 512), torch.randn(512, 512), torch.randn(16 << 20)
    target = torch.empty_like(source)
    return 2 * 512**3 / best_seconds(lambda: a @ b) / 1e9, 8 * source.numel() / best_seconds(
        lambda: target.copy_(source)
    ) / 1e9


def flops(name: str, shapes: list[list[int]]) -> float:
    """Of a convolution's call, forward or backward; 0 for other ops."""
    sizes = [size for size in shapes if len(size) == 4]
    if "conv" not in name or len(sizes) < 2 or name in ("aten::conv2d", "aten::convolution", "aten::_convolution"):
        return 0.0
    backward = name.endswith("backward")
    x = sizes[1] if backward else sizes[0]
    weight = next((size for size in sizes[1 + backward :] if size[1] == x[1] and max(size[2:]) <= 7), None)
    if weight is None:
        return 0.0
    # Forward the networks' padding keeps the size; a stride is not among the shapes.
    pixels = sizes[0][2] * sizes[0][3] if backward else x[2] * x[3]
    return 2.0 * x[0] * pixels * weight[0] * weight[1] * weight[2] * weight[3] * (2 if backward else 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", choices=list_models(), default="ran_compact")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--threads", type=int, default=1)
    options = isa.parse(parser, argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = create_model(options.model).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(options.batch, 3, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (options.batch,))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), labels).backward()

    with ran_ext.set_backend(options.backend):
        for _ in range(2):
            step()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            for _ in range(STEPS):
                step()
    rows: dict[tuple[str, str], list[float]] = {}
    for event in recorded.events():
        shapes = event.input_shapes or []
        inner = any(child.name == event.name for child in event.cpu_children)  # autograd's call of the op below it
        work = 0.0 if inner else flops(event.name, shapes)
        kernel = (
            next((f"{s[2]}x{s[3]}" for s in shapes[1:] if len(s) == 4 and max(s[2:]) in (1, 3, 5)), "") if work else ""
        )
        row = rows.setdefault((event.name, kernel), [0.0, 0.0, 0.0])
        row[0] += event.self_cpu_time_total / 1e3 / STEPS
        row[1] += 0 if inner else 1 / STEPS
        row[2] += work / STEPS
    total = sum(row[0] for row in rows.values())
    peak, bandwidth = machine()
    facts = environment(torch.device("cpu"))
    print(
        f"{facts['cpu']}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} threads, torch {facts['torch']}"
    )
    print(f"{peak:.0f} GFLOP/s by a matrix product, {bandwidth:.0f} GB/s by a copy; a step: {total:.1f} ms\n")
    print("| op | kernel | calls | ms | share | GFLOP/s | of the machine's |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    rest = 0.0
    for (name, kernel), (milliseconds, calls, work) in sorted(rows.items(), key=lambda item: -item[1][0]):
        if milliseconds < LEAST * total:
            rest += milliseconds
            continue
        rate = work / milliseconds / 1e6 if work else 0.0
        share = f"{rate:.0f} | {rate / peak:.0%}" if work else " | "
        print(f"| {name} | {kernel} | {calls:.0f} | {milliseconds:.2f} | {milliseconds / total:.1%} | {share} |")
    print(f"| all others | | | {rest:.2f} | {rest / total:.1%} | | |")


if __name__ == "__main__":
    main()
