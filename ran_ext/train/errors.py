"""What can go wrong in a training run, each with one sentence that says what to do next."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .._errors import one_line


class TrainingError(RuntimeError):
    """A run cannot go on; the text is one sentence for a person and says what to do next."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be read, does not fit, or cannot be written."""


class NonFiniteError(TrainingError):
    """The loss or a weight is NaN or infinite."""


class OutOfMemoryError(TrainingError):
    """The device's memory does not hold a step."""


@contextmanager
def out_of_memory_explained(device: torch.device, batch_size: int) -> Iterator[None]:
    """Turn an allocator's failure into :class:`OutOfMemoryError`; other errors pass.

    >>> with out_of_memory_explained(torch.device("cpu"), 128):
    ...     raise MemoryError
    Traceback (most recent call last):
        ...
    ran_ext.train.errors.OutOfMemoryError: out of memory on cpu with batch size 128; ...
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
