"""Images of one size in memory: one uint8 tensor, their labels, their classes' names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset


def to_float(image: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in 0..1, any shape.

    >>> to_float(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([0., 1.])
    """
    return image.to(torch.float32) / 255


class Labelled(Dataset[tuple[Any, int]]):
    """A data set that knows its labels without reading its images: :class:`Images`, :class:`PictureFolder`.

    Attributes:
        labels: int64 ``(N,)``.
        classes: a name for each label.
    """

    labels: Tensor
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> Self:
        """The images at ``indices`` (int64, or a boolean mask), as a data set of the same kind."""
        raise NotImplementedError


class Images(Labelled):
    """Labelled images of one size, held in memory: what :func:`ran_ext.train.fit` augments on the device itself.

    A ``torch.utils.data.Dataset`` too: item ``i`` is ``(transform(images[i]), int(labels[i]))``.

    Args:
        images: uint8 ``(N, C, H, W)``.
        labels: int64 ``(N,)``, from 0 on.
        classes: a name for each label; by default the labels themselves, as text.
        transform: of one uint8 ``(C, H, W)`` image; by default float32 in 0..1.

    Raises:
        TypeError: ``images`` or ``labels`` is of another dtype or shape.
        ValueError: a label is negative, or has no name.

    >>> digits = Images(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 1]), ["a", "b", "c"])
    >>> digits
    Images(4 images 1x8x8, 3 classes)
    >>> image, label = digits[3]
    >>> image.dtype, tuple(image.shape), digits.classes[label]
    (torch.float32, (1, 8, 8), 'b')
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Sequence[str] | None = None,
        transform: Callable[[Tensor], Any] = to_float,
    ):
        self.images, self.labels, self.transform = images, labels, transform
        require_images("Images", "the data set", self)
        highest = int(labels.max()) if len(labels) else -1
        self.classes = [str(label) for label in range(highest + 1)] if classes is None else list(classes)
        if highest >= len(self.classes):
            raise ValueError(f"Images: classes must name each label up to {highest}, got {len(self.classes)} names")

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), int(self.labels[index])

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"{type(self).__name__}({len(self)} images {shape}, {len(self.classes)} classes)"

    def subset(self, indices: Tensor) -> Self:
        """The images at ``indices`` (int64, or a boolean mask), as a data set of the same kind.

        >>> from ran_ext.data import sample
        >>> len(sample("test").subset(torch.arange(5)))
        5
        """
        part = copy.copy(self)
        part.images, part.labels = self.images[indices], self.labels[indices]
        return part

    def to(self, device: torch.device | str) -> Self:
        """The same data set with its images and labels on ``device``.

        >>> from ran_ext.data import sample
        >>> sample("test").to("cpu").labels.device
        device(type='cpu')
        """
        moved = copy.copy(self)
        moved.images, moved.labels = self.images.to(device), self.labels.to(device)
        return moved

    def mean_image(self) -> Tensor:
        """Mean of every pixel, float32 ``(C, H, W)`` in 0..1.

        >>> from ran_ext.data import sample
        >>> tuple(sample("test").mean_image().shape)
        (3, 32, 32)
        """
        return (self.images.sum(0, dtype=torch.int64).double() / (255 * len(self))).float()

    def channel_stats(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, float32 ``(C, 1, 1)`` each, of pixels in 0..1.

        >>> from ran_ext.data import sample
        >>> mean, std = sample("test").channel_stats()
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


Split = TypeVar("Split", bound=Labelled)


def split_validation(dataset: Split, count: int = 5000, seed: int = 0) -> tuple[Split, Split]:
    """Hold ``count`` images out, chosen at random, of each class in proportion to its images.

    The classes are the labels that occur. Each gives at least one image and keeps at least one; what does not divide
    evenly goes to the classes of the largest remainders, the first ones where these are equal. Both parts keep the
    order of ``dataset``; the choice depends on its labels, ``count`` and ``seed`` only.

    Args:
        dataset: usually the training set: :class:`Images`, or :class:`PictureFolder`.
        count: images held out; 0, or at least one a class.
        seed: of the choice.

    Returns:
        The remaining training images, and the images held out.

    Raises:
        TypeError: ``dataset`` is none of these.
        ValueError: so many cannot be held out: a class has one image alone, or ``count`` is too small or too large.

    >>> from ran_ext.data import sample
    >>> train, validation = split_validation(sample("train"), 100, seed=0)
    >>> len(train), validation.labels.bincount().tolist()
    (1948, [10, 10, 10, 10, 10, 10, 10, 10, 10, 10])
    """
    if not isinstance(dataset, Labelled) or isinstance(dataset, Images):
        require_images("split_validation", "dataset", dataset)
    labels = dataset.labels.cpu()
    present, sizes = labels.unique(return_counts=True)
    most = int((sizes - 1).sum())
    if count and (sizes < 2).any():
        label = int(present[sizes < 2][0])
        name = dataset.classes[label] if label < len(dataset.classes) else label
        raise ValueError(f"split_validation: class {name} has one image, which cannot be in both parts; add another")
    if count and not len(present) <= count <= most:
        raise ValueError(
            f"split_validation: count must be 0, or from {len(present)}, one of each class, to {most}, which leaves "
            f"one of each class, got {count} of {len(dataset)} images"
        )
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(dataset), dtype=torch.bool)
    for label, wanted in zip(present.tolist(), _shares(sizes, count).tolist(), strict=True):
        members = (labels == label).nonzero().flatten()
        held_out[members[torch.randperm(len(members), generator=generator)[:wanted]]] = True
    held_out = held_out.to(dataset.labels.device)
    return dataset.subset(~held_out), dataset.subset(held_out)


def _shares(sizes: Tensor, count: int) -> Tensor:
    """``count`` in proportion to ``sizes``, each share from 1 to its size - 1; all zero where ``count`` is.

    >>> _shares(torch.tensor([50, 50, 4]), 21), _shares(torch.tensor([90, 9, 2]), 4)
    (tensor([10, 10,  1]), tensor([2, 1, 1]))
    """
    if not count:
        return torch.zeros_like(sizes)
    exact = sizes.double() * count / int(sizes.sum())
    shares = exact.floor().long().clamp(min=1).minimum(sizes - 1)
    while (rest := count - int(shares.sum())) != 0:
        step = 1 if rest > 0 else -1
        free = shares < sizes - 1 if rest > 0 else shares > 1
        gap = torch.where(free, step * (exact - shares), float("-inf"))
        first = gap.argsort(descending=True, stable=True)[: min(abs(rest), int(free.sum()))]
        shares[first] += step
    return shares


def require_images(who: str, name: str, dataset: object) -> None:
    """Check that ``dataset`` is of :class:`Images`, also where its tensors were replaced by others.

    Raises:
        TypeError: it is something else; the text names the caller and the argument.

    >>> require_images("fit", "train_set", [1, 2])
    Traceback (most recent call last):
        ...
    TypeError: fit: train_set must be ran_ext.data.Images, got list
    """
    if not isinstance(dataset, Images):
        raise TypeError(f"{who}: {name} must be ran_ext.data.Images, got {type(dataset).__name__}")
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
