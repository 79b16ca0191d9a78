"""Several processes and several threads."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ecosystem.harness import Case, copied, evaluated, group, loss_of, parametrised, step, train, trained
from torch import Tensor, nn

tool = group("Processes and threads")


def in_processes(work: Callable[[int], Any], count: int = 2, backend: str | None = "gloo") -> list[Any]:
    """What ``work(rank)`` returns in each of ``count`` processes forked from this one, which has used the model."""
    context = multiprocessing.get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(count)]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if backend else None

    def body(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            if store is not None:
                there = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
                dist.init_process_group(backend, store=there, rank=rank, world_size=count)
            found: Any = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().numpy().copy(), work(rank))
            if store is not None:
                dist.destroy_process_group()
        except BaseException as error:
            found = error if isinstance(error, (ValueError, TypeError, RuntimeError)) else RuntimeError(repr(error))
        ends[rank][1].send(found)

    processes = [context.Process(target=body, args=(rank,), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    results = []
    for rank, process in enumerate(processes):
        assert ends[rank][0].poll(60), f"process {rank} hangs"
        results.append(ends[rank][0].recv())
        process.join(10)
        assert process.exitcode == 0
    for result in results:
        if isinstance(result, Exception):
            raise result
    import numpy

    return [torch.utils._pytree.tree_map_only(numpy.ndarray, torch.from_numpy, found) for found in results]


@tool("used, then used again in a forked process (a `DataLoader`'s worker)")
def forked(case: Case) -> Any:
    step(case)
    return in_processes(lambda rank: evaluated(case), count=1, backend=None)


@tool("two threads at once")
def threads(case: Case) -> Any:
    case.model.eval()
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def work(number: int) -> None:
        inputs = [x.requires_grad_() for x in case.batch(number)]
        for _ in range(4):
            out = case.model(*inputs)
            found[number] = [out.detach(), *torch.autograd.grad(loss_of(out), inputs)]

    running = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return found


@tool("`nn.DataParallel` (on CPUs: one)")
def data_parallel(case: Case) -> Any:
    return train(case, nn.DataParallel(case.model))


def halves(case: Case, rank: int, model: Callable[..., Tensor], steps: int = 2) -> Any:
    """Each process's half of the batch, the mean of gradients over both."""
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.01)
    case.model.train()
    for number in range(steps):
        torch.manual_seed(number)
        optimizer.zero_grad()
        model(*(x[2 * rank : 2 * rank + 2] for x in case.batch(number))).square().mean().backward()
        optimizer.step()


@tool("`DistributedDataParallel`, two processes, `static_graph=True`", on=parametrised)
def ddp(case: Case) -> Any:
    def work(rank: int) -> Any:
        parallel = nn.parallel.DistributedDataParallel(case.model, static_graph=True)
        halves(case, rank, parallel)
        return evaluated(case)

    return in_processes(work)


def joint(case: Case) -> Any:
    """One process that takes the whole batch: what synchronised statistics amount to."""
    case.model.train()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.01)
    for number in range(2):
        torch.manual_seed(number)
        optimizer.zero_grad()
        case.model(*case.batch(number)).square().mean().backward()
        optimizer.step()
    return [evaluated(case)] * 2


def without_dropout(case: Case) -> None:
    """Two processes cannot draw what one would."""
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def joint_without_dropout(case: Case) -> Any:
    without_dropout(case)
    return joint(case)


@tool(
    "`DistributedDataParallel` with `nn.SyncBatchNorm.convert_sync_batchnorm`: one process with the joint batch",
    needs=nn.BatchNorm2d,
    on=trained,
    plain=joint_without_dropout,
)
def synchronised(case: Case) -> Any:
    without_dropout(case)

    def work(rank: int) -> Any:
        case.model = nn.SyncBatchNorm.convert_sync_batchnorm(case.model)
        halves(case, rank, nn.parallel.DistributedDataParallel(case.model))
        return evaluated(case)

    return in_processes(work)


@tool(
    "the same with `ran_ext.nn.convert_sync_batchnorm`",
    needs=nn.BatchNorm2d,
    on=trained,
    plain=joint_without_dropout,
)
def synchronised_by_ours(case: Case) -> Any:
    from ran_ext.nn import convert_sync_batchnorm

    without_dropout(case)

    def work(rank: int) -> Any:
        case.model = convert_sync_batchnorm(case.model)
        halves(case, rank, nn.parallel.DistributedDataParallel(case.model))
        return evaluated(case)

    return in_processes(work)


def whole(model: nn.Module) -> list[Tensor]:
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (*model.parameters(), *model.buffers())]


@tool("FSDP2 (`fully_shard`) of each convolution, of each batch normalisation, and of the whole", needs=nn.Conv2d, on=trained)
def fsdp2(case: Case) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def work(rank: int) -> Any:
        mesh = init_device_mesh("cpu", (2,))
        for module in case.model.modules():
            if type(module) in (nn.Conv2d, nn.BatchNorm2d):
                fully_shard(module, mesh=mesh)
        fully_shard(case.model, mesh=mesh)
        halves(case, rank, case.model)
        case.model.eval()
        with torch.no_grad():
            return [case.model(*case.batch(7)), whole(case.model)]

    return in_processes(work)


@tool("FSDP2 of the whole alone", on=parametrised)
def fsdp2_whole(case: Case) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def work(rank: int) -> Any:
        fully_shard(case.model, mesh=init_device_mesh("cpu", (2,)))
        halves(case, rank, case.model)
        return [copied(whole(case.model))]

    return in_processes(work)
