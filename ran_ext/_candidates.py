"""Runs a pass at a shape on each path that it can take, compares the results, and times them in turn."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _backend, _measured
from ._errors import one_line
from ._measured import CPU, Shape, Times

#: Rounds by default: each times every path once. Up to so many times as many follow until the paths are apart.
ROUNDS, MOST_ROUNDS = 7, 3
#: Seconds that one timing lasts at least; a shorter pass is repeated, up to so many times.
LEAST, MOST_REPEATS = 2e-3, 1000
#: Written before each call on a GPU, so that none finds its tensors in the second-level cache.
FLUSHED_BYTES = 256 << 20
#: Cycles that a GPU waits before it begins, for each call that follows: the host is ahead then, and what is timed is
#: the GPU's work, not the host's. Calls at once, lest the host fills the queue.
HEAD_START, MOST_QUEUED = 200_000, 20
#: Added to the variance.
EPS = 1e-5
#: Errors, relative in the 2-norm, that are always allowed: a few roundings of the dtype.
FLOOR = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 6e-4, torch.bfloat16: 5e-3}

Call = Callable[[], Tensor]


def measure(shape: Shape, allowed: Sequence[str], rule: str, rounds: int = ROUNDS) -> Times:
    """Microseconds of a pass on each of the paths ``allowed``: medians of the rounds, but of ``rule`` the least.

    So a path that replaces the one of the rule is faster beyond doubt, also on a machine where other programs run.

    Results come first: against float64, each may be off by at most twice the library's own error (of BN-ReLU: that of
    the kernels which stream). A path that is off by more, fails, or runs out of memory is left out, with a warning; all
    are, where the library's is.

    >>> shape = (CPU, torch.get_num_threads(), "conv2d_forward", "float32", (1, 8, 8, 16, 16, 3, 3, 1, 1, 1, 1))
    >>> list(measure(shape, ["library"], "library", rounds=1)) if _backend._C else ["library"]
    ['library']
    """
    device = torch.device("cpu") if shape[0] == CPU else torch.device("cuda", shape[0])
    base = "library" if "library" in allowed else "streaming"
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False), _on(device):
        try:
            call, exact_call = prepare(shape, device)
            exact = exact_call()
            most = max(2 * _error(_run(base, call), exact), FLOOR[getattr(torch, shape[3])])
            right = [path for path in allowed if path == base or _is_right(shape, path, call, exact, most)]
            del exact
            return _timed({path: functools.partial(_run, path, call) for path in right}, rule, rounds, device)
        except RuntimeError as error:  # out of memory, too
            _warn(shape, "all paths", one_line(error))
            return {}


def _is_right(shape: Shape, path: str, call: Call, exact: Tensor, most: float) -> bool:
    try:
        error = _error(_run(path, call), exact)
    except RuntimeError as failure:
        _warn(shape, path, one_line(failure))
        return False
    if not error <= most:  # NaN, too
        _warn(shape, path, f"its relative error is {error:.2g}, and the rule allows {most:.2g}")
    return error <= most


def _warn(shape: Shape, path: str, why: str) -> None:
    row = _measured.as_row(shape, {})
    text = f"{path} of {row['pass']} in {row['dtype']} at x {row['x']} left out: {why}"
    warnings.warn(f"ran_ext.tune: {text}", RuntimeWarning, stacklevel=4)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _run(path: str, call: Call) -> Tensor:
    """The call, on this path wherever the pass may take it."""
    kernels: Any = _backend._C
    kernels.try_path(path)
    try:
        return call()
    finally:
        kernels.try_path(None)


def _error(value: Tensor, exact: Tensor) -> float:
    """Relative, in the 2-norm; NaN where something is not finite."""
    return (value.double() - exact).norm().item() / (exact.norm().item() or 1.0)


# ------------------------------------------------------------------------------------------------------------- the pass


def prepare(shape: Shape, device: torch.device) -> tuple[Call, Call]:
    """A pass on random tensors as its op runs it, and in float64 by plain PyTorch; both give what is to be compared."""
    name = shape[2]
    if name == "gate":
        return _gate(_Draw(shape, device))
    return (_bn_relu if name.startswith("bn_relu") else _convolution)(_Draw(shape, device), name)


class _Draw:
    """Random tensors for a shape."""

    def __init__(self, shape: Shape, device: torch.device):
        self.dtype: torch.dtype = getattr(torch, shape[3])
        self.n, self.h, self.w, self.c, self.c_out, *geometry = shape[4]
        self.kernel, self.stride, self.padding = geometry[:2], geometry[2:4], geometry[4:]
        self.generator = torch.Generator(device).manual_seed(0)
        self.x = self.image(self.c, self.h, self.w)
        self.bn_weight, self.bn_bias = 1 + self.normal(self.c) / 10, self.normal(self.c) / 10

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self.generator, device=self.generator.device)

    def image(self, channels: int, height: int, width: int) -> Tensor:
        return self.normal(self.n, channels, height, width).to(self.dtype, memory_format=torch.channels_last)

    def weight(self) -> Tensor:
        """Of a size that keeps the output's like the input's."""
        sizes = (self.c_out, self.c, *self.kernel)
        scaled = self.normal(*sizes) * math.prod(sizes[1:]) ** -0.5
        return scaled.to(self.dtype, memory_format=torch.channels_last)

    def norm(self, wide: Tensor) -> Tensor:
        """``relu(bn(x))`` in float64."""
        vectors = self.bn_weight.double(), self.bn_bias.double()
        return F.relu(F.batch_norm(wide, None, None, vectors[0], vectors[1], training=True))

    def statistics(self) -> tuple[Tensor, ...]:
        """What backward takes of the normalisation."""
        return self.bn_weight, self.bn_bias, *torch.ops.ran_ext.batch_norm_stats(self.x, [], None)


def _bn_relu(draw: _Draw, name: str) -> tuple[Call, Call]:
    ops, x = torch.ops.ran_ext, draw.x
    if name == "bn_relu":

        def forward() -> Tensor:
            found = ops.bn_relu(x, draw.bn_weight, draw.bn_bias, None, None, True, [], None, EPS)
            return cast(Tensor, found[0])

        return forward, lambda: draw.norm(x.double())
    dout, statistics_ = draw.image(draw.c, draw.h, draw.w), draw.statistics()

    def backward() -> Tensor:
        return cast(Tensor, ops.bn_relu_backward(dout, x, *statistics_, EPS, True)[0])

    def exact() -> Tensor:
        wide = _leaf(x)
        with torch.enable_grad():
            return _gradient(draw.norm(wide), wide, dout)

    return backward, exact


def _gate(draw: _Draw) -> tuple[Call, Call]:
    x, weight, scale = draw.x, draw.weight(), draw.stride[0]
    trunk = draw.image(draw.c_out, draw.h * scale, draw.w * scale)

    def call() -> Tensor:
        return cast(Tensor, torch.ops.ran_ext.conv_attention_gate(trunk, x, weight, None, scale)[0])

    def exact() -> Tensor:
        mask = F.conv2d(x.double(), weight.double()).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        return (1 + torch.sigmoid(mask)) * trunk.double()

    return call, exact


def _convolution(draw: _Draw, name: str) -> tuple[Call, Call]:
    ops, x, weight, geometry = torch.ops.ran_ext, draw.x, draw.weight(), (draw.stride, draw.padding)
    plain, name = name.startswith("conv2d"), name.removeprefix("conv2d_")

    def convolve(wide: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(wide if plain else draw.norm(wide), weight, None, *geometry)

    if name == "forward":

        def forward() -> Tensor:
            if plain:
                return cast(Tensor, ops.conv2d(x, weight, None, *geometry))
            norm = {"bn_weight": draw.bn_weight, "bn_bias": draw.bn_bias}
            found = ops.bn_relu_conv2d(x, weight, None, running=[], **norm, stride=draw.stride, padding=draw.padding)
            return cast(Tensor, found[0])

        return forward, lambda: convolve(x.double(), weight.double())
    out = F.conv2d(x[:1], weight, None, *geometry)
    dout, of_x = draw.image(*out.shape[1:]), name == "dgrad"
    wanted, statistics_ = [of_x, not of_x, False], () if plain else draw.statistics()

    def backward() -> Tensor:
        if plain:
            return cast(Tensor, ops.conv2d_backward(dout, x, weight, *geometry, wanted)[0 if of_x else 1])
        found = ops.bn_relu_conv2d_backward(dout, x, *statistics_, weight, *geometry, EPS, True, wanted, None)
        return cast(Tensor, found[0 if of_x else 3])

    def exact() -> Tensor:
        wide, wide_weight = _leaf(x), _leaf(weight)
        with torch.enable_grad():
            return _gradient(convolve(wide, wide_weight), wide if of_x else wide_weight, dout)

    return backward, exact


def _leaf(t: Tensor) -> Tensor:
    return t.double().requires_grad_()


def _gradient(out: Tensor, of: Tensor, dout: Tensor) -> Tensor:
    return torch.autograd.grad(out, of, dout.double())[0]


# ------------------------------------------------------------------------------------------------------------ the clock


def _timed(calls: dict[str, Callable[[], object]], rule: str, rounds: int, device: torch.device) -> Times:
    """Paths take turns, in random order, lest one always falls on the time slices of other programs."""
    seconds = _seconds_on(device)
    once = min(seconds(call, 1) for call in calls.values())
    most = MOST_QUEUED if device.type == "cuda" else MOST_REPEATS
    repeats = min(most, max(1, round(LEAST / max(once, 1e-9))))
    times: dict[str, list[float]] = {path: [] for path in calls}
    order = random.Random(0)
    for number in range(MOST_ROUNDS * rounds):
        if number >= rounds and _are_apart(list(times.values())):
            break
        for path in order.sample(list(calls), len(calls)):
            times[path].append(seconds(calls[path], repeats))
    found = {path: min(row) if path == rule else statistics.median(row) for path, row in times.items()}
    return {path: round(1e6 * seconds, 2) for path, seconds in found.items()}


def _are_apart(times: Sequence[Sequence[float]]) -> bool:
    """Whether half of the fastest one's times are below all of any other's.

    >>> _are_apart([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0]]), _are_apart([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
    (True, False)
    """
    best, *others = sorted(times, key=min)
    return all(statistics.median(best) < min(other) for other in others)


def _seconds_on(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    """The clock of a device: seconds of one of so many calls; of one thread, while it runs and not while it waits."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def cpu(call: Callable[[], object], repeats: int) -> float:
        begin = clock()
        for _ in range(repeats):
            call()
        return (clock() - begin) / repeats

    if device.type == "cpu":
        return cpu
    cache = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def cuda(call: Callable[[], object], repeats: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda._sleep(HEAD_START * repeats)
        for begin, end in events:
            cache.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        return sum(float(begin.elapsed_time(end)) for begin, end in events) / 1e3 / repeats

    return cuda


def tune_unknown(shape: Shape, allowed: Sequence[str], rule: str) -> None:
    """Tune a shape where a pass first meets it; the kernels call this under ``torch.backends.cudnn.benchmark``."""
    rows = [(shape, measure(shape, allowed, rule))]
    _measured.add(shape[0], rows)
    if rows[0][1]:
        _measured.save(shape[0], rows)


if _backend._C is not None:
    _backend._C.set_measuring(_measured.load, tune_unknown)
