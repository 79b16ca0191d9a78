"""``torch.compile``: Inductor on the modules, and on the networks the graphs that it is given."""

from __future__ import annotations

from typing import Any

import torch
from ecosystem.harness import NETWORKS, SUBJECTS, Case, group, step, train, trained

tool = group("`torch.compile`")


def compiled(case: Case, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(case.model, **options)


def trained_plainly(case: Case) -> Any:
    return train(case)


@tool(
    "the graphs of a training step, `fullgraph=True` (`backend='aot_eager'`)",
    plain=trained_plainly,
    slow=("ran_base", "ran_paper"),
    rare=("ran_compact", "folded"),
)
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
    slow=("AttentionModule", "ran_base", "ran_paper"),
    rare=("ran_compact", "folded"),
)
def dynamic(case: Case) -> Any:
    model = compiled(case, dynamic=True, fullgraph=True, backend="aot_eager")
    return sizes(case, model)


def stepped_plainly(case: Case) -> Any:
    return step(case)


def all_but(*names: str) -> tuple[str, ...]:
    """Inductor's C++ takes a compiler many seconds: the subjects that it is not tried on."""
    return tuple(name for name in SUBJECTS if name not in names)


@tool(
    "Inductor, default mode: a training step",
    plain=stepped_plainly,
    slow=all_but("AttentionGate", "BNReLUConv2d", "ran_compact"),
    rare=("ran_compact",),
    single=True,
)
def default(case: Case) -> Any:
    with torch._inductor.config.patch(fallback_random=True):  # dropout draws as in eager PyTorch
        return step(case, compiled(case))


@tool("Inductor, `mode='reduce-overhead'`", slow=all_but("BNReLUConv2d"), plain=stepped_plainly, single=True)
def reduce_overhead(case: Case) -> Any:
    return step(case, compiled(case, mode="reduce-overhead"))


@tool("Inductor, `mode='max-autotune'`", slow=all_but("BNReLUConv2d"), plain=stepped_plainly, single=True)
def max_autotune(case: Case) -> Any:
    return step(case, compiled(case, mode="max-autotune"))


@tool(
    "Inductor on a folded network", on=lambda s: s.folded, plain=lambda case: sizes(case, case.model)[:1], single=True
)
def folded(case: Case) -> Any:
    with torch.no_grad():
        return [compiled(case)(*case.batch())]


@tool("`model.compile()` in place, then `state_dict`", on=trained, slow=NETWORKS)
def in_place(case: Case) -> Any:
    torch._dynamo.reset()
    case.model.compile(backend="aot_eager")
    return [train(case), list(case.model.state_dict().values())]


@tool(
    "AOTInductor (`torch._inductor.aoti_compile_and_package`)",
    slow=all_but("ResidualUnit"),
    plain=lambda c: [c.model.eval()(*c.batch())],
    single=True,
)
def ahead_of_time(case: Case) -> Any:
    program = torch.export.export(case.model.eval(), case.batch())
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(case.folder / "model.pt2"))
    return [torch._inductor.aoti_load_package(path)(*case.batch())]
