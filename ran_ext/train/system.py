"""What a run asks of the system: a device, its memory, other processes, signals, a folder of its own.

And the errors of a run, each with one sentence that says what to do next.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import gc
import os
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .. import _backend
from .._errors import one_line
from .._files import remove_unfinished
from .._lock import FolderInUseError, FolderLock


class TrainingError(RuntimeError):
    """A run cannot go on. The message is one sentence that says what to do next."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be read, does not fit, or cannot be written."""


class NonFiniteError(TrainingError):
    """The loss or a weight is NaN or infinite."""


class OutOfMemoryError(TrainingError):
    """A step does not fit into the device's memory."""


@contextmanager
def out_of_memory_explained(device: torch.device, batch_size: int) -> Iterator[None]:
    """Turn an allocator's failure into :class:`OutOfMemoryError`; other errors pass.

    >>> with out_of_memory_explained(torch.device("cpu"), 128):
    ...     raise MemoryError
    Traceback (most recent call last):
        ...
    ran_ext.train.system.OutOfMemoryError: out of memory on cpu with batch size 128; ...
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        allocator = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "you tried to allocate" in str(error)
        if not allocator:
            raise
        raise OutOfMemoryError(
            f"out of memory on {device} with batch size {batch_size}; train with a smaller --batch-size, or with "
            "--dtype bfloat16, which halves the activations; checkpoints already written are intact"
        ) from error


def write_failure(what: str, error: OSError) -> str:
    """One sentence about a file that could not be written.

    >>> write_failure("run/last.pt", OSError(errno.ENOSPC, "No space left on device"))
    'cannot write run/last.pt: the disk is full; free some space, then continue with --resume'
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot write {what}: the disk is full; free some space, then continue with --resume"
    reason = error.strerror or one_line(error)
    return f"cannot write {what}: {reason}; check the folder, then continue with --resume"


def require_memory(parameters: int, copies: int, device: torch.device) -> None:
    """Check that ``copies`` times ``parameters`` float32 numbers fit into the memory of ``device``.

    Args:
        parameters: of the network.
        copies: 1 for the network; training adds gradients, the optimizer's state, an average.
        device: a CPU, or a GPU that torch can ask.

    Raises:
        ValueError: they do not fit; the text says how many parameters there are.

    >>> require_memory(10**15, 1, torch.device("cpu"))
    Traceback (most recent call last):
        ...
    ValueError: the network has 1,000,000,000,000,000 parameters, which take 4,000,000 GB, but cpu has ... GB; ...
    """
    needed, there = 4 * copies * parameters, _memory(device)
    if there is not None and needed > there:
        raise ValueError(
            f"the network has {parameters:,} parameters, which take {needed / 1e9:,.0f} GB, but {device} has "
            f"{there / 1e9:,.0f} GB; choose a smaller width"
        )


def _memory(device: torch.device) -> int | None:
    """All of its bytes, free or not; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()  # of a container
    except OSError:
        limit = "max"
    return there if limit == "max" else min(there, int(limit))


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
        """Torch refuses ``SyncBatchNorm`` on the CPU here, because its own needs a GPU; the fused op runs on both."""


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
    except Exception as error:  # each type of device raises its own kind of error
        reason = one_line(error).partition(". ")[0].partition(" Compile with ")[0]
        raise TrainingError(f"device {name} cannot be used here ({reason}); choose {_devices()}") from error
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _devices() -> str:
    """The devices that can be used, in words."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return f"auto, cpu or {found.type}" if found else "auto or cpu"


#: Steps between two agreements of several processes on whether one of them was asked to stop.
AGREE_EVERY = 16


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets :attr:`requested`; a second one has its usual effect.

    Outside the main thread, where Python allows no handlers, nothing is installed.

    >>> with StopRequest() as stop:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     stop.requested
    True
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def agreed(self, ranks: Ranks, step: int) -> bool:
        """Whether to stop after step ``step``; several processes must do so after the same one."""
        if ranks.world_size == 1:
            return self.requested
        return step % AGREE_EVERY == 0 and ranks.any(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        os.write(
            2, b"\nstopping after this step with a checkpoint; once more to quit at once\n"
        )  # print may not re-enter

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


@contextmanager
def run_folder(path: Path, ranks: Ranks) -> Iterator[FolderLock]:
    """Make the folder and hold its lock, in the first process; all processes must enter.

    Raises:
        TrainingError: another run holds it, or it cannot be written; in every process.
    """
    lock, refusal = FolderLock(path), ""
    if ranks.first:
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            remove_unfinished(path)
        except FolderInUseError as error:
            refusal = str(error)
        except OSError as error:
            refusal = write_failure(str(path), error)
    try:
        refusal = ranks.gather(refusal)[0]
        if refusal:
            raise TrainingError(refusal)
        yield lock
    finally:
        lock.release()


def keep_freed_memory() -> bool:
    """Have this process keep the memory of freed tensors: each step frees and takes the same again.

    By default glibc hands large blocks back to the system, which then clears every page once more: 5 to 7 % of a step
    of ``ran_compact``. For commands, whose process is their own; the process keeps the memory of its largest step.

    Returns:
        Whether there is such an allocator here; elsewhere nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    most, trim_threshold, mmap_threshold = 2**31 - 1, -1, -3  # malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    longest = any(mallopt(mmap_threshold, limit) for limit in (most, 32 << 20))  # the limit of an older glibc
    return bool(longest and mallopt(trim_threshold, most))


def environment(ranks: Ranks) -> dict[str, Any]:
    """Versions, hardware and backend of this run, fit for JSON.

    >>> sorted(environment(Ranks(0, 1, torch.device("cpu"))))[:4]
    ['backend', 'cpu', 'cpu_capability', 'cuda']
    """
    from .. import __version__

    on_cuda = ranks.device.type == "cuda"
    missing = _backend.why_not_native(ranks.device.type)
    chosen = _backend.get_backend()
    return {
        "ran_ext": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(ranks.device) if on_cuda else ranks.device.type,
        "processes": ranks.world_size,
        "backend": "reference" if missing or chosen == "reference" else "native",
        "why_not_native": missing if chosen != "reference" else "the reference backend was chosen",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any.

    >>> duration(61.4), duration(3723)
    ('1:01', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
