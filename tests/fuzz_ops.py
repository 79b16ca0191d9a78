"""Random calls of every public op, each held to its plain twin in float64; wrong ones must be refused in words.

    python tests/fuzz_ops.py --cases 10000 --seed 1

The cases run in a process of their own: a crash is counted, named, and the next case follows. ``--only SEED/NUMBER``
runs one in this process. The rule: an output's or gradient's error (2-norm, against float64) is at most twice that of
plain PyTorch, plus a floor: a few roundings of its dtype, and what one rounding of every input changes. NaN and
infinities stand where PyTorch has them. A refusal is a ValueError or TypeError that names the op and the argument.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import FLOOR
from fuzz_cases import Case, Draw, make
from fuzz_wrong import direct, make_wrong
from torch import Tensor

from ran_ext import _backend
from ran_ext._paths import paths

#: torch's own words for a result that no memory holds; and of its up-sampling on the meta device where N is 0.
NO_MEMORY = (
    "can't allocate memory",
    "Storage size calculation overflowed",
    "overflow when computing",
    "std::bad_alloc",
)
META = "cond must be a bool, but got"
#: Batch normalisation's vectors, which PyTorch wants in one dtype.
RUNNING = ("running_mean", "running_var")
NORM = {"bn_relu": ("weight", "bias", *RUNNING), "bn_relu_conv2d": ("bn_weight", "bn_bias", *RUNNING)}


class Fault(Exception):
    """What a case found."""


def eps_of(dtype: torch.dtype) -> float:
    """Of the precision that ops compute in."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def rounded(t: Tensor, eps: float, d: Draw) -> Tensor:
    """``t`` in float64, every value moved by up to ``eps`` of it."""
    return t.double() * (1 + eps * (torch.rand(t.shape, generator=d.torch, dtype=torch.float64) * 2 - 1))


def call_moved(case: Case, d: Draw) -> dict[str, Tensor]:
    """The plain twin in float64, with a rounding of all that goes in, of each channel's mean, and between two ops.

    What is normalised is moved by a rounding of the working precision, all else by one of the case's dtype.
    """
    wide, narrow = eps_of(d.dtype), torch.finfo(d.dtype).eps
    names = {"bn_relu": ("weight", "bias"), "bn_relu_conv2d": ("bn_weight", "bn_bias")}
    given, x = dict(case.arguments), case.arguments.get("x")
    normalises = case.op in names or case.op.startswith("chained")
    if normalises and x.numel():
        weight, bias = names.get(case.op, ("gamma", "beta"))
        own = given.get("training", True) or given["running_mean"] is None
        values = x.double().nan_to_num(0, 0, 0)
        var = values.var((0, 2, 3), correction=0) if own else given["running_var"].double()
        mean = values.mean((0, 2, 3)) if own else given["running_mean"].double()
        slope = (var + given.get("eps", 1e-5)).rsqrt() * (1 if given[weight] is None else given[weight].double())
        shift = rounded(slope * mean, wide, d) - slope * mean
        given[bias] = (0 if given[bias] is None else given[bias].double()) + shift
    if case.op.startswith("chained"):
        given["noise"] = lambda t: rounded(t, narrow, d)
    moved = dataclasses.replace(case, arguments=given, dout=rounded(case.dout, narrow, d))
    exact = {"x"} if normalises else set()
    return call(moved, case.plain, lambda name, t: rounded(t, wide if name in exact else narrow, d))


def call(case: Case, fn: Any, convert: Any) -> dict[str, Tensor]:
    """Result, gradients and changed statistics of ``fn``, its tensors converted first."""
    arguments: dict[str, Any] = {}
    for name, value in case.arguments.items():
        if isinstance(value, Tensor):
            value = convert(name, value) if value.is_floating_point() else value.clone()
            if name in case.changed:
                value = value.clone()
            elif name in case.differentiate:
                value = value.detach().requires_grad_()
        arguments[name] = value
    before = {
        k: (v, v.detach().clone()) for k, v in arguments.items() if isinstance(v, Tensor) and k not in case.changed
    }
    out = fn(**arguments)
    if case.dout is None:
        case.dout = torch.randn(out.shape, dtype=torch.float64)
    out.backward(case.dout.to(out.dtype))
    for name, (value, kept) in before.items():
        if not torch.equal(torch.nan_to_num(value.detach()), torch.nan_to_num(kept)):
            raise Fault(f"{name} was changed")
    found = {"out": out.detach()}
    for name, value in arguments.items():
        if name in case.differentiate and isinstance(value, Tensor):
            if value.grad is None:
                raise Fault(f"{name} has no gradient")
            found[f"d{name}"] = value.grad
    return found | {name: arguments[name] for name in case.changed}


def distance(a: Tensor, b: Tensor, where: Tensor) -> float:
    return (a.double()[where] - b.double()[where]).norm().item()


def spreads(case: Case) -> bool:
    """Whether a Winograd kernel runs, which may make NaN of a whole tile that a NaN or infinity touches."""
    if "conv2d" not in case.op or "weight" not in case.arguments:
        return False
    if case.op.startswith("chained"):
        return True
    pair = [[v, v] if isinstance(v, int) else list(v) for v in (case.arguments["stride"], case.arguments["padding"])]
    assert _backend._C is not None
    x, weight = case.arguments["x"], case.arguments["weight"]
    passes = _backend._C.explain_conv(x, weight, *pair, paths(x), True)
    return any(fused and "Winograd" in why for fused, why, _ in passes)


def judge(case: Case, d: Draw) -> None:
    """Raise Fault unless the op does what its plain twin does."""
    exact = call(case, case.plain, lambda _, t: t.double().contiguous())
    ours = call(case, case.ours, lambda _, t: t)
    try:
        eager = call(case, case.plain, lambda _, t: t)
    except RuntimeError:  # PyTorch takes fewer mixtures of dtypes than the ops
        eager = call(case, case.plain, lambda name, t: t.to(d.wide) if name in NORM.get(case.op, ()) else t)
        eager = {name: value.to(ours[name].dtype) for name, value in eager.items()}
    whole_tiles = case.special and spreads(case)
    places = {name: compared(name, value, eager[name], whole_tiles) for name, value in ours.items()}
    changes = dict.fromkeys(ours, 0.0)
    # Rarely does one rounding carry a value over the ReLU's edge: where it may have, more are tried.
    for draws in (3, 40):
        for _ in range(draws):
            moved = call_moved(case, d)
            for name, where in places.items():
                where &= exact[name].isfinite() & moved[name].isfinite()
                changes[name] = max(changes[name], distance(moved[name], exact[name], where))
        faults = [text for name in ours if (text := too_far(name, ours, eager, exact, places[name], changes[name]))]
        if not faults:
            return
    raise Fault("; ".join(faults))


def compared(name: str, value: Tensor, other: Tensor, whole_tiles: bool) -> Tensor:
    """Where both are finite; Fault where dtype, shape, NaN and infinities are not PyTorch's."""
    if (value.shape, value.dtype) != (other.shape, other.dtype):
        raise Fault(f"{name}: {value.dtype} {list(value.shape)}, PyTorch {other.dtype} {list(other.shape)}")
    if not value.is_floating_point() and not torch.equal(value, other):
        raise Fault(f"{name}: {value}, PyTorch {other}")
    if whole_tiles:
        if (other.isnan() & ~value.isnan()).any():
            raise Fault(f"{name}: a NaN is lost")
        return value.isfinite() & other.isfinite()
    same = (value.isnan() == other.isnan()) & ((value == other) | ~(value.isinf() | other.isinf()))
    if not same.all():
        at = (~same).nonzero()[0].tolist()
        raise Fault(f"{name}{at}: {value[tuple(at)]:.4g}, PyTorch {other[tuple(at)]:.4g}")
    return other.isfinite()


def too_far(name: str, ours: Any, eager: Any, exact: Any, where: Tensor, change: float) -> str:
    """What is wrong with a result by the rule, where both are finite; "" where it is right."""
    dtype = ours[name].dtype
    if not dtype.is_floating_point:
        return ""
    error, theirs = (distance(found[name], exact[name], where) for found in (ours, eager))
    largest = max(e.double().nan_to_num(0, 0, 0).norm().item() for e in exact.values())
    floor = 4 * FLOOR[dtype] * exact[name].double()[where].norm().item() + 2 * change
    floor += torch.finfo(dtype).tiny * (1 + largest)
    if dtype == torch.float64:  # which has no finer twin: rounding of what cancels is the twin's as well
        floor += 6 * change + torch.finfo(dtype).eps * largest
    right = error <= 2 * theirs + floor
    return "" if right else f"{name}: error {error:.3g}, PyTorch's {theirs:.3g}, floor {floor:.3g}"


def judge_wrong(case: Case, argument: str) -> str:
    """Whether the call was "refused" or "taken"; Fault where the refusal does not say what is wrong."""
    value = case.arguments[argument]
    try:
        out = case.ours(**case.arguments)
        if out.requires_grad:
            out.sum().backward()
    except (ValueError, TypeError) as error:
        text = str(error)
        if META in text and getattr(value, "is_meta", False):
            return "refused"
        fits = isinstance(value, Tensor) or (isinstance(value, (int, np.integer)) and 1 <= value < 2**31)
        if not text.startswith(f"{case.op}: ") or not (argument in text or fits):  # 2 fits; then the mask does not
            raise Fault(f"{argument}={value!r:.80}: {type(error).__name__} names not both: {text[:200]}") from None
        return "refused"
    except RuntimeError as error:
        if any(words in str(error) for words in NO_MEMORY):
            return "refused"
        raise Fault(f"{argument}={value!r:.80}: {type(error).__name__}: {str(error)[:200]}") from None
    except Exception as error:
        raise Fault(f"{argument}={value!r:.80}: {type(error).__name__}: {str(error)[:200]}") from None
    return "taken"


def run_case(seed: str) -> str:
    """What came of case ``seed``; raises Fault."""
    kind = Draw(seed + "/kind").random.random()
    torch.manual_seed(0)
    if kind < 0.7:
        case, d = make(seed)
        judge(case, d)
        return f"{case.op}: right"
    if kind < 0.9:
        return f"wrong argument: {judge_wrong(*make_wrong(seed))}"
    name, arguments = direct(seed)
    try:
        getattr(torch.ops.ran_ext, name)(*arguments)
    except Exception:
        return "compiled op: refused"
    return "compiled op: taken"


def work(seed: int, first: int, last: int, log: Path) -> None:
    """Run cases [first, last); a line for each in ``log``, begun before and ended after it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with log.open("a") as out:
        for i in range(first, last):
            out.write(f"{i}\t")
            out.flush()
            try:
                said = run_case(f"{seed}/{i}")
            except Fault as fault:
                said = f"FAULT {fault}"
            except Exception as error:
                said = f"FAULT {type(error).__name__}: {error} {traceback.format_exc(limit=-1)!r}"
            out.write(said.replace("\n", " ") + "\n")


def supervise(cases: int, seed: int) -> list[tuple[int, str]]:
    """Every case and what came of it; a worker that dies is replaced by one that begins with the next."""
    with tempfile.TemporaryDirectory() as folder:
        log, first = Path(folder) / "log", 0
        log.touch()
        while first < cases:
            command = [sys.executable, __file__, "--work", str(seed), str(first), str(cases), str(log)]
            code = subprocess.run(command).returncode
            lines = log.read_text().split("\n")
            if lines[-1]:  # begun, not ended
                with log.open("a") as out:
                    out.write(f"FAULT crash, exit code {code}\n")
            elif code:
                raise SystemExit(f"fuzz_ops: the worker failed with exit code {code}")
            first = len(log.read_text().splitlines())
        return [(int(i), said) for i, said in (line.split("\t", 1) for line in log.read_text().splitlines())]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="SEED/NUMBER")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(*map(int, args.work[:3]), Path(args.work[3]))
        return 0
    if args.only:
        print(run_case(args.only))
        return 0
    results = supervise(args.cases, args.seed)
    faults = [(i, said) for i, said in results if said.startswith("FAULT")]
    for i, said in faults[:200]:
        print(f"{args.seed}/{i}: {said}")
    for said, count in sorted(Counter(said for _, said in results if not said.startswith("FAULT")).items()):
        print(f"{count:6} {said}")
    kernels = "plain PyTorch" if _backend._C is None else _backend._C.build_info()["cpu_kernels"]
    print(f"{len(results)} cases, {len(faults)} faults, kernels {kernels}, pid {os.getpid()}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
