"""The embedded sample, the Dataset view, statistics, and the validation split."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ran_ext.data import CIFAR10, DatasetError, cifar10, sample, split_validation, to_float

WHOLE = Path(__file__).parent.parent / "data"


SAMPLE_COUNTS = {"train": [205] * 8 + [204] * 2, "test": [52] * 2 + [51] * 8}


@pytest.mark.parametrize("split", SAMPLE_COUNTS)
def test_sample_is_balanced(split):
    data = sample(split)
    assert data.labels.bincount().tolist() == SAMPLE_COUNTS[split]
    assert data.images.shape == (sum(SAMPLE_COUNTS[split]), 3, 32, 32)


@pytest.mark.skipif(not WHOLE.is_dir(), reason="needs the whole set: python scripts/get_cifar10.py")
@pytest.mark.parametrize("split", SAMPLE_COUNTS)
def test_sample_is_the_first_of_each_class(split):
    data, whole = sample(split), CIFAR10(WHOLE, split)
    chosen = [(whole.labels == label).nonzero().flatten()[:count] for label, count in enumerate(SAMPLE_COUNTS[split])]
    order = torch.cat(chosen).sort().values
    assert torch.equal(data.images, whole.images[order])
    assert torch.equal(data.labels, whole.labels[order])


@pytest.mark.parametrize("fault", ["altered", "missing", "cut"])
def test_damaged_sample_says_so(tmp_path, monkeypatch, fault):
    folder = tmp_path / "sample"
    shutil.copytree(cifar10.SAMPLE_FOLDER, folder)
    labels, image = folder / "test_labels.bin", folder / "test.webp"
    if fault == "altered":
        labels.write_bytes(bytes([9 - labels.read_bytes()[0]]) + labels.read_bytes()[1:])
    elif fault == "missing":
        labels.unlink()
    else:
        image.write_bytes(image.read_bytes()[:1000])
    monkeypatch.setattr(cifar10, "SAMPLE_FOLDER", folder)
    with pytest.raises(DatasetError, match=r"sample/test.*reinstall ran_ext"):
        sample("test")


@pytest.fixture(scope="module")
def test_set():
    return sample("test")


@pytest.mark.parametrize("workers", [0, 2])
def test_dataloader_gives_the_images_in_order(test_set, workers):
    loader = DataLoader(test_set, batch_size=200, num_workers=workers)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert torch.equal(images, to_float(test_set.images))
    assert torch.equal(labels, test_set.labels)


def test_transform_gets_the_uint8_image(test_set):
    data = CIFAR10.sample("test", transform=lambda image: (image.dtype, image.shape))
    assert data[-1] == ((torch.uint8, (3, 32, 32)), int(test_set.labels[-1]))
    with pytest.raises(IndexError):
        data[512]


def test_statistics(test_set):
    pixels = test_set.images.double() / 255
    torch.testing.assert_close(test_set.mean_image(), pixels.mean(0).float(), atol=1e-7, rtol=0)
    mean, std = test_set.channel_stats()
    torch.testing.assert_close(mean.flatten(), pixels.mean((0, 2, 3)).float(), atol=1e-7, rtol=0)
    torch.testing.assert_close(std.flatten(), pixels.std((0, 2, 3), correction=0).float(), atol=1e-7, rtol=0)


@settings(max_examples=10, deadline=None)
@given(count=st.just(0) | st.integers(10, 502), seed=st.integers(0, 2**40))
def test_validation_split(test_set, count, seed):
    train, validation = split_validation(test_set, count, seed)
    assert len(validation) == count
    given_up = validation.labels.bincount(minlength=10)
    assert given_up.max() - given_up.min() <= 1
    assert torch.equal(train.labels.bincount(minlength=10) + given_up, test_set.labels.bincount())
    keys = [sorted(map(bytes, part.images.flatten(1).numpy())) for part in (train, validation, test_set)]
    assert sorted(keys[0] + keys[1]) == keys[2]
    again = split_validation(test_set, count, seed)[1]
    assert torch.equal(again.images, validation.images)


def test_validation_split_depends_on_the_seed_and_refuses_too_many(test_set):
    first, second = (split_validation(test_set, 50, seed)[1].images for seed in (0, 1))
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match=r"count must be 0, or from 10, one of each class, to 502, .* got 520"):
        split_validation(test_set, 520)
    with pytest.raises(ValueError, match=r"count must be 0, or from 10, .* got -1"):
        split_validation(test_set, -1)
