"""Files that are read and written whole: no half-written file, no wait on a pipe or an endless device."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from . import _json

#: A file that is not finished yet; a random number between the two makes each writer's name unique.
UNFINISHED = (".ran_ext-", ".partial")


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, whole or not at all, also when the power fails half-way.

    Raises:
        OSError: it cannot be written, or what stands there is no regular file; what stood there is intact.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "there is a folder or a device of that name", str(path))
    before, after = UNFINISHED
    side = path.with_name(f"{before}{secrets.token_hex(8)}{after}")
    try:
        with open(side, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(side, path)
    except BaseException:
        with contextlib.suppress(OSError):
            side.unlink()
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)  # the new name itself must reach the disk
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, content: Any, width: int = _json.WIDTH) -> None:
    """Write ``content`` as JSON of lines up to ``width``, as :func:`write_atomically` does."""
    write_atomically(path, (_json.dumps(content, room=width) + "\n").encode())


def remove_unfinished(folder: Path) -> None:
    """Remove what writers that were killed have left in ``folder``; no other process may be writing there."""
    before, after = UNFINISHED
    for path in folder.glob(f"{before}*{after}"):
        with contextlib.suppress(OSError):
            path.unlink()


def require_regular(path: str | Path) -> None:
    """Raise ``OSError`` unless ``path`` is a regular file: reading a pipe would block, a device may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, not a file", str(path))
