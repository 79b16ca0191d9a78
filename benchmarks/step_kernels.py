#!/usr/bin/env python
"""Where a training step's time goes on a GPU, kernel by kernel, as each contender runs it.

python -m benchmarks.step_kernels --out FILE                          ran_compact, batch 128, bfloat16
python -m benchmarks.step_kernels --out FILE --passes                 each pass alone, on each path that it can take
python -m benchmarks.step_kernels --out FILE --device cpu --quick     a rehearsal, of the CPU's ops

Kernel times are those of CUPTI, by torch.profiler, which slows the host down, not the kernels.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ran_ext import _candidates, _measured, models
from ran_ext._command import Parser
from ran_ext._files import write_json
from ran_ext._tune import passes

from .contenders import contenders, model_subject
from .timing import FLUSH_BYTES, environment

CHOSEN = ("eager channels_last", "torch.compile", "ran_ext")
TASK = "training step"
STEPS = 5
#: Of the kernel that writes the cache between two calls.
FLUSHING = "CUDAFunctorOnSelf_add<unsigned char>"


def kernels(run: Any, device: torch.device, steps: int) -> dict[str, list[float]]:
    """Calls and microseconds a step of each kernel (on a CPU: of each op), the longest first."""
    cuda = device.type == "cuda"
    for _ in range(3):
        run()
    if cuda:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            run()
        if cuda:
            torch.cuda.synchronize()
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for event in recorded.events() or ():
        if cuda and event.device_type != torch.autograd.DeviceType.CUDA:  # type: ignore[attr-defined]
            continue
        row = found[event.name]
        row[0] += 1 / steps
        row[1] += (event.time_range.elapsed_us() if cuda else event.self_cpu_time_total) / steps
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def pass_rows(dtype: torch.dtype, batch: int, device: torch.device, calls: int) -> list[dict[str, Any]]:
    """The kernels of every pass of ``ran_compact`` that has several paths, on each, with cold caches."""
    model = models.ran_compact().to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.zeros(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, dtype):
        asked = passes(model, (images,))
    flushed = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    found = []
    for shape, allowed, _ in asked:
        call, _ = _candidates.prepare(shape, device)
        row = _measured.as_row(shape, {})
        for path in allowed:

            def run(path: str = path, call: Callable[[], object] = call) -> None:
                flushed.add_(1)
                _candidates._run(path, call)  # type: ignore[arg-type]

            timed = {name: row for name, row in kernels(run, device, calls).items() if FLUSHING not in name}
            own = sum(us for _, us in timed.values())
            print(f"{row['pass']} {row['x']} {row.get('weight', '')} {row.get('stride', '')} {path}: {own:.1f} us")
            for name, (n, us) in timed.items():
                print(f"    {us:8.1f} {n:4.1f}  {name[:120]}")
            listed = [[name[:120], round(us, 2)] for name, (_, us) in timed.items()]
            found.append({**row, "path": path, "sum_us": round(own, 2), "kernels": listed})
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = Parser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=None, help="default 128; with --quick 2")
    parser.add_argument("--contender", nargs="+", default=list(CHOSEN), metavar="NAME")
    parser.add_argument("--passes", action="store_true", help="each pass on each path, instead of the whole step")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: one step of two images, nothing compiled")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    options = parser.parse_args(argv)
    torch.backends.cudnn.benchmark = True
    device, batch = torch.device(options.device), options.batch or (2 if options.quick else 128)
    dtype, steps = getattr(torch, options.dtype), 1 if options.quick else STEPS
    settings = {"environment": environment(device), "batch": batch, "dtype": options.dtype}
    if options.passes:
        write_json(options.out, {**settings, "passes": pass_rows(dtype, batch, device, steps)})
        return 0
    rows = []
    for one in contenders(dtype, device, not options.quick, TASK):
        if one.name not in options.contender:
            continue
        torch.compiler.reset()
        found = kernels(model_subject(one, TASK, device, batch).run, device, steps)
        total, calls = (sum(row[index] for row in found.values()) for index in (1, 0))
        print(f"\n{one.name}: {total:.0f} us a step in {calls:.0f} kernels\n\n| kernel | calls | us |")
        print("| --- | ---: | ---: |")
        for name, (count, us) in list(found.items())[:40]:
            print(f"| {name[:110]} | {count:.0f} | {us:.1f} |")
        listed = [[name[:200], round(count, 2), round(us, 2)] for name, (count, us) in found.items()]
        rows.append({"contender": one.name, "us": round(total, 1), "kernels": listed})
        write_json(options.out, {**settings, "steps": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
