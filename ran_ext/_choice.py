"""The backend that the user has chosen: one for the process, and another inside each ``with`` block.

A block holds in its own context (thread or asyncio task) alone; what a block starts elsewhere sees the process's
choice. Autograd's device threads are the exception: they see the choice of the thread that called backward, so that a
checkpoint computes again what it computed before.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch

_entered: ContextVar[Any] = ContextVar("ran_ext_backend")


class _Choice:
    """The name of a backend; ``outer`` is the choice that holds again when this one's block ends."""

    #: The choice of the innermost block of this context; outside of blocks, the object that is asked. ``ContextVar.get``
    #: by itself is what torch.compile cannot trace; a property in C it evaluates, and compiles again when it changes.
    here = property(_entered.get)

    def __init__(self, name: str, outer: _Choice | None = None, before: _Choice | None = None):
        self.name, self.outer, self.before = name, outer, before


_process = _Choice("auto")
#: The block that torch.compile is tracing: its choice is a constant of the graph.
_traced = _Choice("")
#: Calls that set the process's choice, the last one holds. A call that turns out to open a block is taken out again.
_calls: list[Choose] = []
_lock = threading.Lock()


def chosen() -> str:
    """The name of the backend chosen here."""
    if torch.compiler.is_compiling():
        return _traced.name or _process.here.name
    here = _process.here
    if here is _process and torch._C._is_key_in_tls("context"):  # torch leaves the calling thread's context there
        here = torch._C._get_obj_in_tls("context").get(_entered, here)
    return here.name  # type: ignore[no-any-return]


class Choose:
    """Chooses ``name`` for every following call or, as a context manager, for the calls inside it."""

    def __init__(self, name: str):
        self.name, self.mine, self.before = name, None, ""
        here = _process.here
        if torch.compiler.is_compiling():
            self.before, _process.name = _process.name, name
        elif here is not _process:  # inside a block, until it ends
            self.mine = _Choice(name, here.outer, before=here)
            _entered.set(self.mine)
        else:
            with _lock:
                _calls.append(self)
                del _calls[:-64]  # older ones open no block any more
                _process.name = name

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            _process.name = self.before
            self.before, _traced.name = _traced.name, self.name
            return
        here = _process.here
        if here is self.mine:
            _entered.set(here.before)
        with _lock:
            if self in _calls[1:]:
                _calls.remove(self)
                _process.name = _calls[-1].name
        _entered.set(_Choice(self.name, outer=_process.here))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.compiler.is_compiling():
            _traced.name = self.before
        else:
            _entered.set(_process.here.outer)
