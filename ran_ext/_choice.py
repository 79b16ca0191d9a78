"""What the user has chosen for a setting: one value for the process, and another inside each ``with`` block.

A block holds in its own context (thread or asyncio task) alone; what a block starts elsewhere sees the process's
choice. Autograd's device threads are the exception: they see the choice of the thread that called backward, so that a
checkpoint computes again what it computed before. That is so with torch 2.13; torch 2.11 takes nothing along to them,
and there a checkpoint on a GPU computes again as the process chose.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from types import TracebackType
from typing import Any, ClassVar

from torch._C import _get_obj_in_tls, _is_key_in_tls
from torch.compiler import is_compiling


class _Choice:
    """A chosen name; ``outer`` is the choice that holds again when this one's block ends."""

    here: Any  # by setting: see Setting

    def __init__(self, name: str, outer: _Choice | None = None, before: _Choice | None = None):
        self.name, self.outer, self.before = name, outer, before


class Setting:
    """A setting of the package, its first value ``initial``."""

    def __init__(self, name: str, initial: str):
        self.entered: ContextVar[Any] = ContextVar(f"ran_ext_{name}")
        #: ``here``: the choice of the innermost block of this context; outside of blocks, the object that is asked.
        #: torch.compile cannot trace ``ContextVar.get``, but a property in C it evaluates, and compiles again when that
        #: changes.
        self.kind = type("_Choice", (_Choice,), {"here": property(self.entered.get)})
        self.process = self.kind(initial)
        #: The block that torch.compile is tracing: its choice is a constant of the graph. Of no name but in a trace.
        self.traced = self.kind("")
        #: Calls that set the process's choice, the last one holds. A call that turns out to open a block is taken out
        #: again.
        self.calls: list[Any] = [self.kind(initial)]
        self.lock = threading.Lock()

    def chosen(self) -> str:
        """The name chosen here."""
        here = self.process.here
        if here is self.process and not is_compiling() and _is_key_in_tls("context"):
            here = _get_obj_in_tls("context").get(self.entered, here)  # where torch leaves the calling thread's
        return self.traced.name or here.name  # type: ignore[no-any-return]


class Choose:
    """Chooses ``name`` for every following call or, as a context manager, for the calls inside it."""

    setting: ClassVar[Setting]

    def __init__(self, name: str):
        self.name, self.mine, self.before = name, None, ""
        setting = self.setting
        here = setting.process.here
        if is_compiling():
            self.before, setting.process.name = setting.process.name, name
        elif here is not setting.process:  # inside a block, until it ends
            self.mine = setting.kind(name, here.outer, before=here)
            setting.entered.set(self.mine)
        else:
            with setting.lock:
                setting.calls.append(self)
                del setting.calls[:-64]  # older ones open no block any more
                setting.process.name = name

    def __enter__(self) -> None:
        setting = self.setting
        if is_compiling():
            setting.process.name = self.before
            self.before, setting.traced.name = setting.traced.name, self.name
            return
        here = setting.process.here
        if self.mine is not None and here is self.mine:
            setting.entered.set(self.mine.before)
        with setting.lock:
            if self in setting.calls[1:]:
                setting.calls.remove(self)
                setting.process.name = setting.calls[-1].name
        setting.entered.set(setting.kind(self.name, outer=setting.process.here))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        setting = self.setting
        if is_compiling():
            setting.traced.name = self.before
        else:
            setting.entered.set(setting.process.here.outer or setting.process)
