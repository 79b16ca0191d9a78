"""Which device, batch, dtype and contender the pytest-benchmark suites go through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ran_ext import _backend
from ran_ext._hardware import multiplies_bfloat16

from .contenders import Contender, contenders

#: Batches and dtypes by device.
GRID: dict[str, tuple[list[int], list[torch.dtype]]] = {
    "cpu": ([32], [torch.float32, torch.bfloat16]),
    "cuda": ([128, 1024], [torch.float32, torch.bfloat16, torch.float16]),
}


def grid(tasks: tuple[str, str]) -> Iterator[Any]:
    """pytest parameters ``(device, batch, task, dtype, contender)``; one skipped one for a device that cannot run."""
    for device, (batches, dtypes) in GRID.items():
        if reason := _why_not(device):
            yield pytest.param(device, 0, "", torch.float32, None, marks=pytest.mark.skip(reason=reason), id=device)
            continue
        if not multiplies_bfloat16(device):  # emulated, it would take hours and say nothing
            dtypes = [dtype for dtype in dtypes if dtype != torch.bfloat16]
        for batch in batches:
            for task in tasks:
                for dtype in dtypes:
                    for row in contenders(dtype, torch.device(device), True, task):
                        yield pytest.param(device, batch, task, dtype, row, id=_id(device, batch, task, dtype, row))


def _why_not(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA GPU"
    return _backend.why_not_native(device)


def _id(device: str, batch: int, task: str, dtype: torch.dtype, row: Contender) -> str:
    return "-".join([device, str(batch), task, str(dtype).removeprefix("torch."), row.name]).replace(" ", "_")


def timed(benchmark: Any, run: Any, device: str) -> None:
    """Benchmark ``run``; on CUDA each call waits for the device."""

    def synchronised() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    synchronised()
    benchmark.pedantic(synchronised, rounds=10, iterations=1, warmup_rounds=2)
