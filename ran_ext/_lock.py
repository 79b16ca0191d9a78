"""One process at a time in a folder: a lock of the operating system, which ends with its process."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


class FolderInUseError(RuntimeError):
    """Another process works in the folder; one sentence that names it."""


class FolderLock:
    """While entered, no other process, and no other lock of this one, can enter it for the same folder.

    The lock is ``flock``'s on a file in the folder: the system frees it when the process ends, in whatever way. Where
    the system or the file system has none, a warning says so, and nothing is locked.

    Args:
        folder: must exist.

    Raises (on entering):
        FolderInUseError: another process is there.
        OSError: the folder cannot be written.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with FolderLock(folder):
    ...     FolderLock(folder).acquire()
    Traceback (most recent call last):
        ...
    ran_ext._lock.FolderInUseError: ... is in use by another process (process ...
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / NAME
        self._file = -1

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, or raise."""
        if fcntl is None:
            return self._warn("this system has no flock")
        while self._file < 0 or not self._is_ours():  # not ours: its holder removed the file before we had the lock
            self._close()
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(self._file, 200).decode(errors="replace")
                self._close()
                raise FolderInUseError(
                    f"{self.folder} is in use by another process ({holder or 'it has not said which'}); wait for its "
                    "end, or choose another folder"
                ) from error
            except OSError as error:  # some network file systems
                self._close()
                return self._warn(f"its file system has no locks: {error.strerror}")
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(self._file, 0)
            os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def require(self) -> None:
        """Raise :class:`FolderInUseError` where the folder was removed meanwhile, and so may be another process's."""
        if self._file >= 0 and not self._is_ours():
            raise FolderInUseError(
                f"{self.folder} was removed or taken by another process while this one worked in it; choose another "
                "folder"
            )

    def release(self) -> None:
        """Give the lock back, where it is held."""
        if self._file >= 0 and self._is_ours():
            with contextlib.suppress(OSError):
                self.path.unlink()  # while the lock is held: whoever waits for this file finds it gone
        self._close()

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except OSError:
            return False

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _warn(self, why: str) -> None:
        warnings.warn(f"{self.folder} is not locked ({why}); see that no other run writes there", stacklevel=3)
