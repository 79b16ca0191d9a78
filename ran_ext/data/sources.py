"""What ``fit`` and ``evaluate`` take for images: held in memory, any data set of (image, label), a loader of batches.

:func:`require_source` checks it once, and the rest says what it holds.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from .images import Images, require_images

#: Where images come from: held in memory, a data set of ``(image, label)``, or a loader of batches of them.
Source: TypeAlias = Images | Dataset[Any] | Iterable[Any]


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
            _require_item(who, name, first_item(data))
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
    return list(first_item(data)[0].shape) if is_data_set(data) else None


def first_item(data: Dataset[Any]) -> Any:
    """The first item of a data set, read without a change to the random generators."""
    with seeded(0):
        return data[0]


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
