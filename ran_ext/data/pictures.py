"""Pictures of any kind, converted to colour or grey images of one size for a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .._errors import one_line
from .._files import require_regular
from .formats import DatasetError

#: The greatest grey of the types that one is stored in, from the smallest on.
TOPS = (1, 2**8 - 1, 2**16 - 1)
#: Of EXIF: how the camera was held.
ORIENTATION = 0x0112


class PictureError(DatasetError):
    """A picture cannot be read, shown to this network, or drawn; one sentence that says what to do."""


def find_pictures(paths: Sequence[Path]) -> Iterator[Path]:
    """The paths, each folder replaced by the pictures in it, at any depth, by name.

    Raises:
        PictureError: a folder holds none.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found, _ = pictures_in(path)
        if not found:
            raise PictureError(f"the folder {path} holds no pictures; name another")
        yield from found


def pictures_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files in ``folder``, at any depth, that are pictures by their names, and those that are not; none hidden."""
    known = Image.registered_extensions()
    files = [path for path in sorted(folder.rglob("*")) if not path.name.startswith(".") and not path.is_dir()]
    pictures = [path for path in files if path.suffix.lower() in known]
    return pictures, [path for path in files if path.suffix.lower() not in known]


class Picture(NamedTuple):
    """A picture as a network sees it, and what was done to it.

    Attributes:
        image: upright, on white where it was transparent, of Pillow's mode RGB.
        grey: whether it had no colours.
        scaled: which greys were drawn as black and white where those are not 0 and 255.
        changes: what else was done, each in a few words.
    """

    image: Image.Image
    grey: bool
    scaled: str
    changes: tuple[str, ...]


#: Pillow's modes without colours, but for those of 16 bits, which begin with ``I;``.
GREYS = ("1", "L", "LA", "I", "F")


def is_grey(mode: str) -> bool:
    """Whether pictures of a mode of Pillow's have no colours."""
    return mode in GREYS or mode.startswith("I;")


def open_picture(path: Path) -> Picture:
    """Read a picture of any format, mode and depth that Pillow knows, whole.

    Raises:
        PictureError: there is no such file, or Pillow cannot read it.
    """
    try:
        require_regular(path)
        with Image.open(path) as file:
            mode, changes = file.mode, ["the first frame of several"] if getattr(file, "n_frames", 1) > 1 else []
            upright = ImageOps.exif_transpose(file)
            if file.getexif().get(ORIENTATION, 1) != 1:
                changes.append("turned as the camera says")
            upright, scaled = _to_bytes(upright)
            if scaled:
                changes.append("greys of more than 8 bits, scaled")
            if upright.mode in ("CMYK", "YCbCr", "HSV", "LAB"):
                changes.append(f"{upright.mode}, converted to RGB")
                upright = upright.convert("RGB")
            if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
                clear = upright.convert("RGBA")
                changes += ["transparent, on white"] if clear.getchannel("A").getextrema() != (255, 255) else []
                upright = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
            picture = upright.convert("RGB")
    except FileNotFoundError as error:
        raise PictureError(f"there is no picture {path}; name another") from error
    # Pillow's plugins raise all of these for damaged files, and the last where one would unfold to gigabytes
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise PictureError(
            f"cannot read {path} as a picture ({one_line(error)}); name one that Pillow reads"
        ) from error
    return Picture(picture, is_grey(mode), scaled, tuple(changes))


def middle_square(image: Image.Image, size: int, channels: int = 3) -> Tensor:
    """The middle square of a picture, resized: uint8 ``(channels, size, size)``, grey where ``channels`` is 1.

    >>> middle_square(Image.new("RGB", (9, 5), "white"), 4, channels=1).shape
    torch.Size([1, 4, 4])
    """
    square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return as_tensor(square, channels)


def as_tensor(image: Image.Image, channels: int) -> Tensor:
    """A picture of mode RGB as uint8 ``(channels, H, W)``."""
    pixels = np.array(image.convert("L") if channels == 1 else image)
    return torch.from_numpy(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def read_picture(path: Path, size: int, channels: int = 3) -> tuple[Tensor, str]:
    """The middle square of a picture, upright, on white where it is transparent.

    Returns:
        uint8 ``(channels, size, size)``, and which greys were drawn as black and white where those are not 0 and 255.

    Raises:
        PictureError: there is no such file, or Pillow cannot read it.
    """
    picture = open_picture(path)
    return middle_square(picture.image, size, channels), picture.scaled


def _to_bytes(image: Image.Image) -> tuple[Image.Image, str]:
    """Greys of more than 8 bits as 8, and from where to where they reached; other pictures as they are.

    Pillow itself would clip at 8 bits. White is the maximum of the integer type; for floats it is that of the smallest
    type that holds the picture's values, if they start at 0, else they are stretched from minimum to maximum.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image, ""
    greys = np.asarray(image).astype(np.float64)
    if not np.isfinite(greys).all():
        raise ValueError("it holds NaN or infinite greys")
    low, high = float(greys.min()), float(greys.max())
    tops = TOPS[2:] if image.mode.startswith("I;16") else TOPS[1:] if image.mode != "F" else TOPS
    black, white = next(((0.0, float(top)) for top in tops if low >= 0 and high <= top), (low, high))
    share = (greys - black) / ((white - black) or 1.0)
    return Image.fromarray(np.round(255 * share).astype(np.uint8)), f"greys {black:g} to {white:g} as black to white"
