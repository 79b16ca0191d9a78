"""Several processes and several threads."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ecosystem.harness import Case, evaluated, group, loss_of, parametrised, step, train, trained
from ecosystem.in_processes import COUNT, in_processes
from torch import Tensor, nn

tool = group("Processes and threads")


@tool("used, then used again in a forked process (a `DataLoader`'s worker)")
def forked(case: Case) -> Any:
    step(case)
    here, there = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(1)
        there.send(evaluated(case)["evaluation"].numpy())

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    assert here.poll(60), "the forked process hangs"
    return torch.from_numpy(here.recv())


@tool("two threads at once, forward and backward")
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


@tool("`nn.DataParallel` (on a machine without a GPU)")
def data_parallel(case: Case) -> Any:
    return train(case, nn.DataParallel(case.model))


def halves(case: Case, rank: int, model: Callable[..., Tensor], average: bool = False) -> None:
    """Two steps on this process's half of the batch; ``average`` gradients by hand where no wrapper does."""
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.01)
    case.model.train()
    for number in range(2):
        torch.manual_seed(number)
        optimizer.zero_grad()
        model(*(x[2 * rank : 2 * rank + 2] for x in case.batch(number))).square().mean().backward()
        for p in case.model.parameters() if average else ():
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= COUNT
        optimizer.step()


def ddp_half(case: Case, rank: int) -> Any:
    halves(case, rank, nn.parallel.DistributedDataParallel(case.model, static_graph=True))
    return evaluated(case)


@tool("`DistributedDataParallel(static_graph=True)`, two processes", on=parametrised)
def ddp(case: Case) -> Any:
    return in_processes(ddp_half, case)


def jointly(case: Case) -> Any:
    """One process that takes the whole batch: what synchronised statistics amount to."""
    without_dropout(case)
    case.model.train()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.01)
    for number in range(2):
        optimizer.zero_grad()
        case.model(*case.batch(number)).square().mean().backward()
        optimizer.step()
    return [evaluated(case)] * COUNT


def without_dropout(case: Case) -> None:
    """Two processes cannot draw what one would."""
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def synchronised_half(case: Case, rank: int) -> Any:
    without_dropout(case)
    case.model = nn.SyncBatchNorm.convert_sync_batchnorm(case.model)
    halves(case, rank, case.model, average=True)
    return evaluated(case)


@tool(
    "`nn.SyncBatchNorm.convert_sync_batchnorm`, two processes: as one with the joint batch",
    needs=nn.BatchNorm2d,
    on=trained,
    plain=jointly,
)
def synchronised(case: Case) -> Any:
    return in_processes(synchronised_half, case)


def lightning_half(case: Case, rank: int) -> Any:
    from lightning.pytorch.plugins import TorchSyncBatchNorm

    without_dropout(case)
    case.model = TorchSyncBatchNorm().apply(case.model)
    halves(case, rank, case.model, average=True)
    return evaluated(case)


@tool(
    "Lightning's `sync_batchnorm=True` (its `TorchSyncBatchNorm`), two processes: the same",
    needs=nn.BatchNorm2d,
    on=trained,
    plain=jointly,
)
def synchronised_by_lightning(case: Case) -> Any:
    return in_processes(lightning_half, case)


def ours_half(case: Case, rank: int) -> Any:
    from ran_ext.nn import convert_sync_batchnorm

    without_dropout(case)
    case.model = convert_sync_batchnorm(case.model)
    halves(case, rank, case.model, average=True)
    return evaluated(case)


@tool("`ran_ext.nn.convert_sync_batchnorm`, two processes: the same", needs=nn.BatchNorm2d, on=trained, plain=jointly)
def synchronised_by_ours(case: Case) -> Any:
    return in_processes(ours_half, case)


def shard(case: Case, rank: int, kinds: tuple[type[nn.Module], ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    case.model.to(memory_format=torch.contiguous_format)  # it refuses channels_last weights
    mesh = init_device_mesh("cpu", (COUNT,))
    for module in case.model.modules():
        if type(module) in kinds:
            fully_shard(module, mesh=mesh)
    fully_shard(case.model, mesh=mesh)
    halves(case, rank, case.model)
    case.model.eval()
    with torch.no_grad():
        out = case.model(*case.batch(7))
    state = [*case.model.parameters(), *case.model.buffers()]
    return [out, [t.full_tensor() if hasattr(t, "full_tensor") else t for t in state]]


def sharded_half(case: Case, rank: int) -> Any:
    return shard(case, rank, ())


def sharded_layers_half(case: Case, rank: int) -> Any:
    return shard(case, rank, (nn.Conv2d, nn.BatchNorm2d))


@tool("FSDP2 (`fully_shard`) of the whole, two processes", on=parametrised)
def sharded(case: Case) -> Any:
    return in_processes(sharded_half, case)


@tool("FSDP2 of each convolution and batch normalisation, and of the whole", needs=nn.Conv2d, on=trained)
def sharded_layers(case: Case) -> Any:
    return in_processes(sharded_layers_half, case)
