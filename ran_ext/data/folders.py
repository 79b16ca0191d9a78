"""Folders of class folders with pictures, by the convention of torchvision's ``ImageFolder`` and of fastai.

``DIR/train/cat/1.jpg``, ``DIR/val/cat/2.jpg`` (or ``valid``, ``validation``), ``DIR/test/cat/3.jpg``; or
``DIR/cat/1.jpg`` alone. Every picture is looked at before training begins, and what is wrong with one is said in a
sentence.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .._files import require_regular
from .cifar10 import CIFAR10
from .cifar100 import CIFAR100, find_cifar100
from .formats import SPLITS, DatasetError, find_layout
from .images import Images, Labelled
from .pictures import PictureError, as_tensor, is_grey, middle_square, open_picture, pictures_in

#: The names of the parts' folders.
PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
#: Side of pictures whose size is not asked for, where their own is not one of at most this.
DEFAULT_SIZE = 224
#: Up to this side, and so many bytes in all, pictures are held in memory and augmented on the device.
MEMORY_SIZE, MEMORY_BYTES = 64, 2**31
#: So many pictures are read whole before training; of more, it takes ``skip_broken``, else what is broken shows later.
CHECKED = 50_000


class PictureFolder(Labelled):
    """Pictures in files with their labels; item ``i`` is ``(image, label)``, the image read when it is asked for.

    Args:
        paths: of the pictures.
        labels: int64 ``(N,)``, from 0 on.
        classes: a name for each label.
        size: side of the square that the middle of each picture is resized to.
        channels: 3 for colour, 1 for grey.
        transform: of the whole picture (Pillow's, of mode RGB), to an image tensor; by default the middle square.

    Images are uint8 ``(channels, size, size)``.

    Raises (when an item is read):
        PictureError: the picture cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        classes: Sequence[str],
        size: int,
        channels: int = 3,
        transform: Callable[[Image.Image], Tensor] | None = None,
    ):
        self.paths, self.labels, self.classes = list(paths), labels, list(classes)
        self.size, self.channels, self.transform = size, channels, transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = open_picture(self.paths[index]).image
        image = middle_square(picture, self.size, self.channels) if self.transform is None else self.transform(picture)
        return image, int(self.labels[index])

    def __repr__(self) -> str:
        return (
            f"PictureFolder({len(self)} pictures {self.channels}x{self.size}x{self.size}, {len(self.classes)} classes)"
        )

    def subset(self, indices: Tensor) -> Self:
        """The pictures at ``indices`` (int64, or a boolean mask), as a data set of the same kind."""
        part = copy.copy(self)
        chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        part.paths, part.labels = [self.paths[index] for index in chosen.tolist()], self.labels[chosen]
        return part

    def cropped(self) -> Self:
        """The same pictures, of each a random part, resized, and mirrored as often as not.

        By torchvision's ``RandomResizedCrop`` (35 to 100 % of the area) and ``RandomHorizontalFlip``.

        Raises:
            ValueError: torchvision is not installed.
        """
        try:
            from torchvision.transforms import v2
        except ImportError as error:
            raise ValueError(
                "augment 'crop' needs torchvision: pip install 'ran_ext[images]', or choose augment 'light' or 'none'"
            ) from error
        crop = v2.Compose([v2.RandomResizedCrop(self.size, scale=(0.35, 1.0)), v2.RandomHorizontalFlip()])
        other = copy.copy(self)
        other.transform = _Cropped(crop, self.channels)
        return other

    def in_memory(self) -> Images:
        """The same images, held in memory."""
        images = torch.stack([self[index][0] for index in range(len(self))])
        return Images(images, self.labels, self.classes)


@dataclasses.dataclass(frozen=True)
class _Cropped:  # not a function: workers are sent it
    crop: Callable[[Image.Image], Image.Image]
    channels: int

    def __call__(self, picture: Image.Image) -> Tensor:
        return as_tensor(self.crop(picture), self.channels)


@dataclasses.dataclass(frozen=True)
class Found:
    """What :func:`open_data` found.

    Attributes:
        train: the training images.
        val, test: those of parts of their own; None where there are none.
        remarks: what is to be known of the pictures, a sentence each.
        skipped: what was left out, and why.
        pictures: whether they are pictures in files.
    """

    train: Labelled
    val: Labelled | None
    test: Labelled | None
    remarks: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    pictures: bool = False


def open_data(root: str | Path, size: int | None = None, skip_broken: bool = False) -> Found:
    """The images of a folder: CIFAR-10, CIFAR-100, or class folders with pictures, held in memory up to 64 pixels.

    Args:
        root: the folder.
        size: side of the images that pictures in files are resized to; None for the pictures' own where all are squares
            of one size up to 224, else 224.
        skip_broken: leave out pictures that cannot be read, instead of refusing the folder.

    Raises:
        DatasetError: it holds none of them, or not all of it can be read.
        ValueError: ``size`` or ``skip_broken`` is given, and the folder holds no pictures in files.
    """
    root = Path(root)
    if is_folder_of_classes(root):
        return _in_memory_where_small(open_folder(root, size, skip_broken))
    if size or skip_broken:
        raise ValueError(
            f"--image-size and --skip-broken are for folders of class folders with pictures; {root} is none"
        )
    kind = CIFAR100 if find_cifar100(root) else CIFAR10
    try:
        return Found(kind(root, "train"), None, kind(root, "test"))
    except DatasetError as error:
        if kind is CIFAR10 and not _has_cifar10(root):
            raise DatasetError(f"{error}; or give a folder of class folders with pictures") from error
        raise


def _in_memory_where_small(found: Found) -> Found:
    parts = {name: part for name in PARTS if isinstance(part := getattr(found, name), PictureFolder)}
    size, channels = parts["train"].size, parts["train"].channels
    if size > MEMORY_SIZE or sum(map(len, parts.values())) * channels * size * size > MEMORY_BYTES:
        return found
    held: dict[str, Any] = {name: part.in_memory() for name, part in parts.items()}
    return dataclasses.replace(found, **held)


def _has_cifar10(root: Path) -> bool:
    """Whether one of its layouts has all its files there."""
    try:
        return bool(find_layout(root, SPLITS["train"], ""))
    except DatasetError:
        return False


class _Facts(NamedTuple):
    size: tuple[int, int]
    grey: bool
    changes: tuple[str, ...]
    fault: str


def is_folder_of_classes(root: Path) -> bool:
    """Whether ``root`` holds class folders with pictures, or parts that do."""
    if _has_cifar10(root):  # one of its layouts has pictures in a folder
        return False
    return any(pictures_in(folder)[0] for part in _parts(root).values() for folder in _folders(part))


def open_folder(
    root: Path,
    size: int | None = None,
    skip_broken: bool = False,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
) -> Found:
    """The pictures of a folder of class folders, in files, each looked at.

    Args:
        root: holds ``train`` and, as they are there, ``val`` and ``test``; or the class folders themselves.
        size: side of the images; None for the pictures' own where all are squares of one size up to 224, else 224.
        skip_broken: leave out what cannot be read and classes without pictures, instead of refusing the folder.
        channels: 3 for colour, 1 for grey; None for grey where every picture is.
        classes: those of a trained network, in its order; None for the folders' names.

    Raises:
        PictureError: there is one class alone, a part has a class that the training pictures have not, or (without
            ``skip_broken``) a picture cannot be read or a class has none; the text names them.
    """
    parts = _parts(root)
    if "train" not in parts:
        raise PictureError(f"{root} has no folder 'train' beside {', '.join(path.name for path in parts.values())}")
    folders = [folder.name for folder in _folders(parts["train"])]
    if classes is not None and (unknown := [name for name in folders if name not in classes]):
        raise PictureError(f"{root} has a class {unknown[0]}, and the network knows {', '.join(classes)}; rename it")
    listed, others = _listed(parts, folders)
    facts = _look_at([path for pairs in listed.values() for path, _ in pairs], skip_broken)
    broken = {path: fact.fault for path, fact in facts.items() if fact.fault}
    if broken and not skip_broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise PictureError(f"{next(iter(broken.values()))}{more}, or leave broken ones out by --skip-broken")
    kept = {part: [pair for pair in pairs if pair[0] not in broken] for part, pairs in listed.items()}
    there = {part: {name for _, name in pairs} for part, pairs in kept.items()}
    empty = [name for name in folders if name not in there["train"]]
    if empty and not skip_broken:
        raise PictureError(f"class {empty[0]} has no pictures in {parts['train']}; add some, or use --skip-broken")
    kept = {part: [pair for pair in pairs if pair[1] not in empty] for part, pairs in kept.items()}
    full = [name for name in folders if name not in empty]
    if classes is None and len(full) < 2:
        raise PictureError(f"{root} has {len(full)} class ({', '.join(full)}); a network learns to tell two or more")
    remarks = [f"no pictures by their names, so left alone: {_some(others)}"] if others else []
    for part in [part for part in ("val", "test") if part in parts]:
        if not kept[part]:
            raise PictureError(f"{parts[part]} holds no pictures; add some, or remove it")
        if missing := [name for name in full if name not in there[part]]:
            remarks.append(f"{parts[part]} has no pictures of {_some(missing)}: its figures say nothing of them")
    seen = {path: facts[path] for pairs in kept.values() for path, _ in pairs}
    for change, count in Counter(change for fact in seen.values() for change in fact.changes).items():
        named = [path for path, fact in seen.items() if change in fact.changes]
        remarks.append(f"{count} {'picture' if count == 1 else 'pictures'}: {change}: {_some(named)}")
    side, own_channels, said = _form(list(seen.values()), size)
    names, depth = list(classes or full), channels or own_channels
    made = {part: _folder(pairs, names, side, depth) for part, pairs in kept.items()}
    skipped = (*broken.values(), *(f"class {name} has no pictures in {parts['train']}" for name in empty))
    return Found(made["train"], made.get("val"), made.get("test"), (*said, *remarks), skipped, True)


def _listed(parts: dict[str, Path], classes: Sequence[str]) -> tuple[dict[str, list[tuple[Path, str]]], list[Path]]:
    """The pictures of each part with their classes' names, and the files that are no pictures by theirs."""
    listed: dict[str, list[tuple[Path, str]]] = {part: [] for part in parts}
    others: list[Path] = []
    for part, place in parts.items():
        for folder in _folders(place):
            if folder.name not in classes:
                raise PictureError(f"{place} has a class {folder.name}, which {parts['train']} has not; rename it")
            pictures, rest = pictures_in(folder)
            listed[part] += [(path, folder.name) for path in pictures]
            others += rest
    return listed, others


def _parts(root: Path) -> dict[str, Path]:
    """The folder of each part, in capitals or not; ``root`` itself where it has no parts."""
    found: dict[str, Path] = {}
    for folder in _folders(root):
        for part, names in PARTS.items():
            if folder.name.lower() in names and _folders(folder):
                found.setdefault(part, folder)
    return found or {"train": root}


def _folders(root: Path) -> list[Path]:
    """The folders in ``root`` by name, without hidden ones; none where it is no folder."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _look_at(paths: Sequence[Path], every: bool) -> dict[Path, _Facts]:
    """The facts of each picture, read whole where there are not too many or where ``every`` one must be."""
    whole = every or len(paths) <= CHECKED

    def look(path: Path) -> _Facts:
        try:
            if whole:
                picture = open_picture(path)
                return _Facts(picture.image.size, picture.grey, picture.changes, "")
            require_regular(path)
            with Image.open(path) as file:
                return _Facts(file.size, is_grey(file.mode), (), "")
        except (PictureError, OSError) as error:
            return _Facts((0, 0), False, (), str(error))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        seen = tqdm(threads.map(look, paths), "look at pictures", len(paths), disable=None, leave=False)
        return dict(zip(paths, seen, strict=True))


def _form(facts: Sequence[_Facts], size: int | None) -> tuple[int, int, list[str]]:
    """The images' side and channels, and what is to be said of pictures that are of several sizes or modes."""
    remarks = []
    sizes, greys = {fact.size for fact in facts}, sum(fact.grey for fact in facts)
    own = next(iter(sizes)) if len(sizes) == 1 else None
    side = size or (own[0] if own and own[0] == own[1] <= DEFAULT_SIZE else DEFAULT_SIZE)
    if own != (side, side):
        least, most = (edge(min(fact.size) for fact in facts) for edge in (min, max))
        were = (
            f"{own[0]}x{own[1]} pixels" if own else f"of {len(sizes)} sizes, shorter sides of {least} to {most} pixels"
        )
        remarks.append(f"the pictures are {were}: of each, the middle square is resized to {side} pixels")
    if 0 < greys < len(facts):
        remarks.append(f"{greys} of {len(facts)} pictures are grey: they are taken as colour pictures")
    return side, 1 if greys == len(facts) else 3, remarks


def _folder(pairs: Sequence[tuple[Path, str]], classes: list[str], size: int, channels: int) -> PictureFolder:
    number = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([number[name] for _, name in pairs], dtype=torch.int64)
    return PictureFolder([path for path, _ in pairs], labels, classes, size, channels)


def _some(things: Sequence[Any], most: int = 3) -> str:
    """The first things, and how many more there are."""
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return ", ".join(map(str, things[:most])) + more
