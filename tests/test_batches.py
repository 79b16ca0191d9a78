"""Batches: every image once an epoch, each epoch determined by seed and number, ranks sharing one joint batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ran_ext.data import Augment, Batches, Normalize, sample, to_float


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are small: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data():
    return sample("test").subset(torch.arange(103))


@pytest.fixture(scope="module")
def augment(data):
    return Augment(Normalize.per_pixel(data), crop=2, cutout=4)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def joined(batches):
    """One epoch as a pair of tensors."""
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


@settings(max_examples=8, deadline=None)
@given(batch_size=st.integers(5, 120), seed=st.integers(0, 2**63), shuffle=st.booleans())
def test_every_image_comes_once_with_its_label(data, batch_size, seed, shuffle):
    index = data.subset(torch.arange(len(data)))
    index.images = torch.arange(len(data), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    batches = Batches(index, batch_size, lambda images: images[:, 0, 0, 0].long(), shuffle, seeded(seed))
    parts = list(batches)
    assert len(parts) == len(batches) == -(-103 // batch_size)
    assert [len(labels) for _, labels in parts[:-1]] == [batch_size] * (len(parts) - 1)
    order, labels = joined(parts)
    assert torch.equal(order.sort().values, torch.arange(103))
    assert torch.equal(labels, data.labels[order])
    assert shuffle or torch.equal(order, torch.arange(103))


def test_without_augment_floats_from_0_to_1(data):
    images, labels = joined(Batches(data, 50, shuffle=False))
    assert torch.equal(images, to_float(data.images))
    assert torch.equal(labels, data.labels)


def test_epochs_differ_and_any_one_can_be_had_again(data, augment):
    batches = Batches(data, 40, augment, generator=seeded(5))
    first, second = joined(batches), joined(batches)
    assert batches.epoch == 2
    assert not torch.equal(first[1], second[1])
    resumed = Batches(data, 40, augment, generator=seeded(5))
    resumed.set_epoch(1)
    assert torch.equal(joined(resumed)[0], second[0])
    resumed.set_epoch(0, first_batch=2)
    rest = joined(resumed)
    assert torch.equal(rest[0], first[0][80:])
    assert resumed.epoch == 1
    assert torch.equal(joined(resumed)[0], second[0])


def test_augmentation_differs_between_epochs_in_data_set_order(data, augment):
    batches = Batches(data, 103, augment, shuffle=False, generator=seeded(0))
    (first, _), (second, _) = joined(batches), joined(batches)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_seeds(data):
    def order(**arguments):
        return joined(Batches(data, 103, **arguments))[0]

    assert not torch.equal(order(generator=seeded(1)), order(generator=seeded(2)))
    used = seeded(1)
    state = used.get_state()
    expected = order(generator=used)
    assert torch.equal(used.get_state(), state)
    torch.rand(3, generator=used)
    assert torch.equal(order(generator=used), expected)
    torch.manual_seed(1)
    assert torch.equal(order(), expected)


@settings(max_examples=8, deadline=None)
@given(batch_size=st.integers(4, 60), world_size=st.integers(1, 4), drop_last=st.booleans())
def test_ranks_share_the_joint_batches_bit_for_bit(data, augment, batch_size, world_size, drop_last):
    if not drop_last and 0 < 103 % batch_size < world_size:
        return
    joint = list(Batches(data, batch_size, augment, generator=seeded(0), drop_last=drop_last))
    ranks = [
        list(Batches(data, batch_size, augment, True, seeded(0), drop_last, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for batch, shares in zip(joint, zip(*ranks, strict=True), strict=True):
        assert torch.equal(joined(shares)[0], batch[0])
        assert torch.equal(joined(shares)[1], batch[1])
        sizes = [len(labels) for _, labels in shares]
        assert max(sizes) - min(sizes) <= 1


def test_drop_last(data):
    batches = Batches(data, 50, drop_last=True)
    assert len(batches) == 2
    assert [len(labels) for _, labels in batches] == [50, 50]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 8, "rank": 2, "world_size": 2}, "rank must be from 0 to world_size - 1, got 2 of 2"),
        ({"batch_size": 51, "world_size": 2}, "got a batch of 1 for 2 processes; choose drop_last=True"),
        ({"batch_size": 104, "drop_last": True}, "leaves no batch of 104 from 103 images"),
    ],
)
def test_arguments_out_of_range(data, arguments, text):
    with pytest.raises(ValueError, match=text):
        Batches(data, **arguments)


@pytest.mark.parametrize(("epoch", "first"), [(-1, 0), (0, 4), (0, -1)])
def test_set_epoch_out_of_range(data, epoch, first):
    with pytest.raises(ValueError, match="first_batch from 0 to 3"):
        Batches(data, 40).set_epoch(epoch, first)


@pytest.mark.gpu
def test_cuda_gives_the_batches_of_the_cpu(data, augment):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    normalize = Normalize.per_pixel(data)
    expected = joined(Batches(data, 40, Augment(normalize), generator=seeded(0)))
    got = joined(Batches(data, 40, Augment(normalize), generator=seeded(0), device="cuda"))
    assert torch.equal(got[1].cpu(), expected[1])
    torch.testing.assert_close(got[0].cpu(), expected[0], atol=1e-4, rtol=0)
