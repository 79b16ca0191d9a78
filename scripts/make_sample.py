#!/usr/bin/env python3
"""Make the embedded sample (ran_ext/data/sample) from the whole CIFAR-10, and print its checksums.

    python scripts/make_sample.py data

The rule: of each split the first images of each class in the official order, kept in that order; COUNT // 10 a class,
and one more for the first COUNT % 10 classes. Atlases are lossless; their pixels and labels depend on nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ran_ext._command import Parser
from ran_ext.data import CIFAR10, CLASSES
from ran_ext.data.cifar10 import SAMPLE, SAMPLE_FOLDER

COLUMNS = 32


def first_of_each_class(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Indices, ascending, of the first images of each class, as balanced as ``count`` allows."""
    chosen = []
    for label in range(len(CLASSES)):
        wanted = count // len(CLASSES) + (label < count % len(CLASSES))
        chosen.append((labels == label).nonzero().flatten()[:wanted])
    return torch.cat(chosen).sort().values


def main(argv: Sequence[str] | None = None) -> None:
    """Write the atlases and label files, print sizes and checksums."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path, help="folder that holds CIFAR-10")
    parser.add_argument("--out", type=Path, default=SAMPLE_FOLDER)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for split, batch in SAMPLE.items():
        data = CIFAR10(args.root, split)
        data = data.subset(first_of_each_class(data.labels, batch.count))
        images, labels = data.images.numpy(), data.labels.numpy().astype(np.uint8)
        tiles = images.reshape(-1, COLUMNS, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(-1, COLUMNS * 32, 3)
        path = args.out / f"{split}.webp"
        Image.fromarray(tiles).save(path, lossless=True, quality=100, method=6)
        labels.tofile(args.out / f"{split}_labels.bin")
        records = np.concatenate([labels[:, None], images.reshape(batch.count, -1)], axis=1)
        print(f"{split}: {path.stat().st_size} bytes, sha256 {hashlib.sha256(records.tobytes()).hexdigest()}")


if __name__ == "__main__":
    main()
