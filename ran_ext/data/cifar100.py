"""CIFAR-100 in memory, of the official binary files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .formats import PIXELS, SIDE, DatasetError, require_size
from .images import Images, to_float

#: Images in the official files; a record has a coarse label, a fine label, and the pixels.
COUNTS = {"train": 50_000, "test": 10_000}
FINE, COARSE, RECORD = 100, 20, 2 + PIXELS
FOLDER, NAMES = "cifar-100-binary", "fine_label_names.txt"
SOURCE = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"


def find_cifar100(root: Path) -> Path | None:
    """The folder of the official binary files: ``root``, or its usual sub-folder; None where neither holds any."""
    places = (root / FOLDER, root)
    return next((place for place in places if (place / NAMES).is_file() and (place / "train.bin").is_file()), None)


class CIFAR100(Images):
    """CIFAR-100 (Krizhevsky 2009) with its 100 fine labels, read from the official binary files, held in memory.

    The files have no published checksums of their own, so what is checked is what they must hold: the size, labels
    from 0 to 99, as many images of each class, and five classes to a superclass.

    Args:
        root: folder that holds ``train.bin``, ``test.bin`` and ``fine_label_names.txt``, or their ``cifar-100-binary``.
        split: ``"train"`` (50,000 images) or ``"test"`` (10,000).
        transform: of one uint8 (3, 32, 32) image; by default float32 in 0..1.

    Raises:
        ValueError: ``split`` is neither of these.
        DatasetError: a file is missing, short or altered; the text names it.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html
    """

    def __init__(self, root: str | Path, split: str = "train", transform: Callable[[Tensor], Any] = to_float):
        if split not in COUNTS:
            raise ValueError(f"CIFAR100: split must be 'train' or 'test', got {split!r}")
        folder = find_cifar100(Path(root))
        if folder is None:
            raise DatasetError(f"no CIFAR-100 in {root} (looked for {FOLDER}/{NAMES}); unpack {SOURCE} there")
        path = folder / f"{split}.bin"
        try:
            names, data = (folder / NAMES).read_text().split(), path.read_bytes()
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path}: cannot be read: {error}; unpack {SOURCE} again") from error
        require_size(path, len(data), COUNTS[split] * RECORD)
        records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
        _require_labels(path, records[:, 0], records[:, 1], names)
        images = torch.from_numpy(records[:, 2:].copy()).view(-1, 3, SIDE, SIDE)
        super().__init__(images, torch.from_numpy(records[:, 1].astype(np.int64)), names, transform)


def _require_labels(path: Path, coarse: np.ndarray[Any, Any], fine: np.ndarray[Any, Any], names: list[str]) -> None:
    pairs = np.unique(np.stack([coarse, fine], 1), axis=0)
    counts = np.bincount(fine, minlength=FINE)
    superclasses = np.bincount(pairs[:, 0], minlength=COARSE)
    even = len(counts) == FINE and (counts == len(fine) // FINE).all()
    if len(names) != FINE or len(pairs) != FINE or not even or list(superclasses) != [FINE // COARSE] * COARSE:
        raise DatasetError(
            f"{path}: altered: it must hold as many images of each of {FINE} classes, {FINE // COARSE} to a "
            f"superclass, all named in {NAMES}; unpack {SOURCE} again"
        )
