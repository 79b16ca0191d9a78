"""The contenders, and the functions that are timed: each op and network as each contender runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ran_ext import convert, fold_for_inference, models, set_backend
from ran_ext.train import CudaGraph

from .cases import Case, draw
from .reference import networks as plain_networks

T = TypeVar("T")

#: The baselines of the ratios; the second where it is present.
BASELINES = ("eager channels_last", "torch.compile")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to run a case.

    Args:
        name: of its row.
        dtype: of the tensors (ops), or of autocast (networks; float32 for none).
        ours: through ran_ext, or in plain PyTorch.
        converted: the plain network, given to :func:`ran_ext.convert`.
        backend: of ran_ext; ``"native"`` raises an error where the kernels are missing.
        layout: memory format of images and parameters.
        compile: arguments of ``torch.compile``; None for eager.
        graph: captured in a CUDA graph and replayed.
        prepare: applied to a trained network for inference; it sets the dtype, without autocast.
    """

    name: str
    dtype: torch.dtype
    ours: bool = False
    converted: bool = False
    backend: str = "native"
    layout: torch.memory_format = torch.channels_last
    compile: dict[str, Any] | None = None
    graph: bool = False
    prepare: Callable[[nn.Module], nn.Module] | None = None


#: Seed of the output's gradient, the same for all contenders of an op.
GRADIENT_SEED = 9
#: Keeps float16 gradients from vanishing; Adam's step does not depend on it, so nothing scales them back.
LOSS_SCALE = 1024.0
#: The contender that all others are compared with before they are timed.
ORACLE = Contender("oracle", torch.float64, layout=torch.contiguous_format)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is timed; before that, the tensors that ``check`` returns are compared."""

    run: Callable[[], object]
    check: Callable[[], tuple[Tensor, ...]]


def contenders(dtype: torch.dtype, device: torch.device, compiled: bool, task: str) -> list[Contender]:
    """The rows for one dtype, the baseline first.

    Args:
        dtype: float32, bfloat16 or float16.
        device: CUDA has CUDA graphs and ``max-autotune`` besides.
        compiled: also those that torch.compile makes.
        task: ``"forward"``, ``"forward + backward"``, ``"training step"`` or ``"inference"``.
    """
    network, cuda = task in ("training step", "inference"), device.type == "cuda"
    rows = [
        Contender(BASELINES[0], dtype),
        Contender("eager NCHW fp32", torch.float32, layout=torch.contiguous_format),
    ]
    if cuda:
        rows.append(Contender("eager, CUDA graph", dtype, graph=True))
    if compiled:
        rows.append(Contender(BASELINES[1], dtype, compile={}))
        if task == "inference" and not cuda:
            rows.append(Contender("torch.compile, freezing", dtype, compile={"options": {"freezing": True}}))
        if cuda:
            rows.append(Contender("max-autotune", dtype, compile={"mode": "max-autotune-no-cudagraphs"}))
            rows.append(Contender("max-autotune, CUDA graph", dtype, compile={"mode": "max-autotune"}))
    if network:
        rows.append(Contender("ran_ext without kernels", dtype, ours=True, backend="reference"))
    if network and not cuda:
        rows.append(Contender("eager, converted", dtype, converted=True))
    rows.append(Contender("ran_ext", dtype, ours=True))
    if task == "inference":
        rows.append(Contender("ran_ext folded", dtype, ours=True, prepare=partial(fold_for_inference, dtype=dtype)))
    if compiled and network:
        rows.append(Contender("ran_ext, torch.compile", dtype, ours=True, compile={}))
    if cuda:
        rows.append(Contender("ran_ext, CUDA graph", dtype, ours=True, graph=True))
    return rows


def op_subject(case: Case, contender: Contender, task: str, device: torch.device) -> Subject:
    """One op, ``"forward"`` (recorded for autograd) or ``"forward + backward"``."""
    inputs = case.inputs(contender.dtype, contender.layout, device)
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    call: Callable[..., Tensor] = case.ours if contender.ours else case.plain
    if contender.compile is not None:
        call = torch.compile(call, dynamic=False, **contender.compile)
    dout = draw(case.plain(*inputs).shape, GRADIENT_SEED, contender.dtype, device, contender.layout)

    def run() -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        out = call(*inputs)
        return (out,) if task == "forward" else (out, *torch.autograd.grad(out, leaves, dout))

    chosen = _graphed(_on_backend(run, contender), contender)
    return Subject(chosen, chosen)


def op_oracle(case: Case, task: str, device: torch.device) -> tuple[Tensor, ...]:
    """The same in float64, in plain PyTorch."""
    return op_subject(case, ORACLE, task, device).check()


def model_oracle(task: str, device: torch.device, batch: int) -> tuple[Tensor, ...]:
    """Loss and gradients (``"training step"``) or logits (``"inference"``) in float64, in plain PyTorch."""
    return model_subject(ORACLE, task, device, batch).check()


def network(contender: Contender, device: torch.device, training: bool) -> nn.Module:
    """``ran_compact`` without dropout, the same weights and running statistics for all contenders."""
    model: nn.Module = models.ran_compact(dropout=0.0) if contender.ours else plain_networks.ran_compact(dropout=0.0)
    model.load_state_dict(_weights())
    own = torch.float64 if contender.dtype == torch.float64 else torch.float32  # 16 bits come by autocast
    model.to(device, own, memory_format=contender.layout).train(training)  # type: ignore[call-overload]
    model = convert(model) if contender.converted else model
    return model if training or contender.prepare is None else contender.prepare(model)


@cache
def _weights() -> dict[str, Tensor]:
    """Of ``ran_compact``; no batch normalisation is the identity, running statistics are those of some images."""
    torch.manual_seed(0)
    base = plain_networks.ran_compact(dropout=0.0)
    for module in base.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.momentum = None  # the one batch below gives the running statistics
    with torch.no_grad():
        base(_images(8))
    return base.state_dict()


def _images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def model_subject(contender: Contender, task: str, device: torch.device, batch: int) -> Subject:
    """``"training step"`` (forward, cross entropy, backward, fused Adam) or ``"inference"`` of ``ran_compact``."""
    model = network(contender, device, task == "training step")
    own = torch.float64 if contender.dtype == torch.float64 else torch.float32
    images = _images(batch).to(device, own, memory_format=contender.layout)
    labels = torch.arange(batch, device=device) % 10
    call = model if contender.compile is None else torch.compile(model, dynamic=False, **contender.compile)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    half = contender.prepare is None and contender.dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast(device.type, contender.dtype if half else None, enabled=half, cache_enabled=False)

    scale = LOSS_SCALE if contender.dtype == torch.float16 else 1.0

    def loss() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with autocast:
            return F.cross_entropy(call(images), labels) * scale

    def gradients() -> tuple[Tensor, ...]:
        value = loss()
        found = torch.autograd.grad(value, parameters)
        return value.detach() / scale, torch.cat([gradient.flatten() for gradient in found]) / scale

    def infer() -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad(), autocast:
            return (call(images),)

    if task == "inference":
        chosen = _graphed(_on_backend(infer, contender), contender)
        return Subject(chosen, chosen)
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True, capturable=contender.graph)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    check = _on_backend(gradients, contender)
    return Subject(_Once(lambda: _graphed(_on_backend(step, contender), contender)), check)


class _Once:
    """Makes the function at its first call: capturing a step trains the network, which must be checked before."""

    def __init__(self, make: Callable[[], Callable[[], object]]):
        self.make, self.made = make, None

    def __call__(self) -> object:
        if self.made is None:
            self.made = self.make()  # type: ignore[assignment]
        return self.made()  # type: ignore[misc]


def on_backend(function: Callable[[], T], backend: str) -> Callable[[], T]:
    """``function``, with the backend set for the time of a call."""

    def run() -> T:
        with set_backend(backend):
            return function()

    return run


def _on_backend(function: Callable[[], Any], contender: Contender) -> Callable[[], Any]:
    return on_backend(function, contender.backend) if contender.ours else function


def _graphed(function: Callable[[], Any], contender: Contender) -> Callable[[], Any]:
    return captured(function) if contender.graph else function


def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """Replays ``function`` as a CUDA graph, captured after three calls in which libraries choose and allocate."""
    graph = CudaGraph()
    for _ in range(3):
        graph.warm_up(function)
    return graph.capture(function)
