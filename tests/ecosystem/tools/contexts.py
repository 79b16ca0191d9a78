"""Modes, devices, dtypes and kinds of tensor that change what a call means."""

from __future__ import annotations

from typing import Any

import torch
from ecosystem.harness import Case, copied, group, step, train, trained, training
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

tool = group("Contexts, devices and kinds of tensor")


@tool("`torch.use_deterministic_algorithms(True)`, two runs bit for bit")
def deterministic(case: Case) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (copied(step(case)) for _ in range(2) if not case.model.zero_grad())
        assert torch.equal(first["out"], second["out"])
        return first
    finally:
        torch.use_deterministic_algorithms(False)


@tool("`torch.inference_mode`")
def inference_mode(case: Case) -> Any:
    with torch.inference_mode():
        return case.model.eval()(*case.batch())


@tool("`torch.set_default_dtype(torch.float64)`: built, trained", on=trained, tolerance=1e-9)
def default_dtype(case: Case) -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        model = case.build()
        model.load_state_dict(case.model.state_dict())
        inputs = [x.double().requires_grad_() for x in case.batch()]
        torch.manual_seed(0)
        out = model(*inputs)
        out.square().mean().backward()
        return [out, [x.grad for x in inputs], [p.grad for p in model.parameters()]]
    finally:
        torch.set_default_dtype(torch.float32)


@tool("`with torch.device('meta')`: built there, `to_empty`, weights loaded", on=trained)
def default_device(case: Case) -> Any:
    with torch.device("meta"):
        model = case.build().to(case.subject.dtype)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").load_state_dict(case.model.state_dict())
    case.model = model
    return train(case)


@tool("`torch.set_default_device`: built, trained", on=trained)
def default_device_everywhere(case: Case) -> Any:
    torch.set_default_device("cpu")
    try:
        model = case.build().to(case.subject.dtype)
        model.load_state_dict(case.model.state_dict())
        case.model = model
        return train(case)
    finally:
        torch.set_default_device(None)


@tool("a forward pass on the meta device")
def meta(case: Case) -> Any:
    training(case)
    return case.model.to("meta")(*(x.to("meta") for x in case.batch()))


@tool("a training step in `FakeTensorMode`")
def fake(case: Case) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        training(case)
        inputs = [mode.from_tensor(x).requires_grad_() for x in case.batch()]
        out = case.model(*inputs)
        out.sum().backward()
        return [tuple(t.shape) for t in (out, *(x.grad for x in inputs))], [str(out.dtype), str(out.device)]


class Named(Tensor):
    """A subclass by ``__torch_function__`` alone, as fastai's ``TensorImage`` is."""


@tool("a `Tensor` subclass that `__torch_function__` carries through")
def subclass(case: Case) -> Any:
    training(case)
    torch.manual_seed(0)
    inputs = [x.as_subclass(Named).requires_grad_() for x in case.batch()]
    out = case.model(*inputs)
    out.square().mean().backward()
    return [type(out).__name__, out.as_subclass(Tensor), [x.grad.as_subclass(Tensor) for x in inputs]]


class Wrapped(Tensor):
    """A wrapper subclass by ``__torch_dispatch__``, as quantised and distributed tensors are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Wrapped, func(*args, **kwargs))


@tool("a wrapper subclass by `__torch_dispatch__`")
def wrapper_subclass(case: Case) -> Any:
    training(case)
    torch.manual_seed(0)
    inputs = [Wrapped(x).requires_grad_() for x in case.batch()]
    out = case.model(*inputs)
    out.sum().backward()
    return [type(out).__name__, out.inner, [x.grad.inner for x in inputs]]


@tool("a `TorchDispatchMode` that watches every op")
def dispatch_mode(case: Case) -> Any:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with Watch():
        return step(case)


@tool("`torch.autograd.set_detect_anomaly(True)`")
def anomaly(case: Case) -> Any:
    with torch.autograd.set_detect_anomaly(True):
        return step(case)


@tool("`torch.backends.mkldnn` switched off")
def without_onednn(case: Case) -> Any:
    with torch.backends.mkldnn.flags(enabled=False):
        return step(case)
