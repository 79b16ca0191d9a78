"""Whose calls ``set_backend`` is for: a process, a block, a thread, a task, a backward pass."""

import asyncio
import os
import sys
import threading

import pytest
import torch

import ran_ext
from ran_ext import _backend

OUTSIDE = os.environ.get("RAN_EXT_BACKEND") or "auto"
native = pytest.mark.skipif(_backend._C is None, reason=f"no compiled module: {_backend.why_missing}")


def test_set_backend_is_a_context_manager_and_a_call():
    before = ran_ext.get_backend()
    with ran_ext.set_backend("reference"):
        assert ran_ext.get_backend() == "reference"
        assert not _backend.use_native(torch.zeros(1))
        with ran_ext.set_backend("auto"):
            assert ran_ext.get_backend() == "auto"
        assert ran_ext.get_backend() == "reference"
    assert ran_ext.get_backend() == before


def test_set_backend_refuses_other_names():
    with pytest.raises(ValueError, match="set_backend: name must be one of auto, native, reference, got 'fast'"):
        ran_ext.set_backend("fast")


def in_a_thread(function):
    """What ``function`` returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_a_call_is_for_the_process_and_a_block_for_its_thread():
    with ran_ext.set_backend("auto"):
        assert in_a_thread(ran_ext.get_backend) == OUTSIDE
    try:
        ran_ext.set_backend("reference")
        assert (ran_ext.get_backend(), in_a_thread(ran_ext.get_backend)) == ("reference", "reference")
        with ran_ext.set_backend("auto"):
            assert (ran_ext.get_backend(), in_a_thread(ran_ext.get_backend)) == ("auto", "reference")
    finally:
        ran_ext.set_backend(OUTSIDE)
    assert ran_ext.get_backend() == OUTSIDE


def test_a_call_inside_a_block_holds_until_it_ends():
    before = ran_ext.get_backend()
    with ran_ext.set_backend("auto"):
        ran_ext.set_backend("reference")
        with ran_ext.set_backend("auto"):
            assert ran_ext.get_backend() == "auto"
        assert ran_ext.get_backend() == "reference"
    assert ran_ext.get_backend() == before == in_a_thread(ran_ext.get_backend)


def test_blocks_of_two_threads_may_overlap():
    before, entered, left, seen = ran_ext.get_backend(), threading.Event(), threading.Event(), []

    def other():
        with ran_ext.set_backend("reference"):
            entered.set()
            left.wait()
            seen.append(ran_ext.get_backend())
        seen.append(ran_ext.get_backend())

    thread = threading.Thread(target=other)
    with ran_ext.set_backend("auto"):
        thread.start()
        entered.wait()
        assert ran_ext.get_backend() == "auto"
    left.set()
    thread.join()
    assert seen == ["reference", before]
    assert ran_ext.get_backend() == before


def test_many_blocks_in_many_threads_leave_nothing_behind():
    before, wrong = ran_ext.get_backend(), []

    def enter_often(name):
        for _ in range(2000):
            with ran_ext.set_backend(name):
                if ran_ext.get_backend() != name:
                    wrong.append(ran_ext.get_backend())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=enter_often, args=(name,)) for name in ("auto", "reference") * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert ran_ext.get_backend() == before


def test_blocks_of_two_tasks_may_overlap():
    async def task(name):
        with ran_ext.set_backend(name):
            await asyncio.sleep(0.01)
            return ran_ext.get_backend()

    async def both():
        return await asyncio.gather(task("reference"), task("auto"))

    before = ran_ext.get_backend()
    assert asyncio.run(both()) == ["reference", "auto"]
    assert ran_ext.get_backend() == before


def test_a_block_can_be_entered_again_and_left_by_an_error():
    block = ran_ext.set_backend("reference")
    assert in_a_thread(ran_ext.get_backend) == "reference"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), block, block:
            raise ZeroDivisionError
    assert ran_ext.get_backend() == in_a_thread(ran_ext.get_backend) == OUTSIDE


class Nested(torch.autograd.Function):
    """Its backward runs another backward pass; the last of 60 that autograd runs in another thread."""

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append((threading.get_ident(), ran_ext.get_backend()))
        if ctx.depth:
            with torch.enable_grad():
                Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.seen).sum().backward()
        return grad, None, None


def test_the_threads_of_a_backward_pass_see_the_choice_of_its_caller():
    seen = []
    with ran_ext.set_backend("reference"):
        Nested.apply(torch.ones(1, requires_grad=True), 61, seen).sum().backward()
    assert len({thread for thread, _ in seen}) == 2
    assert {name for _, name in seen} == {"reference"}


@native
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_computes_again_with_the_same_backend(reentrant, monkeypatch):
    asked, unit, x = [], ran_ext.nn.BNReLUConv2d(4, 4, 1), torch.randn(2, 4, 5, 5, requires_grad=True)
    use_native = _backend.use_native
    monkeypatch.setattr(_backend, "use_native", lambda *args: asked.append(use_native(*args)) or asked[-1])
    with ran_ext.set_backend("reference"):
        torch.utils.checkpoint.checkpoint(unit, x, use_reentrant=reentrant).sum().backward()
    assert asked == [False, False]


def test_torch_compile_follows_the_choice_without_a_graph_break():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def call(x):
        return x + 1 if ran_ext.get_backend() == "reference" else x - 1

    def blocks(x):
        with ran_ext.set_backend("reference"):
            x = call(x) * 10
            with ran_ext.set_backend("auto"):
                x = call(x)
            return call(x)

    with ran_ext.set_backend("auto"):
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        for _ in range(2):
            assert compiled(torch.zeros(1)).item() == -1
            with ran_ext.set_backend("reference"):
                assert compiled(torch.zeros(1)).item() == 1
                assert in_a_thread(lambda: compiled(torch.zeros(1)).item()) == call(torch.zeros(1)).item() * -1
        assert len(graphs) == 2
        assert torch.compile(blocks, fullgraph=True, backend=backend)(torch.zeros(1)).item() == 10
        assert ran_ext.get_backend() == "auto"
    assert in_a_thread(ran_ext.get_backend) == OUTSIDE
