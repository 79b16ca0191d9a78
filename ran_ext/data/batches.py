"""Batches straight from a data set that lives on the device: no workers, no copies, every epoch determined."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .augment import Augment
from .images import Images, require_images, to_float

#: Distance of the seeds of two epochs: 2^32 / golden ratio. The CPU generator uses the low 32 bits of a seed, in which
#: this odd number repeats after 2^32 epochs only, and which it spreads so that nearby seeds share no epochs.
EPOCH_STRIDE = 0x9E3779B9


class Batches:
    """The batches of one epoch, on the device; iterate again for the next epoch.

    Order and augmentation are determined by the seed and the epoch's number alone, so a resumed run sees the same
    batches bit for bit, on any device: both are drawn on the CPU, once an epoch. Each iteration moves to the next
    epoch; ``set_epoch`` chooses one, and where to begin in it.

    With ``world_size`` processes, ``batch_size`` is that of the joint batch, and rank ``r`` gets its consecutive share
    of it (shares differ by at most one image), augmented as one process would do it.

    Args:
        dataset: its ``images`` and ``labels`` are moved to ``device`` once.
        batch_size: images in a joint batch.
        augment: :class:`Augment`, :class:`Normalize`, or any function of a uint8 (N, C, H, W) batch; moved to
            the batches' device if it is a module. None gives float32 in 0..1.
        shuffle: a new random order each epoch; otherwise the data set's order.
        generator: its ``initial_seed()`` is the seed (its state is neither read nor changed); by default that of
            ``torch.manual_seed``.
        drop_last: leave a last, smaller batch out.
        device: of the batches; by default the data set's.
        rank, world_size: of this process among those that share each batch.

    Each batch is a pair: images, as ``augment`` returns them, and labels, int64 (N,).

    Raises:
        TypeError: ``dataset`` is none.
        ValueError: ``batch_size``, ``rank`` or ``world_size`` is out of its range, a last batch has fewer images than
            there are processes, or ``drop_last`` leaves none.

    >>> from ran_ext.data import sample
    >>> batches = Batches(sample("test"), 200, generator=torch.Generator().manual_seed(1))
    >>> [len(labels) for images, labels in batches]
    [200, 200, 112]
    >>> batches.epoch, len(batches)
    (1, 3)
    """

    def __init__(
        self,
        dataset: Images,
        batch_size: int,
        augment: Callable[[Tensor], Tensor] | None = None,
        shuffle: bool = True,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        device: torch.device | str | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        require_images("Batches", "dataset", dataset)
        if batch_size < 1:
            raise ValueError(f"Batches: batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"Batches: rank must be from 0 to world_size - 1, got {rank} of {world_size}")
        #: Of all batches.
        self.highest_label = int(dataset.labels.max()) if len(dataset) else 0
        self.images, self.labels = dataset.images.to(device), dataset.labels.to(device)
        self.augment = augment or to_float
        if isinstance(self.augment, torch.nn.Module):
            self.augment.to(self.images.device)
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self.seed = torch.initial_seed() if generator is None else generator.initial_seed()
        self.epoch = self.first_batch = 0
        if drop_last and len(self) == 0:
            raise ValueError(
                f"Batches: drop_last=True leaves no batch of {batch_size} from {len(dataset)} images; choose a smaller "
                "batch_size"
            )
        smallest = batch_size if drop_last else len(dataset) % batch_size or batch_size
        if smallest < world_size:
            raise ValueError(
                f"Batches: every process needs an image of every batch, got a batch of {smallest} for {world_size} "
                "processes; choose drop_last=True or another batch_size"
            )

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self.labels) // self.batch_size if self.drop_last else -(-len(self.labels) // self.batch_size)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """The next iteration gives epoch ``epoch`` (>= 0) from its batch ``first_batch`` on.

        >>> from ran_ext.data import sample
        >>> batches = Batches(sample("test"), 200)
        >>> whole = [labels for images, labels in batches]
        >>> batches.set_epoch(0, first_batch=2)
        >>> [torch.equal(labels, whole[2]) for images, labels in batches]
        [True]
        """
        if epoch < 0 or not 0 <= first_batch <= len(self):
            raise ValueError(
                f"Batches: set_epoch needs epoch >= 0 and first_batch from 0 to {len(self)}, got {epoch} and "
                f"{first_batch}"
            )
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices, draws in self.plan():
            yield self.load(indices, draws)

    def plan(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What the batches of one epoch are made of, for :meth:`load`; iterates as the object itself does.

        Yields:
            the images' indices, int64 (N,), and the augmentation's draws, float32 (8, N), on the device.
        """
        order, draws = self._epoch_plan(self.epoch)
        first, self.first_batch = self.first_batch, 0
        self.epoch += 1
        for batch in range(first, len(self)):
            mine = self._share(batch)
            yield order[mine], draws[:, mine]

    def load(self, indices: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The batch that :meth:`plan` means; it never waits for a CUDA device, so a CUDA graph can capture it."""
        images, labels = self.images[indices], self.labels[indices]
        if isinstance(self.augment, Augment):
            return self.augment(images, draws=draws), labels
        return self.augment(images), labels

    def _epoch_plan(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The epoch's order, (N,), and its augmentation's draws in that order, (8, N)."""
        count, device = len(self.labels), self.labels.device
        generator = torch.Generator().manual_seed((self.seed + epoch * EPOCH_STRIDE) % 2**64)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        return order.to(device), Augment.draw(count, generator).to(device)

    def _share(self, batch: int) -> slice:
        start = batch * self.batch_size
        size = min(self.batch_size, len(self.labels) - start)
        return slice(start + self.rank * size // self.world_size, start + (self.rank + 1) * size // self.world_size)
