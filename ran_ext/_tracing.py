"""Who looks into a call: tracers, exporters, function transforms and tensor subclasses, all of which need plain ops.

The compiled ops are opaque to them. ``torch.compile`` is none of them: it keeps the fused ops, for their speed.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_CInterpreter = torch._C._functorch.CInterpreter


def is_symbolic(x: Any) -> bool:
    """Whether ``x`` stands for inputs to come: sizes may not be asked for, or the answer would become part of a graph.

    So it is under ``torch.fx.symbolic_trace``, ``torch.jit.trace``, ``torch.export`` and the ONNX exporters.
    """
    if not isinstance(x, Tensor):
        return isinstance(x, Proxy)
    return torch._C._get_tracing_state() is not None or torch.compiler.is_exporting()


def needs_plain_ops(*tensors: Tensor | None) -> bool:
    """Whether what is computed with these tensors must be ops of PyTorch's own.

    Besides what :func:`is_symbolic` names: ``make_fx``, function transforms (``torch.func``), forward-mode
    differentiation, and subclasses of Tensor (DTensor, FakeTensor, a user's own).
    """
    for t in tensors:
        if t is not None and type(t) is not Tensor and type(t) is not nn.Parameter:
            return True
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting() or forward_ad._current_level >= 0:
        return True
    if isinstance(torch._C._functorch.peek_interpreter_stack(), _CInterpreter):  # `is not None` compiles to True
        return True
    return not torch.compiler.is_compiling() and get_proxy_mode() is not None


def no_script(module: nn.Module) -> NoReturn:
    """What ``torch.jit.script`` asks of a module that is to be scripted, as ``__prepare_scriptable__``.

    Raises:
        TypeError: always; the text says what to use.
    """
    raise TypeError(
        f"torch.jit.script does not take {type(module).__module__}.{type(module).__name__}: use "
        "torch.jit.trace(model.eval(), images) or torch.export.export(model.eval(), (images,)) instead"
    )
