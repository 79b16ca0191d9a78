"""Pictures of any kind, converted to small colour images for a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .._errors import one_line
from .._files import require_regular

#: The greatest grey of the types that one is stored in, from the smallest on.
TOPS = (1, 2**8 - 1, 2**16 - 1)


class PictureError(Exception):
    """A picture cannot be read, shown to this network, or drawn; one sentence that says what to do."""


def find_pictures(paths: Sequence[Path]) -> Iterator[Path]:
    """The paths, each folder replaced by the pictures in it, by name.

    Raises:
        PictureError: a folder holds none.
    """
    known = Image.registered_extensions()
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(inside for inside in path.iterdir() if inside.suffix.lower() in known and inside.is_file())
        if not found:
            raise PictureError(f"the folder {path} holds no pictures; name another")
        yield from found


def read_picture(path: Path, size: int) -> tuple[Tensor, str]:
    """The middle square of a picture, upright, on white where it is transparent.

    Returns:
        uint8 ``(3, size, size)``, and which greys were drawn as black and white where those are not 0 and 255.

    Raises:
        PictureError: there is no such file, or Pillow cannot read it.
    """
    try:
        require_regular(path)
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            upright, scaled = _to_bytes(upright)
            if upright.mode in ("CMYK", "YCbCr", "HSV", "LAB"):
                upright = upright.convert("RGB")
            colours = upright.convert("RGBA")
    except FileNotFoundError as error:
        raise PictureError(f"there is no picture {path}; name another") from error
    # Pillow's plugins raise all of these for damaged files, and the last where one would unfold to gigabytes
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise PictureError(
            f"cannot read {path} as a picture ({one_line(error)}); name one that Pillow reads"
        ) from error
    picture = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    square = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1), scaled


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
