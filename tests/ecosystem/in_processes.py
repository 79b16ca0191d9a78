"""Work done by two processes at once, forked from a server that has imported all and used nothing.

A process that has trained cannot simply be forked: autograd's threads do not come along.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from ecosystem.harness import Case
from ecosystem.subjects import SUBJECTS
from torch import Tensor
from torch.utils._pytree import tree_map_only

COUNT, SECONDS = 2, 120
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ecosystem.tools", "torch._dynamo", "torch.distributed.fsdp", "lightning.pytorch"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])


def in_processes(work: Callable[[Case, int], Any], case: Case) -> list[Any]:
    """What ``work(case, rank)`` returns in each process; its first error, if there is one."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ours = case.build is case.subject.build
    ends = [CONTEXT.Pipe(duplex=False) for _ in range(COUNT)]
    processes = [
        CONTEXT.Process(
            target=body, args=(work, case.subject.name, ours, case.folder, rank, store.port, end), daemon=True
        )
        for rank, (_, end) in enumerate(ends)
    ]
    for process in processes:
        process.start()
    try:
        results = []
        for rank, (end, _) in enumerate(ends):
            assert end.poll(SECONDS), f"process {rank} hangs"
            results.append(end.recv())
            if isinstance(results[-1], Exception):
                raise results[-1]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [tree_map_only(numpy.ndarray, torch.from_numpy, found) for found in results]


def body(work: Callable[[Case, int], Any], name: str, ours: bool, folder: Path, rank: int, port: int, end: Any) -> None:
    torch.set_num_threads(1)
    subject = SUBJECTS[name]
    model, twin = subject.pair()
    case = Case(model if ours else twin, subject, folder, subject.build if ours else subject.twin)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=COUNT)
    try:
        end.send(tree_map_only(Tensor, lambda t: t.detach().numpy().copy(), work(case, rank)))
    except Exception as error:
        end.send(RuntimeError(f"{type(error).__name__}: {error}"))  # some errors of torch cannot be unpickled
