"""Every order in which the steps of a few threads can happen, under rules no stronger than PTX's memory model.

A write is seen by the other threads some time after it, in any order with the thread's other writes; a fence waits for
those before it. A read gives what memory holds, or anything older that its thread has not yet been made to know: what a
fence shows it, and what others of a barrier knew when they arrived.

Steps that can only let a thread know more when they come later (all but atomics, shared memory and loops) are taken as
soon as they can be: no other order is worse for a promise, and far fewer states are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

Values = tuple[tuple[str, int], ...]  # of words by name, sorted; the others are 0


def value(values: Values, name: str) -> int:
    return dict(values).get(name, 0)


def changed(values: Values, **new: int) -> Values:
    return tuple(sorted({**dict(values), **new}.items()))


def merged(*all_values: Values) -> Values:
    """The newest of each word; values only grow."""
    found: dict[str, int] = {}
    for values in all_values:
        found.update({name: max(number, found.get(name, 0)) for name, number in values})
    return tuple(sorted(found.items()))


@dataclass(frozen=True)
class Thread:
    block: int
    number: int  # in the block
    step: int = 0
    pending: tuple[tuple[str, int], ...] = ()  # writes that others do not see yet
    known: Values = ()
    registers: Values = ()
    arrived: tuple[tuple[str, Values], ...] = ()  # at which barriers, and what it knew then


@dataclass(frozen=True)
class State:
    memory: Values
    threads: tuple[Thread, ...]

    def having(self, n: int, **changes: object) -> State:
        """With other fields in thread ``n``."""
        new = replace(self.threads[n], **changes)  # type: ignore[arg-type]
        return replace(self, threads=(*self.threads[:n], new, *self.threads[n + 1 :]))


class Broken(Exception):
    """A state in which a protocol does not keep its promise."""


#: The states that a thread's step may lead to: none where it must wait. The exploration moves the thread on.
Step = Callable[[State, int], Iterator[State]]
#: The steps of a block's thread.
Program = Callable[[int, int], Sequence[Step]]


def eager(step: Step) -> Step:
    step.eager = True  # type: ignore[attr-defined]
    return step


def write(name: str, number: int) -> Step:
    @eager
    def step(state: State, n: int) -> Iterator[State]:
        yield state.having(n, pending=(*state.threads[n].pending, (name, number)))

    return step


def share(name: str, number: int | Callable[[Thread], int]) -> Step:
    """A write to the block's own shared memory, which its barriers order."""

    def step(state: State, n: int) -> Iterator[State]:
        to = number if isinstance(number, int) else number(state.threads[n])
        yield replace(state, memory=changed(state.memory, **{name: to}))

    return step


@eager
def fence(state: State, n: int) -> Iterator[State]:
    if not state.threads[n].pending:
        yield state.having(n, known=merged(state.threads[n].known, state.memory))


@eager
def release(state: State, n: int) -> Iterator[State]:
    """All see what the thread wrote, and what those of its block had whom it met at a barrier, before it goes on."""
    thread = state.threads[n]
    met = {name for name, _ in thread.arrived}
    others = (t for t in state.threads if t.block == thread.block and met & {name for name, _ in t.arrived})
    if not thread.pending and not any(other.pending for other in others):
        yield state


def arrive(name: str) -> Step:
    @eager
    def step(state: State, n: int) -> Iterator[State]:
        thread = state.threads[n]
        yield state.having(n, arrived=(*thread.arrived, (name, thread.known)))

    return step


def wait(name: str, everyone: bool = False, acquire: bool = False) -> Step:
    """For the threads of the block, or all; ``acquire``: and sees all that is seen now."""

    @eager
    def step(state: State, n: int) -> Iterator[State]:
        members = [t for t in state.threads if everyone or t.block == state.threads[n].block]
        if all(name in dict(t.arrived) for t in members):
            known = merged(*(dict(t.arrived)[name] for t in members), state.memory if acquire else ())
            yield state.having(n, known=merged(state.threads[n].known, known))

    return step


def read(names: Sequence[str], number: int) -> Step:
    """Reads words that must all hold ``number``."""

    @eager
    def step(state: State, n: int) -> Iterator[State]:
        for name in names:
            if not value(state.memory, name) == value(state.threads[n].known, name) == number:
                raise Broken(f"{name} is read as it was written")
        yield state

    return step


def read_shared(name: str, register: str) -> Step:
    def step(state: State, n: int) -> Iterator[State]:
        registers = changed(state.threads[n].registers, **{register: value(state.memory, name)})
        yield state.having(n, registers=registers)

    return step


def atomic(name: str, register: str, new: Callable[[int], int]) -> Step:
    """Reads the word into ``register`` and writes ``new`` of it, in one step that all see."""

    def step(state: State, n: int) -> Iterator[State]:
        old = value(state.memory, name)
        registers = changed(state.threads[n].registers, **{register: old})
        yield replace(state.having(n, registers=registers), memory=changed(state.memory, **{name: new(old)}))

    return step


def until(holds: Callable[[State, Thread], bool]) -> Step:
    """An acquiring load in a loop."""

    def step(state: State, n: int) -> Iterator[State]:
        if holds(state, state.threads[n]):
            yield state.having(n, known=merged(state.threads[n].known, state.memory))

    return step


def check(holds: Callable[[State, Thread], bool], promise: str) -> Step:
    def step(state: State, n: int) -> Iterator[State]:
        if not holds(state, state.threads[n]):
            raise Broken(promise)
        yield state

    return step


def explore(blocks: int, threads: int, program: Program, done: Callable[[State], None]) -> int:
    """Goes through every state that can be reached; how many there are.

    Raises:
        Broken: by a step, by ``done`` of a final state, or where no thread can go on.
    """
    start = State((), tuple(Thread(block, t) for block in range(blocks) for t in range(threads)))
    steps = [program(thread.block, thread.number) for thread in start.threads]
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        if all(len(steps[n]) == thread.step and not thread.pending for n, thread in enumerate(state.threads)):
            done(state)
            continue
        nexts = _eager_step(state, steps) or [*_seen_by_all(state), *_steps(state, steps)]
        if not nexts:
            raise Broken("no thread can go on")
        new = set(nexts) - seen
        seen |= new
        todo += new
    return len(seen)


def _eager_step(state: State, steps: Sequence[Sequence[Step]]) -> list[State]:
    for n, thread in enumerate(state.threads):
        if thread.step < len(steps[n]) and getattr(steps[n][thread.step], "eager", False):
            for after in steps[n][thread.step](state, n):
                return [after.having(n, step=thread.step + 1)]
    return []


def _seen_by_all(state: State) -> Iterator[State]:
    """One more pending write reaches memory; those of one word in their order."""
    for n, thread in enumerate(state.threads):
        for i, (name, number) in enumerate(thread.pending):
            if name not in dict(thread.pending[:i]):
                rest = thread.pending[:i] + thread.pending[i + 1 :]
                yield replace(state.having(n, pending=rest), memory=changed(state.memory, **{name: number}))


def _steps(state: State, steps: Sequence[Sequence[Step]]) -> Iterator[State]:
    for n, thread in enumerate(state.threads):
        if thread.step < len(steps[n]):
            for after in steps[n][thread.step](state, n):
                yield after.having(n, step=thread.step + 1)
