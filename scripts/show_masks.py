#!/usr/bin/env python
"""What a trained network sees in your own pictures: its predictions, and trunk, mask and product of its attention.

python scripts/show_masks.py runs/ran_compact-.../model.pt cat.jpg boat.png --out masks.png

Prints the three likeliest classes of each picture, and draws every attention module beside it. Pictures may be of any
format and size that Pillow reads: the middle square is taken, on white where it is transparent, and resized.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ran_ext._files import write_figure
from ran_ext.data import CLASSES
from ran_ext.train import CheckpointError, load_model, load_normalize
from ran_ext.train.masks import attention_maps, depths, draw_attention

#: Predictions printed for each picture.
TOP = 3


class PictureError(Exception):
    """A picture cannot be read, shown to this network, or drawn; one sentence that says what to do."""


def read_picture(path: Path, size: int) -> Tensor:
    """The middle square of a picture, uint8 ``(3, size, size)``.

    Raises:
        PictureError: there is no such file, or Pillow cannot read it.
    """
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            if upright.mode == "I;16":  # converting would cut all but the darkest 256 greys off
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            colours = upright.convert("RGBA")
    except FileNotFoundError as error:
        raise PictureError(f"there is no picture {path}; name another") from error
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's plugins raise all of these for damaged files
        raise PictureError(f"cannot read {path} as a picture ({error}); name one that Pillow reads") from error
    picture = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    square = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def predictions(logits: Tensor) -> list[str]:
    """The likeliest classes of each picture with their probabilities, as text."""
    shares, labels = logits.softmax(1).topk(min(TOP, logits.shape[1]))
    names = CLASSES if logits.shape[1] == len(CLASSES) else [f"class {label}" for label in range(logits.shape[1])]
    rows = zip(shares.tolist(), labels.tolist(), strict=True)
    return [", ".join(f"{names[label]} {share:.1%}" for share, label in zip(*row, strict=True)) for row in rows]


def show(checkpoint: Path, pictures: Sequence[Path], size: int, out: Path) -> None:
    """Print the predictions and write the figure.

    Raises:
        CheckpointError: ``checkpoint`` is none of ran_ext's.
        PictureError: a picture cannot be read, ``size`` does not fit the network, or ``out`` cannot be written.
    """
    model, normalize = load_model(checkpoint), load_normalize(checkpoint)
    fixed = normalize.offset.shape[-1]
    if fixed not in (1, size):
        raise PictureError(
            f"--size must be {fixed}, got {size}: the network of {checkpoint} subtracts a mean image of that size "
            "(normalize='per_channel' trains one for any size)"
        )
    if size < model.min_size:
        raise PictureError(f"--size must be at least {model.min_size}, got {size}")
    images = torch.stack([read_picture(path, size) for path in pictures])
    inputs = normalize(images)
    with torch.no_grad():
        found = predictions(model(inputs))
    for path, text in zip(pictures, found, strict=True):
        print(f"{path}: {text}")
    titles = [f"{path.stem[:18]}\n{text.split(',')[0]}" for path, text in zip(pictures, found, strict=True)]
    figure = draw_attention(images, attention_maps(model, inputs), depths(model), titles)
    try:
        write_figure(out, figure, dpi=150)
    except OSError as error:
        raise PictureError(f"cannot write {out} ({error.strerror}); name another --out") from error
    print(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, or 1 after an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="model.pt or last.pt of a training")
    add("pictures", type=Path, nargs="+", metavar="image")
    add("--size", type=int, default=32, help="side in pixels that the network gets (default: 32)")
    add("--out", type=Path, default=Path("masks.png"), help="the figure (default: masks.png)")
    options = parser.parse_args(argv)
    try:
        show(options.checkpoint, options.pictures, options.size, options.out)
    except (CheckpointError, PictureError) as error:
        print(f"show_masks: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
