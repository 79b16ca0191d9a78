"""Which contenders may be timed: those whose results are as close to a float64 oracle as PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .contenders import Subject

#: Relative difference to the float64 oracle, in the Euclidean norm, that always passes; float32 leaves room for TF32.
FLOORS = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 1e-2}
#: None passes above this, however far the baseline's own rounding takes it: a wrong or missing gradient differs by 1.
CEILING = 0.75


def differences(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """The relative difference of each tensor in the Euclidean norm; inf where it is not a number.

    >>> differences((torch.tensor([3.0, 4.0]),), (torch.tensor([0.0, 5.0]),))[0] < 0.64
    True
    """
    relative = [
        ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()
        for a, b in zip(found, expected, strict=True)
    ]
    return [value if math.isfinite(value) else math.inf for value in relative]


def limits(baseline: Subject, dtype: torch.dtype, oracle: tuple[Tensor, ...]) -> list[float]:
    """How far each tensor may be from the oracle: twice as far as the baseline's is."""
    return [max(FLOORS[dtype], min(CEILING, 2 * value)) for value in differences(baseline.check(), oracle)]


def verify(name: str, subject: Subject, limits: list[float], oracle: tuple[Tensor, ...]) -> None:
    """Hold a subject's results to the oracle.

    Raises:
        RuntimeError: they are further away; it would be timed for doing something else.
    """
    found = differences(subject.check(), oracle)
    if any(value > limit for value, limit in zip(found, limits, strict=True)):
        raise RuntimeError(
            f"verify: {name}: results must differ from the float64 oracle by at most {limits} (twice what those of "
            f"the baseline do), got {found}; wrong results are not timed"
        )


def admit(
    makers: Mapping[str, Callable[[], Subject]], dtype: torch.dtype, oracle: tuple[Tensor, ...]
) -> tuple[dict[str, Subject], dict[str, str]]:
    """The contenders that may be timed, and why the others may not.

    A contender that cannot be made (a missing package, a graph that a library does not support, a compiler's error) or
    that computes something else loses its own row only. The first, the baseline, must work: its errors are raised.
    """
    subjects: dict[str, Subject] = {}
    why_not: dict[str, str] = {}
    allowed: list[float] = []
    for name, make in makers.items():
        try:
            subject = make()
            allowed = allowed or limits(subject, dtype, oracle)
            verify(name, subject, allowed, oracle)
            subjects[name] = subject
        except Exception as error:  # of any library's own kind
            if not subjects:
                raise
            why_not[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return subjects, why_not
