"""How each kernel's accesses fall on memory, held to budgets: csrc/cuda/layout.json.

Of each kernel, at shapes whose tensors are aligned: wavefronts of shared memory and sectors of global memory against
the ideal (access_log.h), and how many of a tensor's accesses are of less than 16 bytes. Up to LEAST above the ideal
needs no explanation; more needs the "why" of an entry.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .translate import Kernel

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = ROOT / "csrc" / "cuda" / "layout.json"
LEAST = 1.1


@dataclass
class Instruction:
    """One access of a kernel, over all that a run of it did."""

    kernel: str
    number: int
    kind: str
    bytes: int
    used: int
    ideal: int
    narrow: int

    @property
    def shared(self) -> bool:
        return "shared" in self.kind or "matrix" in self.kind


@dataclass
class Layout:
    """A kernel's sums over its instructions."""

    instructions: list[Instruction] = field(default_factory=list)

    def ratio(self, shared: bool) -> float:
        chosen = [i for i in self.instructions if i.shared == shared]
        return round(sum(i.used for i in chosen) / sum(i.ideal for i in chosen), 3) if chosen else 1.0

    def figures(self) -> dict[str, float]:
        narrow = sum(i.narrow for i in self.instructions)
        return {"wavefronts": self.ratio(True), "sectors": self.ratio(False), "narrow": narrow}


def read(text: str) -> dict[str, Layout]:
    """What layout.cpp printed, by kernel; several runs of one are put together."""
    found: dict[str, Layout] = {}
    for line in text.splitlines():
        kernel, number, kind, *numbers = line.split(" | ")
        one = Instruction(kernel, int(number), kind, *map(int, numbers))
        found.setdefault(kernel, Layout()).instructions.append(one)
    return found


def budgets() -> dict[str, Any]:
    """What BUDGETS holds of each kernel."""
    held: dict[str, Any] = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    held.pop("digest", None)
    return held


def digest() -> str:
    """Of all that ``--update`` ran when it wrote BUDGETS, and found without a fault."""
    return str(json.loads(BUDGETS.read_text()).get("digest", "")) if BUDGETS.exists() else ""


def faults(found: dict[str, Layout], budgets: dict[str, Any]) -> Iterator[str]:
    """Where a kernel takes more than its budget, has none, or a budget explains nothing."""
    for kernel, layout in sorted(found.items()):
        budget = budgets.get(kernel)
        if budget is None:
            yield f"{kernel}: has no budget; --update writes it"
            continue
        for what, value in layout.figures().items():
            if value > budget[what] + (0.0 if what == "narrow" else 0.005):
                yield f"{kernel}: {what} {value}, and its budget is {budget[what]}"
            if value > (0 if what == "narrow" else LEAST) and not budget.get("why"):
                yield f"{kernel}: {what} {value}, and its budget does not say why"
    for kernel in budgets.keys() - found.keys():
        yield f"{kernel}: has a budget and was not run; --update drops it"


def update(found: dict[str, Layout], made_of: str) -> None:
    """Writes what was found, a line a kernel; reasons stay."""
    held, lines = budgets(), [f'  "digest": "{made_of}"']
    for kernel, layout in sorted(found.items()):
        why = {"why": held[kernel]["why"]} if "why" in held.get(kernel, {}) else {}
        lines.append(f"  {json.dumps(kernel)}: {json.dumps({**layout.figures(), **why})}")
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def worst(layout: Layout, kernels: dict[str, Kernel], count: int = 3) -> Iterator[str]:
    """The instructions that cost most beyond the ideal, with their places in the sources."""
    for i in sorted(layout.instructions, key=lambda i: i.ideal - i.used - i.narrow)[:count]:
        if i.used > LEAST * i.ideal or i.narrow:
            place = kernels[i.kernel].places[i.number]
            yield f"{i.kind} of {i.bytes} bytes: {i.used} for {i.ideal}, {i.narrow} narrow  {place}"
