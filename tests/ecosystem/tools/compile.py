"""``torch.compile``: Inductor on the modules, and on the networks the graphs that it is given."""

from __future__ import annotations

from typing import Any

import torch
from ecosystem.harness import Case, Subject, group, step, train, trained
from ecosystem.subjects import NETWORKS

tool = group("`torch.compile`")


def module(subject: Subject) -> bool:
    return subject.name not in NETWORKS


def compiled(case: Case, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(case.model, **options)


def trained_plainly(case: Case) -> Any:
    return train(case)


@tool("the graphs of a training step, `fullgraph=True` (`backend='aot_eager'`)", plain=trained_plainly)
def graphs(case: Case) -> Any:
    return train(case, compiled(case, fullgraph=True, backend="aot_eager"))


def sizes_plainly(case: Case) -> Any:
    return sizes(case, case.model)


def sizes(case: Case, model: Any) -> Any:
    case.model.eval()
    with torch.no_grad():
        return [model(*(x[:number] for x in case.batch())) for number in (4, 3, 2)]


@tool(
    "`dynamic=True`, three batch sizes, one graph (`backend='aot_eager'`)",
    plain=sizes_plainly,
    slow=("ran_base", "ran_paper"),
)
def dynamic(case: Case) -> Any:
    model = compiled(case, dynamic=True, fullgraph=True, backend="aot_eager")
    found = sizes(case, model)
    return found


def stepped_plainly(case: Case) -> Any:
    return step(case)


@tool(
    "Inductor, default mode: a training step",
    on=lambda s: module(s) or s.name == "ran_compact",
    plain=stepped_plainly,
    single=True,
)
def default(case: Case) -> Any:
    return step(case, compiled(case))


TINY = ("AttentionGate", "BNReLUConv2d")


@tool("Inductor, `mode='reduce-overhead'`", on=lambda s: s.name in TINY, plain=stepped_plainly, single=True)
def reduce_overhead(case: Case) -> Any:
    return step(case, compiled(case, mode="reduce-overhead"))


@tool("Inductor, `mode='max-autotune'`", on=lambda s: s.name in TINY, plain=stepped_plainly, single=True)
def max_autotune(case: Case) -> Any:
    return step(case, compiled(case, mode="max-autotune"))


@tool(
    "Inductor on a folded network", on=lambda s: s.folded, plain=lambda case: sizes(case, case.model)[:1], single=True
)
def folded(case: Case) -> Any:
    with torch.no_grad():
        return [compiled(case)(*case.batch())]


@tool("`model.compile()` in place, then `state_dict`", on=trained, slow=("ran_base", "ran_paper"))
def in_place(case: Case) -> Any:
    torch._dynamo.reset()
    case.model.compile(backend="aot_eager")
    return [train(case), list(case.model.state_dict().values())]


@tool(
    "AOTInductor (`torch._inductor.aoti_compile_and_package`)",
    on=lambda s: s.name == "ResidualUnit",
    plain=lambda c: [c.model.eval()(*c.batch())],
    single=True,
)
def ahead_of_time(case: Case) -> Any:
    program = torch.export.export(case.model.eval(), case.batch())
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(case.folder / "model.pt2"))
    return [torch._inductor.aoti_load_package(path)(*case.batch())]
