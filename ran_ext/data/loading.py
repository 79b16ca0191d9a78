"""Batches of any data set or loader: read by torch's ``DataLoader``, augmented and normalised on the device.

What :class:`Batches` is to images in memory, :class:`LoadedBatches` is to all others. A data set's own transforms draw
their random numbers from generators that are seeded for each item, by seed, epoch and index: the images are the same
whatever the number of workers and processes, and a run that is resumed sees what it would have seen.
"""

from __future__ import annotations

import random
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    TensorDataset,
    default_collate,
)

from .augment import Augment, Normalize
from .batches import Batches
from .images import Images, require_images
from .pictures import PictureError

#: Where images come from: held in memory, a data set of ``(image, label)``, or a loader of batches of them.
Source: TypeAlias = Images | Dataset[Any] | Iterable[Any]
#: Images whose mean and deviation stand for those of a data set that is not in memory.
STATISTICS = 1000


def require_source(who: str, name: str, data: Any) -> Source:
    """``data``, checked; a ``TensorDataset`` of uint8 images and int64 labels as :class:`Images`.

    Raises:
        TypeError: it is no source of images; the text names the caller and the argument.

    >>> require_source("fit", "train_set", TensorDataset(torch.zeros(2, 1, 4, 4).byte(), torch.tensor([0, 1])))
    Images(2 images 1x4x4, 2 classes)
    >>> require_source("fit", "train_set", 3)
    Traceback (most recent call last):
        ...
    TypeError: fit: train_set must be a data set or a loader of (image, label), got int
    """
    if isinstance(data, Images):
        require_images(who, name, data)
        return data
    if isinstance(data, TensorDataset) and len(data.tensors) == 2:
        images, labels = data.tensors
        if images.dtype == torch.uint8 and images.dim() == 4 and labels.dtype == torch.int64 and labels.dim() == 1:
            return Images(images, labels)
    if is_data_set(data):
        if not hasattr(data, "__len__"):
            raise TypeError(f"{who}: {name} must have a length, got a {type(data).__name__} without __len__")
        if len(data):
            _require_item(who, name, data[0])
        return data
    kind = type(data).__name__
    if isinstance(data, IterableDataset):
        raise TypeError(f"{who}: {name} must be a DataLoader over what is read in order, got the {kind} itself")
    if not isinstance(data, Iterable):
        raise TypeError(f"{who}: {name} must be a data set or a loader of (image, label), got {kind}")
    try:
        len(data)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(
            f"{who}: {name} must know how many batches it has, got a {kind} without a length (webdataset: with_length)"
        ) from error
    return data


def is_data_set(data: Any) -> bool:
    """Whether ``data`` gives images by their index; what does not, and is no :class:`Images`, is a loader."""
    return isinstance(data, Dataset) and not isinstance(data, IterableDataset)


def count_images(data: Any, batch_size: int) -> int:
    """Images of a source; where only its batches are known, that many whole ones."""
    images: Any = data.dataset if isinstance(data, DataLoader) and data.batch_sampler is not None else data
    return len(images) * (1 if isinstance(images, Dataset) else batch_size)


def count_batches(data: Any, batch_size: int) -> int:
    """Batches of an epoch: a loader's own, or whole ones of ``batch_size``."""
    inside = isinstance(data, Images) or is_data_set(data)
    return len(data) // batch_size if inside else len(data)


def image_shape(data: Any) -> list[int] | None:
    """``(C, H, W)`` of a source's first image; None of a loader."""
    if isinstance(data, Images):
        return list(data.images.shape[1:])
    return list(data[0][0].shape) if is_data_set(data) else None


def class_names(data: object) -> list[str] | None:
    """``data.classes``, by torchvision's convention; of a ``Subset`` or a loader, those of what it reads."""
    while data is not None:
        classes = getattr(data, "classes", None)
        if isinstance(classes, (list, tuple)) and classes and all(isinstance(name, str) for name in classes):
            return list(classes)
        data = getattr(data, "dataset", None)
    return None


def _require_item(who: str, name: str, item: Any) -> None:
    pair = isinstance(item, (tuple, list)) and len(item) == 2
    if not pair or not isinstance(item[0], Tensor) or item[0].dim() != 3:
        got = f"({', '.join(_kind(part) for part in item)})" if isinstance(item, (tuple, list)) else _kind(item)
        raise TypeError(
            f"{who}: {name} must give (image, label) with an image (C, H, W), uint8 or floating, got {got}; "
            "pictures of Pillow need a transform that makes tensors"
        )
    require_batch(who, name, default_collate([item]))


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def require_batch(who: str, name: str, batch: Any) -> tuple[Tensor, Tensor]:
    """A loader's batch as images and int64 labels.

    Raises:
        TypeError: it is no pair of images ``(N, C, H, W)``, uint8 or floating, and whole labels ``(N,)``.
        ValueError: a label is negative, or there is no image.
    """
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    images: Any
    labels: Any
    images, labels = batch if pair else (None, None)
    fits = isinstance(images, Tensor) and isinstance(labels, Tensor) and images.dim() == 4
    if not fits or not (images.dtype == torch.uint8 or images.is_floating_point()) or labels.shape != images.shape[:1]:
        got = ", ".join(map(_kind, batch)) if isinstance(batch, (tuple, list)) else _kind(batch)
        raise TypeError(
            f"{who}: {name} must give images (N, C, H, W), uint8 or floating, and labels (N,), got {got or 'nothing'}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{who}: {name} must give whole numbers as labels, got {labels.dtype}")
    if not len(labels) or int(labels.min()) < 0:
        got = str(int(labels.min())) if len(labels) else "an empty batch"
        raise ValueError(f"{who}: {name} must give labels from 0 on, got {got}")
    return images, labels.long()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The generators that transforms draw from (torch's, Python's, NumPy's) start at ``seed``, and are put back.

    >>> with seeded(3):
    ...     first = torch.rand(1)
    >>> with seeded(3):
    ...     bool(first == torch.rand(1))
    True
    """
    cpu, python, numpy = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds the GPUs too
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)


def mixed(*numbers: int) -> int:
    """A seed of 32 bits, all that the CPU's generator uses, that differs wherever one of ``numbers`` does.

    >>> mixed(0, 1, 2) == mixed(0, 1, 2), mixed(0, 1, 2) == mixed(0, 2, 1)
    (True, False)
    """
    return zlib.crc32(" ".join(map(str, numbers)).encode())


class SeededItems(Dataset[Any]):
    """The items of ``dataset`` by ``(index, seed)``; each is read with the generators at its seed."""

    def __init__(self, dataset: Dataset[Any]):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        with seeded(seed):
            return self.dataset[index]


def leave_interrupts(worker: int) -> None:
    """Ctrl-C reaches the workers too: the run decides what it means, and reads on to the end of its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class EpochOrder(Sampler[list[tuple[int, int]]]):
    """The batches of one process in one epoch, as :class:`SeededItems` takes them; whole batches alone."""

    def __init__(self, dataset: Dataset[Any], batch_size: int, seed: int, rank: int, world_size: int):
        self.order = DistributedSampler[Any](dataset, world_size, rank, True, mixed(seed), drop_last=True)
        self.batch_size, self.seed, self.first_batch = batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.order) // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, size = self.order.epoch, self.batch_size
        keys = [(index, mixed(self.seed, epoch, index)) for index in self.order]
        for batch in range(self.first_batch, len(self)):
            yield keys[batch * size : (batch + 1) * size]


class LoadedBatches:
    """The batches of a data set or a loader, epoch after epoch, on the device; what :class:`Batches` is in memory.

    Of a data set, order, transforms and augmentation are determined by the seed and the epoch's number alone, for any
    number of workers and processes, as long as its transforms draw from the generators of :func:`seeded`. A loader has
    its own order: it is told the epoch where its sampler has ``set_epoch``, and an epoch that is taken up in its middle
    begins with the loader's first batches left out.

    Args:
        data: a ``Dataset`` of ``(image, label)``, or a loader of ``(images, labels)``, with a length.
        batch_size: images in a joint batch, of all processes together.
        augment: of uint8 batches: :class:`Augment`, :class:`Normalize`, or a function; floating ones are taken as they
            are.
        seed: of order, transforms and augmentation.
        device: of the batches.
        rank, world_size: of this process among those that share each batch. A loader must give each its own share.
        workers: processes that read a data set; 0 reads in this one.
        memory_format: of floating images.

    Raises:
        ValueError (while iterating): a batch or a label does not fit, or the loader ends early.
        TypeError (while iterating): a batch is no pair of images and labels.

    >>> from ran_ext.data import Normalize, sample
    >>> batches = LoadedBatches(sample("test"), 128, Normalize((0.5, 0.5, 0.5)), seed=0)
    >>> [tuple(images.shape) for images, labels in batches]
    [(128, 3, 32, 32), (128, 3, 32, 32), (128, 3, 32, 32), (128, 3, 32, 32)]
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        augment: Callable[[Tensor], Tensor] | None,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.device, self.augment, self.memory_format = torch.device(device), augment, memory_format
        if isinstance(augment, torch.nn.Module):
            augment.to(self.device)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.share = batch_size // world_size
        self.order: EpochOrder | None = None
        #: Of the batches so far.
        self.highest_label = 0
        self.loader: Any = data
        if is_data_set(data):
            self.order = EpochOrder(self.loader, self.share, seed, rank, world_size)
            self.loader = DataLoader(
                SeededItems(self.loader),
                batch_sampler=self.order,
                num_workers=workers,
                pin_memory=self.device.type == "cuda",
                persistent_workers=workers > 0,
                generator=torch.Generator(),  # the default one is dropout's
                worker_init_fn=leave_interrupts,
            )
        self.epoch = self.first_batch = 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self.loader if self.order is None else self.order)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """The next iteration gives epoch ``epoch`` (>= 0) from its batch ``first_batch`` on."""
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for parts in self.plan():
            yield self.load(*parts)

    def plan(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches as they are read, on the device, for :meth:`load`.

        Yields:
            images ``(N, C, H, W)``, labels, int64 ``(N,)``, and the augmentation's draws, float32 ``(8, N)``.
        """
        epoch, first = self.epoch, self.first_batch
        self.epoch, self.first_batch = epoch + 1, 0
        steps, batch = len(self), first
        for given in islice(self._read(epoch, first), steps - first):
            images, labels = require_batch("fit", "train_set", given)
            self.highest_label = max(self.highest_label, int(labels.max()))
            if len(images) != self.share and batch < steps - 1:
                raise ValueError(
                    f"fit: train_set must give batches of {self.share} images (config.batch_size {self.batch_size} "
                    f"over {self.world_size} processes), got {len(images)}"
                )
            generator = torch.Generator().manual_seed(mixed(self.seed, epoch, batch, -1))
            draws = Augment.draw(len(images) * self.world_size, generator)[:, self.rank :: self.world_size]
            yield tuple(part.to(self.device, non_blocking=True) for part in (images, labels, draws))  # type: ignore[misc]
            batch += 1
        if batch < steps:
            raise ValueError(f"fit: train_set must give the {steps} batches that its length says, got {batch}")

    def _read(self, epoch: int, first: int) -> Iterator[Any]:
        if self.order is not None:
            self.order.order.set_epoch(epoch)
            self.order.first_batch = first
            return told(iter(self.loader))
        for sampler in (getattr(self.loader, name, None) for name in ("sampler", "batch_sampler")):
            getattr(sampler, "set_epoch", lambda epoch: None)(epoch)
        return islice(told(iter(self.loader)), first, None)

    def load(self, images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The batch that :meth:`plan` read, augmented and normalised; it never waits for a CUDA device."""
        if images.dtype != torch.uint8:
            return images.float().contiguous(memory_format=self.memory_format), labels
        if isinstance(self.augment, Augment):
            return self.augment(images, draws=draws), labels
        assert self.augment is not None
        return self.augment(images), labels


def told(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches; a picture that a worker could not read is named in a sentence, not in the worker's traceback."""
    try:
        yield from batches
    except PictureError as error:
        raise PictureError(str(error).strip().splitlines()[-1].partition("PictureError: ")[2] or str(error)) from None


def evaluation_batches(
    who: str,
    data: Any,
    batch_size: int,
    normalize: Normalize | None,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """A source's images once, in order: this process's share.

    Args:
        who: the caller, for errors.
        data: of images; a loader must give each process its own share.
        batch_size: images at a time; a loader has its own.
        normalize: of uint8 images; floating ones are taken as they are.
        device: of the batches.
        rank, world_size: of this process.
        workers: processes that read a data set.

    Yields:
        images as the network takes them, int64 labels, both on the device, and the greatest label.
    """
    if isinstance(data, Images):
        mine = data.subset(torch.arange(rank, len(data), world_size)) if world_size > 1 else data
        highest = int(data.labels.max()) if len(data) else 0
        for images, labels in Batches(mine, batch_size, normalize, shuffle=False, device=device):
            yield images, labels, highest
        return
    loader: Any = data
    if is_data_set(data):
        keys = [(index, mixed(0, index)) for index in range(rank, len(loader), world_size)]
        loader = DataLoader(
            SeededItems(loader),
            batch_sampler=[keys[first : first + batch_size] for first in range(0, len(keys), batch_size)],
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
            worker_init_fn=leave_interrupts,
        )
    for given in told(iter(loader)):
        images, labels = require_batch(who, "the data set", given)
        highest = int(labels.max())
        images = images.to(device, non_blocking=True)
        if images.dtype == torch.uint8:
            if normalize is None:
                raise ValueError(f"{who}: uint8 images need normalize, got None")
            images = normalize.to(device)(images)
        elif normalize is not None:
            images = images.float().contiguous(memory_format=normalize.memory_format)
        yield images, labels.to(device, non_blocking=True), highest


def some_images(data: Any, most: int = STATISTICS, workers: int = 0) -> Images | None:
    """Images of a source, for its mean and deviation: up to ``most``, evenly spread over a data set, a loader's first.

    Returns:
        them; None where the source gives floating images, which it has normalised itself.

    Raises:
        ValueError: they are of several sizes.
    """
    if isinstance(data, Images):
        return data
    loader: Any = data
    if is_data_set(data):
        count = len(loader)
        wanted = sorted({index * count // most for index in range(most)}) if count > most else range(count)
        keys = [[(index, mixed(0, index))] for index in wanted]
        loader = DataLoader(SeededItems(loader), batch_sampler=keys, num_workers=workers, generator=torch.Generator())
    kept: list[tuple[Tensor, Tensor]] = []
    for given in told(iter(loader)):
        images, labels = require_batch("fit", "train_set", given)
        if images.dtype != torch.uint8:
            return None
        if kept and images.shape[1:] != kept[0][0].shape[1:]:
            shapes = f"{list(kept[0][0].shape[1:])} and {list(images.shape[1:])}"
            raise ValueError(f"fit: train_set must give images of one size, got {shapes}; resize them in its transform")
        kept.append((images, labels))
        if sum(len(images) for images, _ in kept) >= most:
            break
    if not kept:
        raise ValueError("fit: train_set must hold images, got none")
    return Images(torch.cat([images for images, _ in kept]), torch.cat([labels for _, labels in kept]))
