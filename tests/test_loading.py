"""Data sets and loaders that are not in memory: trained on, resumed, evaluated, and refused in a sentence."""

import dataclasses
import random
import signal

import numpy as np
import pytest
import torch
from tiny_run import CONFIG, images, network
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from ran_ext.data import Batches, Images, Normalize
from ran_ext.data.loading import LoadedBatches, mixed, some_images
from ran_ext.data.sources import class_names, count_images
from ran_ext.train import (
    CheckpointError,
    evaluate,
    fit,
    load_checkpoint,
    load_classes,
    load_model,
    load_normalize,
)

PLAIN = dataclasses.replace(CONFIG, augment="none", select="last")


class Shaken(Dataset):
    """uint8 images that a transform shakes, by the generators of torch, Python and NumPy."""

    classes = ("a", "b", "c")

    def __init__(self, count=40, side=32, channels=3):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randint(200, (count, channels, side, side), generator=generator, dtype=torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        shift = torch.randint(9, ()).item() + random.randrange(9) + np.random.randint(9)
        return self.images[index] + shift, index % 3


def tiny(channels=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(256, 3)
    )


def interrupt_at(number):
    """A ``make_step`` that sends SIGINT to this process in step ``number`` of this call, from 1."""

    def make(step):
        calls = []

        def counted(images, labels):
            calls.append(len(images))
            if len(calls) == number:
                signal.raise_signal(signal.SIGINT)
            return step(images, labels)

        return counted

    return make


def weights(folder):
    return load_checkpoint(folder / "last.pt")["model"]


def assert_same(one, other):
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_data_set_trains_and_its_classes_and_statistics_are_kept(tmp_path):
    result = fit(tiny(), Shaken(), Shaken(21), PLAIN, tmp_path, test_set=Shaken(10), quiet=True)
    assert len(result.figures) == 2
    assert result.test.confusion.sum() == 10
    assert load_classes(tmp_path / "model.pt") == ["a", "b", "c"]
    kept = load_normalize(tmp_path / "model.pt")
    expected = Normalize.per_pixel(some_images(Shaken()))
    torch.testing.assert_close(kept.offset, expected.offset)
    assert load_checkpoint(tmp_path / "last.pt")["images"] == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_resumes_bit_for_bit_whatever_the_workers(tmp_path, workers):
    config = dataclasses.replace(PLAIN, augment="report", epochs=3)  # and augmented on the device
    fit(tiny(), Shaken(), Shaken(21), config, tmp_path / "whole", quiet=True)
    for step in (2, 9):
        folder = tmp_path / f"{step}"
        stopped = fit(
            tiny(), Shaken(), Shaken(21), config, folder, quiet=True, make_step=interrupt_at(step), workers=workers
        )
        assert stopped.interrupted
        assert len(load_checkpoint(folder / "last.pt")["history"]) == step % 5
        fit(tiny(), Shaken(), Shaken(21), config, folder, quiet=True, resume=True, workers=workers)
        assert_same(weights(tmp_path / "whole"), weights(folder))


def test_reading_leaves_the_generators_as_they_were(tmp_path):
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    list(LoadedBatches(Shaken(), 8, Normalize((0.5,) * 3), seed=0))
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_order_and_draws_do_not_depend_on_the_number_of_processes():
    def augment(images):
        return images.float()

    whole = list(LoadedBatches(Shaken(), 8, augment, seed=3))
    shares = [list(LoadedBatches(Shaken(), 8, augment, seed=3, rank=rank, world_size=2)) for rank in (0, 1)]
    for (joint, labels), *parts in zip(whole, *shares, strict=True):
        assert torch.equal(joint, torch.stack([part[0] for part in parts], 1).flatten(0, 1))
        assert torch.equal(labels, torch.stack([part[1] for part in parts], 1).flatten())
    again = LoadedBatches(Shaken(), 8, augment, seed=3)
    again.set_epoch(0, first_batch=3)
    assert torch.equal(next(iter(again))[0], whole[3][0])
    assert not torch.equal(next(iter(again))[0], whole[0][0])  # of the next epoch


def test_a_tensor_data_set_of_uint8_is_held_in_memory(tmp_path):
    data = images()
    for name, given in (("memory", data), ("tensors", TensorDataset(data.images, data.labels))):
        fit(network(), given, given, CONFIG, tmp_path / name, quiet=True)
    assert_same(weights(tmp_path / "memory"), weights(tmp_path / "tensors"))


def test_floating_images_are_taken_as_they_are(tmp_path):
    floats = TensorDataset(torch.randn(24, 3, 32, 32), torch.arange(24) % 3)
    result = fit(tiny(), floats, floats, PLAIN, tmp_path, quiet=True)
    with pytest.raises(CheckpointError, match="normalised by their data set"):
        load_normalize(tmp_path / "model.pt")
    model = tiny()
    model.load_state_dict(load_checkpoint(tmp_path / "model.pt")["model"])
    assert evaluate(model, floats, None).accuracy == pytest.approx(result.figures[-1].val_accuracy)
    fit(tiny(), floats, floats, PLAIN, tmp_path, quiet=True, resume=True)
    for change in ({"augment": "light"}, {"augment": "report"}):
        with pytest.raises(ValueError, match="an augmentation is of uint8 images, and train_set gives floating ones"):
            fit(tiny(), floats, floats, dataclasses.replace(PLAIN, **change), tmp_path / "other", quiet=True)


class Told(torch.utils.data.Sampler):
    """A sampler that is told the epoch, as ``DistributedSampler`` is."""

    def __init__(self):
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __len__(self):
        return 20

    def __iter__(self):
        return iter(range(20))


def test_a_loader_brings_its_own_batches_and_goes_on_where_it_was(tmp_path):
    sampler = Told()
    loader = DataLoader(Shaken(), batch_size=8, sampler=sampler)  # the last batch is of four
    result = fit(tiny(), loader, DataLoader(Shaken(21), 5), PLAIN, tmp_path / "a", quiet=True)
    assert sampler.epochs == [0, 1]
    assert result.figures[0].train_accuracy <= 1
    assert load_checkpoint(tmp_path / "a" / "last.pt")["images"] == 40
    stopped = fit(tiny(), loader, None, dataclasses.replace(PLAIN, ema=0.0), tmp_path / "b", quiet=True,
                  make_step=interrupt_at(5))  # fmt: skip
    assert stopped.interrupted
    assert len(load_checkpoint(tmp_path / "b" / "last.pt")["history"]) == 2
    done = fit(tiny(), loader, None, dataclasses.replace(PLAIN, ema=0.0), tmp_path / "b", quiet=True, resume=True)
    assert len(done.figures) == 2
    assert not done.interrupted


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_that_gives_every_process_all_images_is_refused(shuffle):
    loader = DataLoader(Shaken(), 4, shuffle=shuffle)
    with pytest.raises(ValueError, match="must give each of 2 processes its own share, got a DataLoader without a"):
        LoadedBatches(loader, 8, Normalize((0.5,) * 3), seed=0, world_size=2)
    shared = DataLoader(Shaken(), 4, sampler=DistributedSampler(Shaken(), 2, 1))
    assert len(list(LoadedBatches(shared, 8, Normalize((0.5,) * 3), seed=0, rank=1, world_size=2))) == 5


class Stream(IterableDataset):
    def __init__(self, length=None, count=3, size=8):
        self.length, self.count, self.size = length, count, size

    def __iter__(self):
        for _ in range(self.count):
            yield torch.zeros(self.size, 3, 32, 32), torch.zeros(self.size, dtype=torch.int64)


class Sized(Stream):
    def __len__(self):
        return self.length


def test_batches_in_order_need_a_length_and_keep_to_it(tmp_path):
    def run(data):
        return fit(tiny(), data, None, PLAIN, tmp_path / "run", quiet=True)

    with pytest.raises(TypeError, match="train_set must be a DataLoader over what is read in order, got the Stream"):
        run(Stream())
    with pytest.raises(TypeError, match="train_set must know how many batches it has, got a DataLoader"):
        run(DataLoader(Stream(), batch_size=None))
    with pytest.raises(ValueError, match="must give the 4 batches that its length says, got 3"):
        run(DataLoader(Sized(4), batch_size=None))
    with pytest.raises(ValueError, match=r"must give batches of 8 images \(config.batch_size 8 over 1 .*, got 5"):
        run(DataLoader(Sized(3, size=5), batch_size=None))
    assert len(fit(tiny(), DataLoader(Sized(3), batch_size=None), None, PLAIN, tmp_path / "b", quiet=True).figures) == 2
    assert count_images(DataLoader(Sized(3), batch_size=None), 8) == 24


class Of(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


GREEN = torch.zeros(3, 32, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (3, TypeError, "train_set must be a data set or a loader of (image, label), got int"),
        (Of(*[(np.zeros((32, 32, 3)), 0)] * 8), TypeError, "got (ndarray, int); pictures of Pillow need a transform"),
        (Of(*[GREEN] * 8), TypeError, "train_set must give (image, label)"),
        (Of(*[(GREEN, 0.5)] * 8), TypeError, "train_set must give whole numbers as labels, got torch.float64"),
        (Of(*[(GREEN, -1)] * 8), ValueError, "train_set must give labels from 0 on, got -1"),
        (Of(*[(GREEN, 0)] * 8, (GREEN[:, 1:], 1)), ValueError, "images of one size, got [3, 32, 32] and [3, 31, 32]"),
        (Of(), ValueError, "train_set must hold at least one batch, got 0 images and batch_size 8"),
        (Of(*[(GREEN, 0)] * 4, *[(GREEN, 7)] * 4), ValueError, "a class for each label up to 7, got [8, 3]"),
        (DataLoader(Of(*[(GREEN, 0, 1)] * 8), 8), TypeError, "labels (N,), got torch.uint8 [8, 3, 32, 32]"),
    ],
)  # fmt: skip
def test_what_will_not_do_is_named(tmp_path, given, error, said):
    with pytest.raises(error) as caught:
        fit(tiny(), given, None, PLAIN, tmp_path, quiet=True)
    assert said in str(caught.value)


def test_grey_images_train_too(tmp_path):
    grey = Images(torch.randint(256, (24, 1, 32, 32), dtype=torch.uint8), torch.arange(24) % 3, ["x", "y", "z"])
    fit(tiny(1), grey, grey, dataclasses.replace(PLAIN, augment="report"), tmp_path, quiet=True)
    assert load_classes(tmp_path / "model.pt") == ["x", "y", "z"]
    with pytest.raises(ValueError, match="classes must name each label up to 2, got 1 names"):
        Images(grey.images, grey.labels, ["x"])


def test_evaluation_counts_every_image_once_in_order():
    data, model = Shaken(21), tiny()
    normalize = Normalize((0.5, 0.5, 0.5))
    kept = evaluate(model, data, normalize, batch_size=8, keep=True)
    assert kept.labels.tolist() == [index % 3 for index in range(21)]
    again = evaluate(model, DataLoader(data, 4), normalize, keep=True)
    assert again.probabilities.shape == kept.probabilities.shape == (21, 3)
    assert kept.top5 == 1
    assert kept.accuracy == pytest.approx((kept.probabilities.argmax(1) == kept.labels).float().mean().item())
    with pytest.raises(ValueError, match="uint8 images need normalize, got None"):
        evaluate(model, data, None)


def test_top5_is_of_the_five_likeliest():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.arange(8.0))

        def forward(self, images):
            return self.weight.expand(len(images), 8)

    labels = torch.tensor([7, 3, 2, 0])  # the first, the fifth, the sixth and the last of the logits
    found = evaluate(Fixed(), TensorDataset(torch.zeros(4, 3, 8, 8), labels), None)
    assert (found.accuracy, found.top5) == (0.25, 0.5)


def test_parts_of_a_batch_add_up_to_the_whole(tmp_path):
    """Without batch statistics, whose parts are their own."""

    def run(accumulate, **change):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)).double()
        model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
        config = dataclasses.replace(PLAIN, accumulate=accumulate, optimizer="nesterov", lr=0.05, ema=0.0, **change)
        fit(model, images(), None, config, tmp_path / f"{accumulate}{len(change)}", quiet=True)
        return weights(tmp_path / f"{accumulate}{len(change)}")

    for change in ({}, {"mixup": True, "label_smoothing": 0.1}):
        one, four = run(1, **change), run(4, **change)
        for name, tensor in one.items():
            torch.testing.assert_close(four[name], tensor, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of the number of processes times accumulate 3, got 8 and 1"):
        run(3)


def test_names_are_found_behind_subsets_and_loaders():
    subset = torch.utils.data.Subset(Shaken(), [0, 1])
    assert class_names(DataLoader(subset)) == ["a", "b", "c"]
    assert class_names(TensorDataset(torch.zeros(1))) is None


def test_seeds_differ_with_each_number():
    seeds = {mixed(seed, epoch, index) for seed in range(3) for epoch in range(20) for index in range(300)}
    assert len(seeds) > 17_990  # of 18,000: 32 bits repeat now and then


def test_images_in_memory_know_their_highest_label():
    assert Batches(images(), 8).highest_label == 9


def test_a_model_of_fit_loads_with_its_own_options(tmp_path):
    config = dataclasses.replace(PLAIN, model_options={"width": 0.125, "num_classes": 3}, dropout=0.0, epochs=1)
    fit(config.create_model(), Shaken(16), None, config, tmp_path, quiet=True)
    assert load_model(tmp_path / "model.pt").fc.out_features == 3
