"""The table: a tool is a function of a case; the same function runs on ours and on the plain twin, and both must agree.

A cell of the table is one tool on one subject. It is ``=`` where every tensor, number and name that the tool's function
returns is the twin's, a sentence where the tool is refused with an error that says so, and ``·`` where the subject has
nothing that the tool acts on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from ecosystem.subjects import NETWORKS, SUBJECTS, Subject
from torch import Tensor, nn

EQUAL, NOTHING, LEFT_OUT = "=", "·", ""
#: Networks of the same modules as ran_compact, and modules that are in an AttentionModule and in every network: tried
#: with --every-cell alone.
RARE = ("ran_base", "ran_paper", "ResidualUnit", "SoftMaskBranch")


@dataclass
class Case:
    """What a tool's function gets: ours or the twin, its batches, a folder for files, and what builds another."""

    model: nn.Module
    subject: Subject
    folder: Path
    build: Callable[[], nn.Module] = nn.Identity

    def batch(self, step: int = 0) -> tuple[Tensor, ...]:
        return self.subject.batch(step)

    def named(self, kind: type[nn.Module]) -> dict[str, nn.Module]:
        """Children of exactly this kind, in the order of the network."""
        return {name: module for name, module in self.model.named_modules() if name and type(module) is kind}


@dataclass(frozen=True)
class Tool:
    """A row of the table.

    ``needs``: the kind of child that it acts on. ``on``: the only subjects, where not all. ``plain``: what the twin
    does where that is not the same. ``says``: by subject, what the error says where the tool is refused. ``remark``:
    what to know where the cells are equal all the same, of every subject or by subject. ``tolerance``: of the values,
    relative to the largest, likewise; None for what a few steps make of the dtype's rounding. ``slow``: subjects left
    out since they take long, and one of the same parts is tried. ``single``: networks in float32 too, the tool knows
    no other.
    """

    name: str
    group: str
    act: Callable[[Case], Any]
    needs: type[nn.Module] | None = None
    on: Callable[[Subject], bool] = lambda subject: True
    plain: Callable[[Case], Any] | None = None
    says: Mapping[str, str] = field(default_factory=dict)
    remark: str | Mapping[str, str] = ""
    tolerance: float | Mapping[str, float] | None = None
    slow: Collection[str] = ()
    rare: Collection[str] = ()
    single: bool = False

    def acts_on(self, subject: Subject) -> bool:
        if not self.on(subject):
            return False
        return self.needs is None or any(type(module) is self.needs for module in list(subject.twin().modules())[1:])

    def is_rare(self, subject: str) -> bool:
        return subject in RARE or subject in self.rare


TOOLS: dict[str, Tool] = {}


def group(title: str) -> Callable[..., Callable[[Callable[[Case], Any]], Callable[[Case], Any]]]:
    """A decorator that adds tools to the table under ``title``."""

    def tool(name: str, **options: Any) -> Callable[[Callable[[Case], Any]], Callable[[Case], Any]]:
        def add(act: Callable[[Case], Any]) -> Callable[[Case], Any]:
            assert name not in TOOLS, name
            TOOLS[name] = Tool(name, title, act, **options)
            return act

        return add

    return tool


def everywhere(sentence: str) -> dict[str, str]:
    """``says`` of a tool that every subject refuses."""
    return dict.fromkeys(SUBJECTS, sentence)


def trained(subject: Subject) -> bool:
    """For tools that train, or that look for children by type: a folded network is for evaluation, and has none."""
    return not subject.folded


def trained_network(subject: Subject) -> bool:
    return subject.name in NETWORKS and not subject.folded


def parametrised(subject: Subject) -> bool:
    return not subject.folded and subject.name != "AttentionGate"


def training(case: Case) -> None:
    """Training mode, but for a folded network, which has none."""
    case.model.train(not case.subject.folded)


def loss_of(out: Tensor) -> Tensor:
    """No value of the output has the same weight as its neighbour; curved, so that second derivatives are not 0."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float32).reshape(out.shape).to(out)
    return 3 * (out * weights).mean() + out.square().mean()


def step(case: Case, call: Callable[..., Tensor] | None = None, number: int = 0) -> dict[str, Any]:
    """One forward and backward pass: output and gradients, before any optimizer."""
    training(case)
    torch.manual_seed(number)
    inputs = [x.requires_grad_() for x in case.batch(number)]
    out = (case.model if call is None else call)(*inputs)
    loss_of(out).backward()
    return {
        "out": out,
        "inputs": [x.grad for x in inputs],
        "parameters": [] if case.subject.folded else gradients(case.model),
    }


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def sgd(model: nn.Module) -> torch.optim.Optimizer | None:
    wanted = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(wanted, lr=0.01, momentum=0.9) if wanted else None


def train(
    case: Case,
    call: Callable[..., Tensor] | None = None,
    steps: int = 2,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """``steps`` steps, then the output in evaluation: all of it, and the state that the model ends in."""
    optimizer = optimizer or sgd(case.model)
    passes = []
    for number in range(steps):
        case.model.zero_grad()
        passes.append(copied(step(case, call, number)))
        if optimizer is not None:
            optimizer.step()
    return {"steps": passes, **evaluated(case, call)}


def evaluated(case: Case, call: Callable[..., Tensor] | None = None) -> dict[str, Any]:
    case.model.eval()
    with torch.no_grad():
        out = (case.model if call is None else call)(*case.batch(7))
    state = [] if case.subject.folded else [t.detach() for t in (*case.model.parameters(), *case.model.buffers())]
    return {"evaluation": out, "state": state}


def copied(value: Any) -> Any:
    """Tensors out of reach of the next step."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), value)


def agree(got: Any, expected: Any, tolerance: float, where: str = "") -> None:
    """Both are the same tree, with the same dtypes, and values within ``tolerance`` of the largest.

    The smallest of some gradients are pure rounding (that of a bias before a batch normalisation): a hundredth of the
    largest of their list counts as their size.
    """
    if isinstance(expected, Mapping):
        assert list(got) == list(expected), f"{where}: {list(got)} for {list(expected)}"
        for key in expected:
            agree(got[key], expected[key], tolerance, f"{where}.{key}")
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(got) == len(expected), f"{where}: {len(got)} for {len(expected)}"
        sizes = [largest(t) for t in expected if isinstance(t, Tensor)]
        for i, (one, other) in enumerate(zip(got, expected, strict=True)):
            if isinstance(other, Tensor):
                close(one, other, tolerance, f"{where}[{i}]", max(sizes) / 100)
            else:
                agree(one, other, tolerance, f"{where}[{i}]")
    elif isinstance(expected, Tensor):
        close(got, expected, tolerance, where)
    else:
        assert got == expected, f"{where}: {got!r} for {expected!r}"


def largest(tensor: Tensor) -> float:
    return tensor.detach().abs().max().item() if tensor.numel() and not tensor.is_meta else 0.0


def close(got: Any, expected: Tensor, tolerance: float, where: str, least: float = 0.0) -> None:
    assert isinstance(got, Tensor), f"{where}: {got!r} for a tensor"
    kinds = [(tuple(t.shape), t.dtype, t.device, type(t)) for t in (got, expected)]
    assert kinds[0] == kinds[1], f"{where}: {kinds[0]} for {kinds[1]}"
    if got.is_meta or not got.numel():
        return
    got, expected = got.detach().double(), expected.detach().double()
    allowed = tolerance * max(largest(expected), least)
    off = (got - expected).abs().max().item()
    assert off <= allowed, f"{where}: off by {off:.3g}, allowed {allowed:.3g}"


def run(tool: Tool, subject: Subject, folder: Path) -> str:
    """Run a cell; its entry in the table, or an error where the two differ and no sentence says why."""
    subject = replace(subject, dtype=torch.float32) if tool.single else subject
    model, twin = subject.pair()
    for name in ("ours", "twin"):
        (folder / name).mkdir()
    torch.manual_seed(0)
    expected = (tool.plain or tool.act)(Case(twin, subject, folder / "twin", subject.twin))
    sentence = tool.says.get(subject.name)
    torch.manual_seed(0)
    try:
        got = tool.act(Case(model, subject, folder / "ours", subject.build))
    except Exception as error:
        if sentence is None or sentence not in str(error):
            raise
        return f"refused: {sentence}"
    assert sentence is None, f"{tool.name} no longer refuses {subject.name}: take its sentence out"
    tolerance = tool.tolerance.get(subject.name) if isinstance(tool.tolerance, Mapping) else tool.tolerance
    agree(got, expected, tolerance or (2e-3 if subject.dtype is torch.float32 else 1e-6))
    remark = tool.remark if isinstance(tool.remark, str) else tool.remark.get(subject.name, "")
    return remark or EQUAL


def clone(case: Case) -> Case:
    """A case with a copy of the model, for tools that change what they are given."""
    return Case(copy.deepcopy(case.model), case.subject, case.folder)


__all__ = [
    "EQUAL",
    "LEFT_OUT",
    "NOTHING",
    "SUBJECTS",
    "TOOLS",
    "Case",
    "Subject",
    "Tool",
    "agree",
    "clone",
    "copied",
    "evaluated",
    "everywhere",
    "gradients",
    "group",
    "loss_of",
    "parametrised",
    "run",
    "sgd",
    "step",
    "train",
    "trained",
    "trained_network",
    "training",
]
