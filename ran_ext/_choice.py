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

from torch._C import _get_obj_in_tls, _is_key_in_tls
from torch.compiler import is_compiling

_entered: ContextVar[Any] = ContextVar("ran_ext_backend")


class _Choice:
    """The name of a backend; ``outer`` is the choice that holds again when this one's block ends."""

    #: The choice of the innermost block of this context; outside of blocks, the object that is asked. torch.compile
    #: cannot trace ``ContextVar.get``, but a property in C it evaluates, and compiles again when that changes.
    here = property(_entered.get)

    def __init__(self, name: str, outer: _Choice | None = None, before: _Choice | None = None):
        self.name, self.outer, self.before = name, outer, before


_process = _Choice("auto")
#: The block that torch.compile is tracing: its choice is a constant of the graph. Of no name but in a trace.
_traced = _Choice("")
#: Calls that set the process's choice, the last one holds. A call that turns out to open a block is taken out again.
_calls: list[Choose] = []
_lock = threading.Lock()


def chosen() -> str:
    """The name of the backend chosen here."""
    here = _process.here
    if here is _process and not is_compiling() and _is_key_in_tls("context"):
        here = _get_obj_in_tls("context").get(_entered, here)  # where torch leaves the calling thread's
    return _traced.name or here.name


class Choose:
    """Chooses ``name`` for every following call or, as a context manager, for the calls inside it."""

    def __init__(self, name: str):
        self.name, self.mine, self.before = name, None, ""
        here = _process.here
        if is_compiling():
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
        if is_compiling():
            _process.name = self.before
            self.before, _traced.name = _traced.name, self.name
            return
        here = _process.here
        if self.mine is not None and here is self.mine:
            _entered.set(self.mine.before)
        with _lock:
            if self in _calls[1:]:
                _calls.remove(self)
                _process.name = _calls[-1].name
        _entered.set(_Choice(self.name, outer=_process.here))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_compiling():
            _traced.name = self.before
        else:
            _entered.set(_process.here.outer or _process)
