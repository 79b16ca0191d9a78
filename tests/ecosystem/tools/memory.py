"""What decides which tensors are kept between forward and backward, and at which precision."""

from __future__ import annotations

from typing import Any

import torch
from ecosystem.harness import SUBJECTS, Case, copied, evaluated, group, parametrised, step, train
from torch import Tensor
from torch.utils.checkpoint import checkpoint

tool = group("Activations: checkpointing, saved tensors, precision, layout")

ONCE = dict.fromkeys(
    (name for name in SUBJECTS if name not in ("AttentionGate", "folded")),
    "as without checkpoints: running statistics count a batch once; eager PyTorch counts it again when it recomputes",
)


def without_checkpoints(case: Case) -> Any:
    return train(case)


@tool("`torch.utils.checkpoint`, `use_reentrant=True`", plain=without_checkpoints, remark=ONCE)
def reentrant(case: Case) -> Any:
    return train(case, lambda *xs: checkpoint(case.model, *xs, use_reentrant=True, preserve_rng_state=True))


@tool("`torch.utils.checkpoint`, `use_reentrant=False`", plain=without_checkpoints, remark=ONCE)
def not_reentrant(case: Case) -> Any:
    return train(case, lambda *xs: checkpoint(case.model, *xs, use_reentrant=False, preserve_rng_state=True))


@tool("`torch.autograd.graph.save_on_cpu`")
def saved_on_cpu(case: Case) -> Any:
    def call(*inputs: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return case.model(*inputs)  # type: ignore[no-any-return]

    return train(case, call)


@tool("`torch.autograd.graph.saved_tensors_hooks`, tensors packed into numpy and back")
def saved_tensors(case: Case) -> Any:
    packed = []

    def pack(tensor: Tensor) -> Any:
        packed.append(tensor.numel())
        return tensor.detach().clone().numpy()

    def call(*inputs: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
            return case.model(*inputs)  # type: ignore[no-any-return]

    found = train(case, call)
    assert packed
    return found


@tool("`torch.autocast`, bfloat16, with `torch.amp.GradScaler`", on=parametrised, tolerance=0.1, single=True)
def autocast(case: Case) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.01)
    case.model.train()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.model(*case.batch()).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(case.model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    return {"loss": loss, "norm": norm, **evaluated(case), "scale": scaler.get_scale()}


FOLD = "fold the trained model with fold_for_inference(model, dtype=torch.bfloat16)"


@tool("`model.bfloat16()`", tolerance=6e-2, single=True, says={"folded": FOLD})
def bfloat16(case: Case) -> Any:
    case.model.bfloat16().eval()
    with torch.no_grad():
        return case.model(*(x.bfloat16() for x in case.batch()))


@tool("`model.double()`", tolerance=1e-8, on=lambda subject: not subject.folded)
def double(case: Case) -> Any:
    case.model.double().train()
    torch.manual_seed(0)
    inputs = [x.double().requires_grad_() for x in case.batch()]
    out = case.model(*inputs)
    out.square().mean().backward()
    return [out, [x.grad for x in inputs], [p.grad for p in case.model.parameters()]]


@tool("NCHW tensors and weights (elsewhere all are channels_last)")
def contiguous(case: Case) -> Any:
    case.model.to(memory_format=torch.contiguous_format)
    return train(case, lambda *xs: case.model(*(x.contiguous() for x in xs)))


@tool("gradients accumulated over three batches, `zero_grad(set_to_none=False)`")
def accumulated(case: Case) -> Any:
    found = [copied(step(case, number=number)) for number in range(3)]
    case.model.zero_grad(set_to_none=False)
    return [found, step(case, number=3)]
