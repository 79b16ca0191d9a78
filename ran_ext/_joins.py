"""A converted network's forward pass: concatenations keep their pieces, and the outputs are written out."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from . import _tracing
from ._deferred import Deferred, is_checkpointed, join

_CAT = (torch.cat, torch.concat, torch.concatenate)


class _Joins(TorchFunctionMode):
    """Inside a network's forward pass, ``torch.cat`` along the channels keeps its pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    def _take(self) -> None:
        self.taken += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CAT and not torch.compiler.is_compiling() and torch.is_grad_enabled() and not is_checkpointed():
            found = join(self._take, *args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


_tracing.PASSIVE.add(_Joins)
#: By thread: the networks whose forward pass runs, and the mode of each, if any.
_RUNNING = threading.local()


def enter(module: nn.Module, args: Any) -> None:
    """Before the forward pass of a converted network."""
    if torch.compiler.is_compiling():
        return
    running = _RUNNING.__dict__.setdefault("networks", [])
    while any(module is one for one, _ in running):  # a pass that was interrupted from the keyboard
        _pop(running)
    mode = None
    # A network in whose first step no join was taken is not looked through again: a mode costs time at every function.
    if torch.is_grad_enabled() and module.__dict__.get("_joins", True) and not _watched(args):
        mode = _Joins()
        mode.__enter__()
    running.append((module, mode))


def _pop(running: list[tuple[nn.Module, _Joins | None]]) -> _Joins | None:
    mode = running.pop()[1]
    if mode is not None:
        mode.__exit__(None, None, None)
    return mode


def _watched(args: tuple[Any, ...]) -> bool:
    return bool(_tracing.why_watched(*(x for x in args if isinstance(x, Tensor))))


def leave(module: nn.Module, args: Any, out: Any) -> Any:
    """After the forward pass: write out the network's outputs."""
    if torch.compiler.is_compiling():
        return None
    mode = _pop(_RUNNING.networks)
    if mode is not None:
        module.__dict__["_joins"] = mode.taken > 0
    return tree_map(lambda value: value.materialise() if isinstance(value, Deferred) else value, out)
