"""``torch.func``: parameters as arguments, and derivatives as functions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from ecosystem.harness import Case, gradients, group, loss_of, parametrised, training
from torch import Tensor
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vjp, vmap

tool = group("Function transforms")


def weights(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the parameters and of the buffers, by name."""
    return (
        {name: p.detach().clone() for name, p in case.model.named_parameters()},
        {name: b.detach().clone() for name, b in case.model.named_buffers()},
    )


def without_statistics(case: Case) -> None:
    """As torch asks: in training its transforms refuse running statistics, which are written in place."""
    if not case.subject.folded:
        torch.func.replace_all_batch_norm_modules_(case.model)
    training(case)


def seeded(call: Any, *args: Any) -> Any:
    torch.manual_seed(0)
    return call(*args)


@tool("`functional_call` with other weights, then back")
def other_weights(case: Case) -> Any:
    case.model.eval()
    first = case.model(*case.batch())
    other = {name: value * 0.5 for name, value in case.model.state_dict().items() if value.is_floating_point()}
    if case.subject.folded:  # its weights are its own: what half of them gives is asked of a copy that holds them
        return folded_weights(case, other)
    return [first, functional_call(case.model, other, case.batch()), case.model(*case.batch())]


def folded_weights(case: Case, other: dict[str, Tensor]) -> Any:
    called = functional_call(case.model, other, case.batch())
    held = copy.deepcopy(case.model)
    held.load_state_dict(other, strict=False)
    torch.testing.assert_close(called, held(*case.batch()))
    return [case.model(*case.batch())]


@tool("`grad` of a training step in its parameters", on=parametrised)
def gradient(case: Case) -> Any:
    without_statistics(case)
    parameters, buffers = weights(case)

    def loss(parameters: Any) -> Tensor:
        return loss_of(functional_call(case.model, (parameters, buffers), case.batch()))

    return list(seeded(grad(loss), parameters).values())


@tool("`vjp` in the inputs")
def backward_product(case: Case) -> Any:
    without_statistics(case)
    out, pull = seeded(vjp, case.model, *case.batch())
    return [out, pull(torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out))]


@tool("`jvp` in the inputs")
def forward_product(case: Case) -> Any:
    without_statistics(case)
    return list(seeded(jvp, case.model, case.batch(), case.batch(1)))


@tool("`jvp` in the parameters", on=parametrised)
def forward_product_of_parameters(case: Case) -> Any:
    without_statistics(case)
    parameters, buffers = weights(case)
    directions = {name: torch.full_like(p, 0.1) for name, p in parameters.items()}

    def call(parameters: Any) -> Tensor:
        return functional_call(case.model, (parameters, buffers), case.batch())  # type: ignore[no-any-return]

    return list(seeded(jvp, call, (parameters,), (directions,)))


@tool("`hessian` in two numbers that mix two batches")
def curvature(case: Case) -> Any:
    case.model.eval()
    first, second = case.batch(), case.batch(1)

    def loss(mix: Tensor) -> Tensor:
        return loss_of(case.model(*(mix[0] * x + mix[1] * y for x, y in zip(first, second, strict=True))))

    return hessian(loss)(torch.tensor([0.7, 0.4]))


@tool("`vmap` over an ensemble's stacked weights", on=parametrised)
def ensemble(case: Case) -> Any:
    second = copy.deepcopy(case.model)
    for parameter in second.parameters():
        parameter.data *= 0.9
    parameters, buffers = stack_module_state([case.model.eval(), second.eval()])
    batch = case.batch()

    def call(parameters: Any, buffers: Any) -> Tensor:
        return functional_call(case.model, (parameters, buffers), batch)  # type: ignore[no-any-return]

    return vmap(call)(parameters, buffers)


@tool("`vmap(grad)`: one gradient for each picture", on=parametrised)
def per_sample(case: Case) -> Any:
    case.model.eval()
    parameters, buffers = weights(case)

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return loss_of(functional_call(case.model, (parameters, buffers), (x[None],)))

    return list(vmap(grad(loss), in_dims=(None, 0))(parameters, case.batch()[0]).values())


@tool("`torch.autograd.gradgrad`: a gradient penalty")
def gradient_penalty(case: Case) -> Any:
    training(case)
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in case.batch()]
    out = case.model(*inputs)
    slopes = torch.autograd.grad(loss_of(out), inputs, create_graph=True)
    sum(slope.square().sum() for slope in slopes).backward()  # type: ignore[union-attr]
    own = [] if case.subject.folded else gradients(case.model)
    return [slopes, [x.grad for x in inputs], own]


UNSEEN = "writes by way of `weight.data` go unseen by a folded network's packed weights: write in `torch.no_grad()`"


@tool("weights written in place between two calls", remark={"folded": UNSEEN})
def written_in_place(case: Case) -> Any:
    case.model.eval()
    first = case.model(*case.batch())
    if case.subject.folded:
        with torch.no_grad():
            for p in case.model.parameters():
                p.mul_(0.9)
        fresh = copy.deepcopy(case.model)  # copies carry no packed weights
        torch.testing.assert_close(case.model(*case.batch()), fresh(*case.batch()))
        return [first]
    for p in case.model.parameters():
        p.data.mul_(0.9)
    return [first, case.model(*case.batch())]
