"""The three ways in which the kernels' blocks agree, step by step, for exploration.py.

    last_block  reduce.cuh: write a partial, fence, barrier, count, barrier, fence; the last block reads all partials
    grid        a cooperative launch of bn_relu_resident.cu: write, the grid's barrier as cooperative_groups has
                it, read
    cluster     a cluster's: publish in shared memory, barrier of the cluster, read the others', and a barrier before
                which no block may end

A step may be left out by its name, which shows that it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from .exploration import (
    Broken,
    State,
    Step,
    Thread,
    arrive,
    atomic,
    check,
    eager,
    explore,
    fence,
    read,
    read_shared,
    release,
    share,
    until,
    value,
    wait,
    write,
)

Steps = Iterable[tuple[str, Step]]
FLIP = 1 << 31


def _without(left_out: str, steps: Steps) -> list[Step]:
    return [step for name, step in steps if not left_out or name != left_out]


def _barrier(name: str) -> Steps:
    return [(name, arrive(name)), (name, wait(name))]


def _partials(blocks: int, threads: int) -> list[str]:
    return [f"partial_{block}_{t}" for block in range(blocks) for t in range(threads)]


def last_block(left_out: str = "", blocks: int = 2, threads: int = 2) -> int:
    """How many states there are.

    Raises:
        Broken: the last block misses a partial, is not the only one, or leaves a count behind.
    """

    def program(block: int, t: int) -> list[Step]:
        flag = f"flag_{block}"
        count = [("", atomic("counter", "before", lambda old: 0 if old >= blocks - 1 else old + 1))]
        publish = [("", share(flag, lambda thread: 1 + value(thread.registers, "before")))]
        steps: Steps = [
            ("", write(f"partial_{block}_{t}", 1)),
            ("fence before", fence),
            *_barrier("barrier before"),
            *([*count, *publish] if t == 0 else []),
            *_barrier("barrier after"),
            ("", read_shared(flag, "flag")),
            ("fence after", _if_last(blocks, fence)),
            ("", _if_last(blocks, read(_partials(blocks, threads), 1))),
        ]
        return _without(left_out, steps)

    def done(state: State) -> None:
        last = [thread.block for thread in state.threads if value(thread.registers, "flag") == blocks]
        if len(last) != threads or len(set(last)) != 1:
            raise Broken("one block is last, with all its threads")
        if value(state.memory, "counter"):
            raise Broken("the counter is left at zero")

    return explore(blocks, threads, program, done)


def _if_last(blocks: int, step: Step) -> Step:
    @eager
    def guarded(state: State, n: int) -> Iterator[State]:
        if value(state.threads[n].registers, "flag") == blocks:
            yield from step(state, n)
        else:
            yield state

    return guarded


def grid(left_out: str = "", blocks: int = 2, threads: int = 2, rounds: int = 1) -> int:
    """As :func:`last_block`; Broken where a block misses what another wrote before the barrier."""

    def flipped(state: State, thread: Thread) -> bool:
        return bool((value(state.memory, "barrier") ^ value(thread.registers, "before")) & FLIP)

    def program(block: int, t: int) -> list[Step]:
        steps: list[tuple[str, Step]] = []
        for number in range(1, rounds + 1):
            add = FLIP - (blocks - 1) if block == 0 else 1
            leader: Steps = [
                ("release", release),
                ("", atomic("barrier", "before", lambda old, add=add: (old + add) % (2 * FLIP))),  # type: ignore[misc]
                ("poll", until(flipped)),
            ]
            steps += [("", write(f"partial_{block}_{t}", number))]
            steps += [(name.rstrip("0123456789"), step) for name, step in _barrier(f"barrier before{number}")]
            steps += leader if t == 0 else []
            steps += [(name.rstrip("0123456789"), step) for name, step in _barrier(f"barrier after{number}")]
            steps += [("", read(_partials(blocks, threads), number))] if number == rounds else []
        return _without(left_out, steps)

    return explore(blocks, threads, program, lambda _: None)


def cluster(left_out: str = "", blocks: int = 3) -> int:
    """As :func:`last_block`; Broken where a block reads what is not published yet, or of a block that has ended."""

    def alive(name: str) -> Callable[[State, Thread], bool]:
        return lambda state, _: not value(state.memory, name)

    def program(block: int, t: int) -> list[Step]:
        steps: list[tuple[str, Step]] = [("", write(f"partial_{block}_{t}", 1)), ("release", release)]
        steps += [("barrier before", arrive("publish")), ("barrier before", wait("publish", True, acquire=True))]
        for other in range(blocks):
            steps.append(("", check(alive(f"ended_{other}"), "the other block has not ended")))
            steps.append(("", read([f"partial_{other}_0"], 1)))
        steps += [("barrier behind", arrive("end")), ("barrier behind", wait("end", True))]
        steps.append(("", share(f"ended_{block}", 1)))
        return _without(left_out, steps)

    return explore(blocks, 1, program, lambda _: None)


#: Each protocol, and the steps that it must not be without.
PROTOCOLS: dict[str, tuple[Callable[..., int], list[str]]] = {
    "last block": (last_block, ["fence before", "barrier before", "barrier after", "fence after"]),
    "grid": (grid, ["barrier before", "release", "poll", "barrier after"]),
    "cluster": (cluster, ["release", "barrier before", "barrier behind"]),
}
