"""pytest-benchmark suite of the ops: ``pytest benchmarks/bench_ops.py --benchmark-only -k "float32 and gate"``.

For ratios take ``compare.py``, which interleaves; this suite is for looking at one op closely.
"""

import sys
from typing import Any

if __name__ == "__main__":
    sys.exit("for pytest-benchmark (pip install pytest-benchmark): pytest benchmarks/bench_ops.py --benchmark-only")

import pytest
import torch

from .cases import Case, op_cases
from .contenders import Contender, op_subject
from .suites import grid, timed

NAMES = [case.name.replace(" 1x", " ", 1).replace(" ", "_") for case in op_cases(1)]


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
@pytest.mark.parametrize(("device", "batch", "task", "dtype", "contender"), grid(("forward", "forward + backward")))
def test_op(
    benchmark: Any, index: int, device: str, batch: int, task: str, dtype: torch.dtype, contender: Contender
) -> None:
    case: Case = op_cases(batch)[index]
    benchmark.group = f"{device}: {case.name}, {task}, {dtype}"
    torch.compiler.reset()
    timed(benchmark, op_subject(case, contender, task, torch.device(device)).run, device)
