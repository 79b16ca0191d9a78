"""CIFAR-10 in memory, of verified files or of the package's own sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
from .images import Images, to_float

SAMPLE_FOLDER = Path(__file__).parent / "sample"
#: The embedded images, as batches of their own; scripts/make_sample.py made them and prints these checksums.
SAMPLE: dict[str, Batch] = {
    "train": Batch("train", 0, 2048, "ed4897f4635f22339e235c5f3a7221684aaf330bb4e2d90e01f5b7427f4458ae"),
    "test": Batch("test", 0, 512, "aff4293f7435b4d5c3bbae62dd5fa46a07801e483f002df1e97127d3fc3051c7"),
}


class CIFAR10(Images):
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

    def __repr__(self) -> str:
        return f"CIFAR10(split={self.split!r}, {len(self)} images)"


def sample(split: str = "train") -> CIFAR10:
    """The embedded images; the same as :meth:`CIFAR10.sample`.

    >>> sample("test")
    CIFAR10(split='test', 512 images)
    """
    return CIFAR10.sample(split)


def _checked(split: str, what: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"{what}: split must be 'train' or 'test', got {split!r}")
    return split
