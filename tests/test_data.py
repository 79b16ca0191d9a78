"""CIFAR-10's files: every layout gives the same tensors, and every fault is named."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from ran_ext.data import CIFAR10, DatasetError, sample
from ran_ext.data.formats import SPLITS, Batch

COUNT = 20


@pytest.fixture
def records(monkeypatch):
    """Six batches of 20 random images in place of the official ones, checksums included: {stem: (20, 3073) uint8}."""
    random, made = np.random.default_rng(0), {}
    for split, batches in list(SPLITS.items()):
        small = []
        for batch in batches:
            made[batch.stem] = random.integers(0, 256, (COUNT, 3073), np.uint8)
            made[batch.stem][:, 0] %= 10
            digest = hashlib.sha256(made[batch.stem].tobytes()).hexdigest()
            small.append(Batch(batch.stem, batch.position, COUNT, digest))
        monkeypatch.setitem(SPLITS, split, tuple(small))
    return made


def write_binary(folder, records):
    for stem, data in records.items():
        (folder / f"{stem}.bin").write_bytes(data.tobytes())


def python2_pickle(data):
    """The bytes that Python 2's cPickle (protocol 2) and its NumPy wrote: str is SHORT_BINSTRING or BINSTRING."""

    def text(s):
        return b"U" + bytes([len(s)]) + s

    labels = b"](" + b"".join(b"K" + bytes([label]) for label in data[:, 0]) + b"e"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2
    dtype += b"K\x00tb"
    pixels = data[:, 1:].tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R(K\x01"
    array += b"K" + bytes([len(data)]) + b"M" + struct.pack("<H", 3072) + b"\x86" + dtype
    array += b"\x89T" + struct.pack("<I", len(pixels)) + pixels + b"tb"
    names = b"](" + text(b"camion_s_000148.png") + b"e"
    items = {b"batch_label": text(b"training batch 1 of 5"), b"labels": labels, b"data": array, b"filenames": names}
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in items.items()) + b"u."


def write_python(folder, records):
    for stem, data in records.items():
        (folder / stem).write_bytes(python2_pickle(data))


def write_atlas(folder, records):
    for stem, data in records.items():
        tiles = data[:, 1:].reshape(4, 5, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(4 * 32, 5 * 32, 3)
        name = "test" if stem == "test_batch" else f"train_{stem[-1]}"
        Image.fromarray(tiles).save(folder / f"{name}.webp", lossless=True, method=0)
    _labels_by_split(records, lambda split, labels: labels.tofile(folder / f"{split}_labels.bin"))


def write_png(folder, records):
    for stem, data in records.items():
        image = data[:, 1:].reshape(COUNT, 3, 1024).transpose(0, 2, 1)
        Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{stem}.png")
    _labels_by_split(
        records, lambda split, labels: (folder / f"{split}_lables.json").write_text(json.dumps(labels.tolist()))
    )


def _labels_by_split(records, write):
    for split, batches in SPLITS.items():
        write(split, np.concatenate([records[batch.stem][:, 0] for batch in batches]))


LAYOUTS = {
    "binary": (write_binary, "cifar-10-batches-bin", "data_batch_2.bin"),
    "python": (write_python, "cifar-10-batches-py", "data_batch_2"),
    "atlas": (write_atlas, "", "train_2.webp"),
    "png": (write_png, "package", "data_batch_2.png"),
}


def put(root, layout, records):
    """The folder in which ``layout`` was written, and the file of the second training batch there."""
    write, name, second = LAYOUTS[layout]
    folder = root / name
    folder.mkdir(exist_ok=True)
    write(folder, records)
    return folder, folder / second


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors_from_its_root_and_its_folder(tmp_path, records, layout):
    folder, _ = put(tmp_path, layout, records)
    for root in (tmp_path, folder):
        train, test = CIFAR10(root, "train"), CIFAR10(str(root), "test")
        assert (len(train), len(test)) == (5 * COUNT, COUNT)
        assert train.images.shape == (100, 3, 32, 32)
        assert (train.images.dtype, train.labels.dtype) == (torch.uint8, torch.int64)
        expected = np.concatenate([records[f"data_batch_{i}"] for i in range(1, 6)])
        assert np.array_equal(train.images.numpy().reshape(-1, 3072), expected[:, 1:])
        assert np.array_equal(train.labels.numpy(), expected[:, 0])
        assert np.array_equal(test.images.numpy().reshape(-1, 3072), records["test_batch"][:, 1:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_file_is_named_with_the_command_that_gets_it(tmp_path, records, layout):
    _, second = put(tmp_path, layout, records)
    second.unlink()
    with pytest.raises(DatasetError, match=rf"{second.name} is missing.*get_cifar10 --out {tmp_path}$"):
        CIFAR10(tmp_path, "train")
    assert len(CIFAR10(tmp_path, "test")) == COUNT


def test_a_complete_layout_wins_over_one_that_is_there_in_part(tmp_path, records):
    put(tmp_path, "binary", records)[1].unlink()
    put(tmp_path, "atlas", records)
    assert len(CIFAR10(tmp_path, "train")) == 5 * COUNT


def test_empty_root_says_where_it_looked(tmp_path):
    with pytest.raises(DatasetError, match=r"no CIFAR-10 in .*data_batch_1\.bin.*train_1\.webp.*get_cifar10 --out"):
        CIFAR10(tmp_path / "absent")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_short_file_is_named(tmp_path, records, layout):
    _, second = put(tmp_path, layout, records)
    second.write_bytes(second.read_bytes()[:-1000])
    with pytest.raises(DatasetError, match=rf"{second.name}: .*delete it and run: python -m"):
        CIFAR10(tmp_path, "train")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("position", [0, 1234], ids=["label", "pixel"])
def test_one_altered_value_is_noticed(tmp_path, records, layout, position):
    value = records["data_batch_2"][7, position]
    records["data_batch_2"][7, position] = (value + 1) % 10
    _, second = put(tmp_path, layout, records)
    with pytest.raises(DatasetError, match=rf"{second.name}: altered: .*sha256 [0-9a-f]{{64}}, must be [0-9a-f]{{64}}"):
        CIFAR10(tmp_path, "train")


def test_binary_says_how_many_bytes_are_short_or_too_many(tmp_path, records):
    _, second = put(tmp_path, "binary", records)
    whole = second.read_bytes()
    for data, fault in ((whole[:-5], r"got 61455 \(short by 5"), (whole + b"abc", r"got 61463 \(3 too many")):
        second.write_bytes(data)
        with pytest.raises(DatasetError, match=rf"must hold 61460 bytes, {fault}"):
            CIFAR10(tmp_path, "train")


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_that_runs_code_is_refused_unrun(tmp_path, records, protocol):
    _, second = put(tmp_path, "python", records)
    second.write_bytes(pickle.dumps({"data": _Bomb(tmp_path / "ran")}, protocol))
    with pytest.raises(DatasetError, match=r"data_batch_2: not a CIFAR-10 Python batch: it asks for \w+\.mkdir"):
        CIFAR10(tmp_path, "train")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({b"labels": [1] * COUNT}, "not a CIFAR-10 Python batch: it holds no labels and data"),
        ([1, 2], "not a CIFAR-10 Python batch: it holds no labels and data"),
        ({b"labels": [1] * COUNT, b"data": "pixels"}, "data must be uint8 .*got str"),
    ],
)
def test_pickle_of_something_else_is_named(tmp_path, records, content, fault):
    _, second = put(tmp_path, "python", records)
    second.write_bytes(pickle.dumps(content, 4))
    with pytest.raises(DatasetError, match=f"data_batch_2: {fault}"):
        CIFAR10(tmp_path, "train")


@pytest.mark.parametrize(
    "labels", [[1] * (COUNT - 1), [10] * COUNT, [0.5] * COUNT, ["1"] * COUNT], ids=["few", "range", "fraction", "text"]
)
def test_labels_must_be_classes(tmp_path, records, labels):
    put(tmp_path, "png", records)
    (tmp_path / "package" / "test_lables.json").write_text(json.dumps(labels))
    with pytest.raises(DatasetError, match=r"test_batch\.png: needs 20 labels from 0 to 9"):
        CIFAR10(tmp_path, "test")


@pytest.mark.parametrize("layout", ["atlas", "png"])
def test_image_of_another_size_is_named(tmp_path, records, layout):
    _, second = put(tmp_path, layout, records)
    Image.new("RGB", (64, 33)).save(second)
    with pytest.raises(DatasetError, match=rf"{second.name}: must be .* got 64x33"):
        CIFAR10(tmp_path, "train")


def test_unknown_split():
    for make in (lambda: CIFAR10(".", "val"), lambda: sample("val")):
        with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
            make()
