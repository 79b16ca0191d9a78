"""The folder of a run, which no other run may write to meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .._files import remove_unfinished
from .._lock import FolderInUseError, FolderLock
from .distributed import Ranks
from .errors import TrainingError, write_failure


@contextmanager
def run_folder(path: Path, ranks: Ranks) -> Iterator[FolderLock]:
    """Make the folder and hold its lock, in the first of the processes that train together; all of them must enter.

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
