"""CIFAR-10 in memory: all images as one uint8 tensor, and an ordinary ``Dataset`` over them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .formats import (
    CLASSES,
    SIDE,
    SPLITS,
    Batch,
    DatasetError,
    Records,
    find_layout,
    get_command,
    read_batch,
    read_tiles,
    verify,
)

SAMPLE_FOLDER = Path(__file__).parent / "sample"
#: The embedded images, as batches of their own; scripts/make_sample.py made them and prints these checksums.
SAMPLE: dict[str, Batch] = {
    "train": Batch("train", 0, 2048, "ed4897f4635f22339e235c5f3a7221684aaf330bb4e2d90e01f5b7427f4458ae"),
    "test": Batch("test", 0, 512, "aff4293f7435b4d5c3bbae62dd5fa46a07801e483f002df1e97127d3fc3051c7"),
}


def to_float(image: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in 0..1, any shape.

    >>> to_float(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([0., 1.])
    """
    return image.to(torch.float32) / 255


class CIFAR10(Dataset[tuple[Any, int]]):
    """CIFAR-10 (Krizhevsky 2009), read from files, verified, held in memory.

    ``images`` is a uint8 tensor (N, 3, 32, 32) and ``labels`` an int64 tensor (N,), both in the official order, for
    :class:`ran_ext.data.Batches` or for indexing by hand. It is a ``torch.utils.data.Dataset`` too: item ``i`` is
    ``(transform(images[i]), int(labels[i]))``, so it goes into a ``DataLoader`` (workers included) as it is.

    Args:
        root: folder that holds the official binary files (``*.bin``), the official Python batches, or the lossless
            WebP atlases (``train_1.webp`` ... with ``train_labels.bin``), directly or in their usual sub-folder.
        split: ``"train"`` (50,000 images) or ``"test"`` (10,000).
        transform: of one uint8 (3, 32, 32) image; by default float32 in 0..1.

    Raises:
        ValueError: ``split`` is neither of these.
        DatasetError: a file is missing, short or altered; the text names it and gives the command that gets the data.

    >>> data = CIFAR10.sample("test")
    >>> len(data), tuple(data.images.shape), data.images.dtype, data.classes[data.labels[0]]
    (512, (512, 3, 32, 32), torch.uint8, 'cat')
    >>> image, label = data[0]
    >>> image.dtype, tuple(image.shape), label
    (torch.float32, (3, 32, 32), 3)
    """

    classes = CLASSES

    def __init__(self, root: str | Path, split: str = "train", transform: Callable[[Tensor], Any] = to_float):
        batches = SPLITS[_checked(split, "CIFAR10")]
        command = get_command(Path(root))
        layout, folder = find_layout(Path(root), batches, f"to get it: {command}")
        advice = f"delete it and run: {command}"
        self._set([read_batch(layout, folder, batch, advice) for batch in batches], split, transform)

    @classmethod
    def sample(cls, split: str = "train", transform: Callable[[Tensor], Any] = to_float) -> CIFAR10:
        """The images that ship with the package: 2,048 of the training set, 512 of the test set, no download.

        They are the first images of each class in the official order, kept in that order: 204 (51) a class, and one
        more for the first eight (two) classes, as 10 does not divide 2,048 (512).

        >>> CIFAR10.sample("train").labels.bincount().tolist()
        [205, 205, 205, 205, 205, 205, 205, 205, 204, 204]
        """
        batch = SAMPLE[_checked(split, "CIFAR10.sample")]
        path = SAMPLE_FOLDER / f"{batch.stem}.webp"
        advice = "the installed package is damaged: reinstall ran_ext"
        try:
            labels = np.fromfile(SAMPLE_FOLDER / f"{batch.stem}_labels.bin", np.uint8)
            records = read_tiles(path, labels, batch.count)
        except (DatasetError, OSError) as error:
            raise DatasetError(f"{error}; {advice}") from error
        verify(str(path), records, batch.sha256, advice)
        data = cls.__new__(cls)
        data._set([records], split, transform)
        return data

    def _set(self, records: list[Records], split: str, transform: Callable[[Tensor], Any]) -> None:
        self.images = torch.cat([torch.from_numpy(part[:, 1:].copy()) for part in records]).view(-1, 3, SIDE, SIDE)
        self.labels = torch.cat([torch.from_numpy(part[:, 0].astype(np.int64)) for part in records])
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), int(self.labels[index])

    def __repr__(self) -> str:
        return f"CIFAR10(split={self.split!r}, {len(self)} images)"

    def subset(self, indices: Tensor) -> CIFAR10:
        """The images at ``indices`` (int64, or a boolean mask), as a data set of the same kind.

        >>> len(CIFAR10.sample("test").subset(torch.arange(5)))
        5
        """
        part = copy.copy(self)
        part.images, part.labels = self.images[indices], self.labels[indices]
        return part

    def to(self, device: torch.device | str) -> CIFAR10:
        """The same data set with its images and labels on ``device``.

        >>> CIFAR10.sample("test").to("cpu").labels.device
        device(type='cpu')
        """
        moved = copy.copy(self)
        moved.images, moved.labels = self.images.to(device), self.labels.to(device)
        return moved

    def mean_image(self) -> Tensor:
        """Mean of every pixel, float32 (3, 32, 32) in 0..1.

        >>> tuple(CIFAR10.sample("test").mean_image().shape)
        (3, 32, 32)
        """
        return (self.images.sum(0, dtype=torch.int64).double() / (255 * len(self))).float()

    def channel_stats(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, float32 (3, 1, 1) each, of pixels in 0..1.

        >>> mean, std = CIFAR10.sample("test").channel_stats()
        >>> tuple(mean.shape), tuple(std.shape)
        ((3, 1, 1), (3, 1, 1))
        """
        # Integer sums are exact, so the figures depend on no summation order.
        channels = self.images.unbind(1)
        histogram = torch.stack([channel.flatten().bincount(minlength=256) for channel in channels]).double()
        levels = torch.arange(256, dtype=torch.float64, device=histogram.device) / 255
        weights = histogram / histogram.sum(1, keepdim=True)
        mean = weights @ levels
        std = (weights * (levels - mean[:, None]) ** 2).sum(1).sqrt()
        return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)


def sample(split: str = "train") -> CIFAR10:
    """The embedded images; the same as :meth:`CIFAR10.sample`.

    >>> sample("test")
    CIFAR10(split='test', 512 images)
    """
    return CIFAR10.sample(split)


def split_validation(dataset: CIFAR10, count: int = 5000, seed: int = 0) -> tuple[CIFAR10, CIFAR10]:
    """Hold ``count`` images out, chosen at random and equally many of each class.

    The classes are the labels that occur. Where their number does not divide ``count``, the first ones give one more.
    Both parts keep the order of ``dataset``; the choice depends on its labels, ``count`` and ``seed`` only.

    Args:
        dataset: usually the training set.
        count: images held out, >= 0.
        seed: of the choice.

    Returns:
        The remaining training images, and the images held out.

    Raises:
        TypeError: ``dataset`` is none.
        ValueError: a class has fewer images than it would have to give.

    >>> train, validation = split_validation(sample("train"), 100, seed=0)
    >>> len(train), validation.labels.bincount().tolist()
    (1948, [10, 10, 10, 10, 10, 10, 10, 10, 10, 10])
    """
    require_images("split_validation", "dataset", dataset)
    if not 0 <= count <= len(dataset):
        raise ValueError(
            f"split_validation: count must be from 0 to {len(dataset)}, the images there are, got {count}; choose a "
            "smaller count"
        )
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(dataset), dtype=torch.bool)
    labels = dataset.labels.cpu()
    classes = labels.unique().tolist()
    for place, label in enumerate(classes):
        members = (labels == label).nonzero().flatten()
        wanted = count // len(classes) + (place < count % len(classes))
        if wanted > len(members):
            named = dataset.classes[label] if label < len(dataset.classes) else label
            raise ValueError(
                f"split_validation: holding out {count} images takes {wanted} of class {named}, which has "
                f"{len(members)}; choose a smaller count"
            )
        held_out[members[torch.randperm(len(members), generator=generator)[:wanted]]] = True
    held_out = held_out.to(dataset.labels.device)
    return dataset.subset(~held_out), dataset.subset(held_out)


def require_images(who: str, name: str, dataset: object) -> None:
    """Check that ``dataset`` is a :class:`CIFAR10`, also where its tensors were replaced by others.

    Raises:
        TypeError: it is something else; the text names the caller and the argument.

    >>> require_images("fit", "train_set", [1, 2])
    Traceback (most recent call last):
        ...
    TypeError: fit: train_set must be a ran_ext.data.CIFAR10, got list
    """
    if not isinstance(dataset, CIFAR10):
        raise TypeError(f"{who}: {name} must be a ran_ext.data.CIFAR10, got {type(dataset).__name__}")
    images, labels = dataset.images, dataset.labels
    tensors = isinstance(images, Tensor) and isinstance(labels, Tensor)
    fits = tensors and images.dtype == torch.uint8 and images.dim() == 4 and labels.dtype == torch.int64
    if not fits or labels.shape != images.shape[:1]:
        got = [f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in (images, labels)]
        raise TypeError(
            f"{who}: {name} must hold images, uint8 (N, C, H, W), and labels, int64 (N,), got {' and '.join(got)}"
        )
    if len(labels) and int(labels.min()) < 0:
        raise TypeError(f"{who}: {name} must hold labels from 0 on, got {int(labels.min())}")


def _checked(split: str, what: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"{what}: split must be 'train' or 'test', got {split!r}")
    return split
