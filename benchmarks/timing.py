"""Times functions against each other in one run: interleaved rounds, medians, ratios round by round."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ran_ext import _backend, _measured
from ran_ext.train import Ranks
from ran_ext.train.system import environment as versions

#: Cycles that a GPU waits before a sample of small calls, for each of them: the host is ahead then, and what is timed
#: is the GPU's work. Whole steps are timed with what the host takes.
HEAD_START = 800_000
#: Written between two timed calls on a GPU, so that neither finds its inputs in the L2 cache (at most 126 MB so far).
FLUSH_BYTES = 256 << 20
#: A timed sample lasts at least this long, in seconds: short functions are called several times.
SAMPLE_SECONDS = 0.02
#: Calls in one sample at most: on a GPU each has events of its own, and writing the cache takes longer than most ops.
MOST_CALLS = {"cpu": 1000, "cuda": 20}


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles of one figure over the rounds."""

    median: float
    q25: float
    q75: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of ``values``.

        >>> Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
        Spread(median=3.0, q25=2.0, q75=4.0)
        """
        low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        )
        return cls(middle.item(), low.item(), high.item())


def interleave(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    flush: bool = False,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds a call of each function in each round.

    Every round times each function once, beginning with another one each time, so that a slow spell of the machine, and
    what the previous function leaves in the caches, meets all of them alike. Each function is warmed up first.

    Args:
        functions: by name; called without arguments.
        rounds: samples of each function.
        device: CUDA is timed by events, the CPU by the clock.
        flush: on CUDA, write ``FLUSH_BYTES`` before each call.
        warm_up: calls of each function before the first round.
        clock: of the CPU; ``time.process_time`` where one thread is timed beside other programs.

    >>> times = interleave({"a": lambda: None, "b": lambda: None}, rounds=3, device=torch.device("cpu"))
    >>> [len(values) for values in times.values()]
    [3, 3]
    """
    cache = torch.empty(FLUSH_BYTES if flush and device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    calls = {name: _warm_up(function, warm_up, device, cache, clock) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_sample(functions[name], calls[name], device, cache, clock))
    return seconds


def _warm_up(
    function: Callable[[], object], times: int, device: torch.device, cache: Tensor, clock: Callable[[], float]
) -> int:
    """Calls the function ``times`` times; then, how many calls make one sample."""
    for _ in range(times):
        function()
    once = _sample(function, 1, device, cache, clock)
    return max(1, min(MOST_CALLS[device.type], round(SAMPLE_SECONDS / max(once, 1e-9))))


def _sample(
    function: Callable[[], object], calls: int, device: torch.device, cache: Tensor, clock: Callable[[], float]
) -> float:
    if device.type != "cuda":
        began = clock()
        for _ in range(calls):
            function()
        return (clock() - began) / calls
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    torch.cuda.synchronize(device)
    if cache.numel():
        torch.cuda._sleep(HEAD_START * calls)
    for begin, end in events:
        cache.zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize(device)
    return float(sum(begin.elapsed_time(end) for begin, end in events)) / 1e3 / calls


def ratios(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, Spread]:
    """How many times faster than ``baseline`` each function is: the spread of the ratios within each round.

    >>> ratios({"a": [2.0, 4.0], "b": [1.0, 2.0]}, "a")["b"].median
    2.0
    """
    return {
        name: Spread.of([base / own for base, own in zip(seconds[baseline], values, strict=True)])
        for name, values in seconds.items()
    }


def copy_rate(device: torch.device, megabytes: int) -> float:
    """Bytes a second read and written by a copy of a tensor of that size: what a memory-bound kernel can reach."""
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = interleave({"copy": lambda: target.copy_(source)}, 5, device, flush=True)["copy"]
    return 2 * source.nbytes / Spread.of(seconds).median


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Floating-point operations a second of a square matrix product: what a convolution can reach."""
    a = torch.randn(side, side, device=device).to(dtype)
    seconds = interleave({"matmul": lambda: a @ a}, 5, device)["matmul"]
    return 2.0 * side**3 / Spread.of(seconds).median


def peaks(device: torch.device, dtypes: list[torch.dtype], quick: bool) -> dict[str, float]:
    """The machine's measured rates, for the percentages: GB/s by size of the copy, on CUDA also GFLOP/s by dtype.

    On a CPU torch's matrix product is no bound: it uses another library than the convolutions, which are faster.
    """
    sizes = [4] if quick else [4, 8, 64, 256]
    rates = {f"copy {size} MB, GB/s": copy_rate(device, size) / 1e9 for size in sizes}
    if device.type != "cuda":
        return rates
    side = 256 if quick else 8192
    return rates | {f"matmul {_short(dtype)}, GFLOP/s": matmul_rate(device, dtype, side) / 1e9 for dtype in dtypes}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures must be read with; call it before and after, because the load average shows a busy machine.

    >>> environment(torch.device("cpu"))["device"]
    'cpu'
    """
    built = _backend.built_for()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **versions(Ranks(0, 1, device)),
        "cores": os.cpu_count(),
        "compiler": built.COMPILER if built else None,
        "tuned_passes": _measured.in_use(_measured.CPU if device.type == "cpu" else device.index or 0),
        "load_average": os.getloadavg(),
    }
