"""Batches of any data set or loader: read by torch's ``DataLoader``, augmented and normalised on the device.

What :class:`Batches` is to images in memory, :class:`LoadedBatches` is to all others. A data set's own transforms draw
their random numbers from generators that are seeded for each item, by seed, epoch and index: the images are the same
whatever the number of workers and processes, and a run that is resumed sees what it would have seen.
"""

from __future__ import annotations

import signal
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from .augment import Augment, Normalize
from .batches import Batches
from .images import Images
from .pictures import PictureError
from .sources import is_data_set, require_batch, seeded

#: Images whose mean and deviation stand for those of a data set that is not in memory.
STATISTICS = 1000


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
        ValueError: a ``DataLoader`` would give every process the same images.
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
        if world_size > 1 and _is_undivided(data):
            raise ValueError(
                f"fit: train_set must give each of {world_size} processes its own share, got a DataLoader without a "
                "DistributedSampler; give the data set itself, or use one"
            )
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


def _is_undivided(data: Any) -> bool:
    """Whether a loader reads all of its data set in every process."""
    batches = getattr(data, "batch_sampler", None)
    return type(batches) is BatchSampler and isinstance(batches.sampler, (RandomSampler, SequentialSampler))


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
