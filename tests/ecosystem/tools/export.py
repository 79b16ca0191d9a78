"""Programs made of a model: exporters and tracers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from ecosystem.harness import Case, everywhere, gradients, group, loss_of, step, trained
from torch import Tensor

tool = group("Export and tracing")


def plainly(case: Case) -> Any:
    """What every program is held to: the twin's own results."""
    case.model.eval()
    with torch.no_grad():
        return [case.model(*case.batch()), case.model(*(x[:2] for x in case.batch(1)))]


def both(case: Case, program: Any) -> Any:
    with torch.no_grad():
        return [program(*case.batch()), program(*(x[:2] for x in case.batch(1)))]


def exported(case: Case, **options: Any) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = tuple({0: batch} for _ in case.batch())
    return torch.export.export(case.model.eval(), case.batch(), dynamic_shapes=dynamic, **options)


def is_plain(program: torch.export.ExportedProgram) -> bool:
    """Only ATen's own ops, which every consumer of a program knows."""
    return all("ran_ext" not in str(node.target) for node in program.graph.nodes)


@tool("`torch.export.export`, batch dynamic, only ATen's ops inside", plain=plainly)
def export(case: Case) -> Any:
    program = exported(case)
    assert is_plain(program), "ops of ran_ext in the program"
    return both(case, program.module())


@tool("the same, `strict=True`, saved and loaded", plain=plainly, slow=("ran_base", "ran_paper"), rare=("ran_compact",))
def export_strict(case: Case) -> Any:
    torch.export.save(exported(case, strict=True), case.folder / "model.pt2")
    return both(case, torch.export.load(case.folder / "model.pt2").module())


@tool("`torch.export.export` of a model in training mode", on=trained)
def export_training(case: Case) -> Any:
    program = torch.export.export(case.model.train(), case.batch()).module()
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in case.batch()]
    out = program(*inputs)
    loss_of(out).backward()
    return [out, [x.grad for x in inputs], gradients(program), list(program.buffers())]


@tool("`torch.onnx.export` (opset 18), run by `onnxruntime`", plain=plainly, single=True)
def onnx(case: Case) -> Any:
    import onnxruntime

    path = str(case.folder / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(exported(case), case.batch(), path, opset_version=18, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def program(*inputs: Tensor) -> Tensor:
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return both(case, program)


@tool("`torch.onnx.export(model)`, by TorchScript (`dynamo=False`)", plain=lambda case: plainly(case)[:1], single=True)
def onnx_torchscript(case: Case) -> Any:
    import onnxruntime

    path = str(case.folder / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(case.model.eval(), case.batch(), path, opset_version=18, dynamo=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {one.name: x.numpy() for one, x in zip(session.get_inputs(), case.batch(), strict=True)}
    return [torch.from_numpy(session.run(None, feed)[0])]


@tool("`torch.fx.symbolic_trace`, then training", on=trained)
def symbolic_trace(case: Case) -> Any:
    case.model = torch.fx.symbolic_trace(case.model)
    assert not any("ran_ext" in str(node.target) for node in case.model.graph.nodes)
    return step(case)


@tool("`torch.fx.symbolic_trace` in evaluation", plain=plainly)
def symbolic_trace_evaluation(case: Case) -> Any:
    return both(case, torch.fx.symbolic_trace(case.model.eval()))


@tool("`torch.fx.experimental.optimization.fuse`: batch normalisations folded", on=trained, plain=plainly)
def fx_fuse(case: Case) -> Any:
    from torch.fx.experimental.optimization import fuse

    return both(case, fuse(case.model.eval()))


@tool("`make_fx`", plain=plainly)
def make_fx(case: Case) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    case.model.eval()
    with torch.no_grad():
        first = make_fx(case.model)(*case.batch())(*case.batch())
        return [first, make_fx(case.model)(*(x[:2] for x in case.batch(1)))(*(x[:2] for x in case.batch(1)))]


@tool("`torch.jit.trace`, saved and loaded", plain=plainly)
def jit_trace(case: Case) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(case.model.eval(), case.batch()).save(str(case.folder / "model.ts"))
    return both(case, torch.jit.load(str(case.folder / "model.ts")))


@tool("`torch.jit.trace` of a model in training mode", on=trained)
def jit_trace_training(case: Case) -> Any:
    case.model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.model = torch.jit.trace(case.model, case.batch(), check_trace=False)
    return step(case)["out"].shape


@tool(
    "`torch.jit.script`",
    plain=plainly,
    says=everywhere(
        "use torch.jit.trace(model.eval(), images) or torch.export.export(model.eval(), (images,)) instead"
    ),
)
def jit_script(case: Case) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return both(case, torch.jit.script(case.model.eval()))
