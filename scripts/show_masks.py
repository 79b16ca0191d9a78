#!/usr/bin/env python
"""What a trained network sees in your own pictures: its predictions, and trunk, mask and product of its attention.

python scripts/show_masks.py runs/ran_compact-.../model.pt cat.jpg boat.png folder --out masks.png

Prints the three likeliest classes of each picture, and draws every attention module beside it. Pictures may be of any
format and size that Pillow reads, turned as their camera says: the middle square is taken, on white where it is
transparent, and resized. Greys of more than 8 bits are scaled, and a line says from where to where.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ran_ext._attention_maps import attention_maps, depths, draw_attention, png
from ran_ext._command import Parser
from ran_ext._files import write_atomically
from ran_ext.data import CLASSES
from ran_ext.data.pictures import PictureError, find_pictures, read_picture
from ran_ext.train import CheckpointError, load_classes, load_model, load_normalize

#: Predictions printed for each picture.
TOP = 3
#: Pictures in a figure, and the side of the largest.
MOST_PICTURES, MOST_PIXELS = 100, 1024


def predictions(logits: Tensor, classes: Sequence[str] | None) -> list[str]:
    """The likeliest classes of each picture with their probabilities, as text."""
    shares, labels = logits.softmax(1).topk(min(TOP, logits.shape[1]))
    known = CLASSES if logits.shape[1] == len(CLASSES) else [f"class {label}" for label in range(logits.shape[1])]
    names = classes or known
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
    if not model.min_size <= size <= MOST_PIXELS:
        raise PictureError(f"--size must be from {model.min_size} to {MOST_PIXELS}, got {size}")
    if not (depth := depths(model)):
        raise PictureError(f"the network of {checkpoint} has no attention, so there are no masks to show")
    if model.in_channels != 3:
        raise PictureError(f"the network of {checkpoint} takes {model.in_channels} channels, not colour pictures")
    if len(pictures) > MOST_PICTURES:
        raise PictureError(f"{len(pictures)} pictures do not fit into one figure; name at most {MOST_PICTURES}")
    read = [read_picture(path, size) for path in pictures]
    for path, (_, scaled) in zip(pictures, read, strict=True):
        if scaled:
            print(f"{path}: {scaled}", file=sys.stderr)
    images = torch.stack([image for image, _ in read])
    inputs = normalize(images)
    with torch.no_grad():
        found = predictions(model(inputs), load_classes(checkpoint))
    for path, text in zip(pictures, found, strict=True):
        print(f"{path}: {text}")
    titles = [f"{path.stem[:18]}\n{text.split(',')[0]}" for path, text in zip(pictures, found, strict=True)]
    figure = draw_attention(images, attention_maps(model, inputs), depth, titles)
    try:
        write_atomically(out, png(figure, dpi=150))
    except OSError as error:
        raise PictureError(f"cannot write {out} ({error.strerror}); name another --out") from error
    print(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, or 1 after an error."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="model.pt or last.pt of a training")
    add("pictures", type=Path, nargs="+", metavar="image", help="files, or folders of them")
    add("--size", type=int, default=32, help="side in pixels that the network gets (default: 32)")
    add("--out", type=Path, default=Path("masks.png"), help="the figure (default: masks.png)")
    options = parser.parse_args(argv)
    try:
        show(options.checkpoint, list(find_pictures(options.pictures)), options.size, options.out)
    except ImportError:
        print("show_masks: error: a figure needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    except (CheckpointError, PictureError) as error:
        print(f"show_masks: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
