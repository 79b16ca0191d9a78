"""pytest-benchmark suite of ``ran_compact``: ``pytest benchmarks/bench_model.py --benchmark-only -k inference``.

For ratios take ``compare.py``, which interleaves; this suite is for looking at one contender closely.
"""

import sys
from typing import Any

if __name__ == "__main__":
    sys.exit("for pytest-benchmark (pip install pytest-benchmark): pytest benchmarks/bench_model.py --benchmark-only")

import pytest
import torch

from .contenders import Contender, model_subject
from .suites import grid, timed


@pytest.mark.parametrize(("device", "batch", "task", "dtype", "contender"), grid(("training step", "inference")))
def test_ran_compact(
    benchmark: Any, device: str, batch: int, task: str, dtype: torch.dtype, contender: Contender
) -> None:
    benchmark.group = f"{device}: ran_compact batch {batch}, {task}, {dtype}"
    torch.compiler.reset()
    timed(benchmark, model_subject(contender, task, torch.device(device), batch).run, device)
