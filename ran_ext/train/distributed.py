"""What ``torchrun`` asks of a run: the process group, the wrapped model, sums over the processes."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .._errors import one_line
from .errors import TrainingError


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The place of this process among those that train together."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and the terminal."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model`` for training: as it is in one process, else with synchronised statistics and gradients."""
        if self.world_size == 1:
            return model
        on_cuda = self.device.type == "cuda"
        return _DataParallel(
            model,
            device_ids=[self.device.index] if on_cuda else None,
            gradient_as_bucket_view=True,
        )

    def convert(self, model: nn.Module) -> nn.Module:
        """``model`` with its batch statistics taken over all processes."""
        return model if self.world_size == 1 else nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over the processes."""
        if self.world_size > 1:
            values = values.to(self.device)  # NCCL takes no others
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0) if self.world_size > 1 else flag

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every process, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


class _DataParallel(nn.parallel.DistributedDataParallel):
    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        """Torch refuses ``SyncBatchNorm`` on the CPU here, where its own does not run; through the fused op it does."""


@contextmanager
def process_group(device: str = "auto") -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started (gloo on the CPU, NCCL on GPUs), or stand alone.

    Args:
        device: ``auto`` (CUDA where there is one, else the CPU) or a name torch knows.
    """
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    chosen = choose_device(device)
    if world_size == 1 or dist.is_initialized():
        group = dist.is_initialized()
        yield Ranks(dist.get_rank() if group else 0, dist.get_world_size() if group else 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world_size, chosen)
    finally:
        # A DistributedDataParallel that only a cycle of references still holds would abort the process at its end.
        gc.collect()
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device ``name`` stands for.

    Raises:
        TrainingError: there is no such device here, or it holds no values, as ``meta``.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TrainingError(f"there is no device named {name!r}; choose {_devices()}") from error
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # each device that torch knows by name alone says so in a way of its own
        reason = one_line(error).partition(". ")[0].partition(" Compile with ")[0]
        raise TrainingError(f"device {name} cannot be used here ({reason}); choose {_devices()}") from error
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _devices() -> str:
    """The devices there are, for a sentence."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return f"auto, cpu or {found.type}" if found else "auto or cpu"
