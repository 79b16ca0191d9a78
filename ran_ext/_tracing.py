"""Detects tracers, exporters, transforms, modes and subclasses: compiled ops are opaque to all of them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import CInterpreter, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting
from torch.fx import Proxy
from torch.utils._device import DeviceContext

_PLAIN = (nn.Parameter, Tensor, type(None))
#: TorchFunctionModes that leave the ops as they are: those of ``torch.set_default_device`` and
#: ``with torch.device(...)``, and this package's own.
PASSIVE: set[type] = {DeviceContext}


def is_symbolic(x: Any) -> bool:
    """Whether ``x`` stands for inputs to come: sizes may not be asked for, or the answer would become part of a graph.

    True under ``torch.fx.symbolic_trace``, ``torch.jit.trace``, ``torch.export`` and the ONNX exporters.
    """
    if not isinstance(x, Tensor):
        return isinstance(x, Proxy)
    return _get_tracing_state() is not None or is_exporting()


def plus(out: Tensor, residual: Any) -> Tensor:
    """``out + residual``; an input of a graph of ``torch.fx`` may turn out to be None, and a graph has no branch."""
    if isinstance(residual, Proxy) and residual.node.op == "placeholder":
        return residual.tracer.create_proxy("call_function", plus_unless_none, (out, residual), {})  # type: ignore[return-value]
    return out + residual  # type: ignore[no-any-return]


def plus_unless_none(out: Tensor, residual: Tensor | None) -> Tensor:
    """What :func:`plus` puts into a graph."""
    return out if residual is None else out + residual


def why_watched(*tensors: Any) -> str:
    """What looks into the ops on these tensors, so that they must be PyTorch's own; "" where nothing does.

    ``torch.compile`` is not named: it keeps the compiled ops, for their speed.
    """
    for t in tensors:
        if type(t) not in _PLAIN:
            return f"one of the tensors is a {type(t).__name__}"
    if peek_interpreter_stack() is not None and _transforms():
        return "a function transform (torch.func) is on"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    if is_compiling():
        return "torch.export traces" if is_exporting() else ""
    if _get_tracing_state() is not None:
        return "torch.jit traces"
    if _len_torch_dispatch_stack():  # make_fx, counters of operations, recorders, fake tensors
        return "a TorchDispatchMode is on"
    if _len_torch_function_stack() and not _are_passive():
        return "a TorchFunctionMode is on"
    return ""


def _are_passive() -> bool:
    return all(type(mode) in PASSIVE for mode in torch.overrides._get_current_function_mode_stack())


def _transforms() -> bool:
    """What torch.compile can answer: to it the top of an empty stack is not None either."""
    return isinstance(peek_interpreter_stack(), CInterpreter)


def no_script(module: nn.Module) -> NoReturn:
    """What ``torch.jit.script`` asks of a module that is to be scripted, as ``__prepare_scriptable__``.

    Raises:
        TypeError: always; the text says what to use.
    """
    raise TypeError(
        f"torch.jit.script does not take {type(module).__module__}.{type(module).__name__}: use "
        "torch.jit.trace(model.eval(), images) or torch.export.export(model.eval(), (images,)) instead"
    )
