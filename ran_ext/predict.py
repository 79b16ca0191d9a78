"""``ran-ext-predict``: what a trained network sees in pictures, as a page to open and as CSV.

The page is one file of HTML with all its pictures inside: the likeliest classes of each, and the masks of its attention
laid over it. The CSV has a row a picture.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ._attention_maps import attention_masks, depths, has_attention
from ._command import Parser
from ._errors import one_line
from ._files import write_atomically
from .data import CLASSES, Normalize
from .data.formats import DatasetError
from .data.pictures import PictureError, find_pictures, read_picture
from .models import create_model, list_pretrained, model_card
from .train.arguments import MOST_PIXELS
from .train.checkpoint import load_classes, load_model, load_normalize, load_shape
from .train.evaluation import predictions_csv
from .train.state import SELECTED
from .train.system import TrainingError, choose_device

#: Pictures that go through the network together, and those that the page shows; the CSV has all.
BATCH, SHOWN = 32, 200
#: Up to this side a picture is kept as it is (PNG); above, as JPEG.
SMALL = 64
#: The colours of a mask's least, middle and greatest values, and their share where they are laid over a picture.
COLOURS, SHARE = ("#000004", "#b73779", "#fcfdbf"), 0.55


class Network(NamedTuple):
    """A trained network and what it takes and tells.

    Attributes:
        name: for the page.
        model: in evaluation mode.
        normalize: of uint8 images.
        classes: names, in the order of the logits.
        channels, size: of the images.
    """

    name: str
    model: nn.Module
    normalize: Normalize
    classes: list[str]
    channels: int
    size: int


class Prediction(NamedTuple):
    """What the network says of one picture.

    Attributes:
        path: of the picture.
        image: uint8 ``(C, H, W)``, as the network saw it.
        probabilities: float32 ``(classes,)``.
        masks: by the gate's name, float32 ``(H, W)``; none where the page does not show them.
    """

    path: Path
    image: Tensor
    probabilities: Tensor
    masks: dict[str, Tensor]


def load_network(checkpoint: Path | None, name: str, size: int | None, device: torch.device) -> Network:
    """The network of a training's folder or checkpoint, or without one the package's own of that name.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ValueError: there are no trained weights of that name, or ``size`` does not fit the network.
    """
    if checkpoint is None:
        card = model_card(name)
        model, normalize = create_model(name, pretrained=True).eval(), Normalize(card.mean, card.std)
        classes, shape, what = list(card.classes), [3, 32, 32], f"{name}, trained on {card.data}"
    else:
        path = checkpoint / SELECTED if checkpoint.is_dir() else checkpoint
        model, normalize, what = load_model(path), load_normalize(path), str(path)
        fixed = int(normalize.offset.shape[-1])
        shape = load_shape(path) or [len(normalize.offset), *[fixed if fixed > 1 else 32] * 2]
        classes = load_classes(path) or []
    side = size or shape[1]
    if int(normalize.offset.shape[-1]) not in (1, side):
        raise ValueError(
            f"--size must be {normalize.offset.shape[-1]}, got {side}: the network subtracts a mean image of that size "
            "(normalize='per_channel' trains one for any size)"
        )
    with torch.no_grad():
        outputs = model(normalize(torch.zeros(1, shape[0], side, side, dtype=torch.uint8))).shape[1]
    if len(classes) != outputs:
        known = CLASSES if outputs == len(CLASSES) else [f"class {label}" for label in range(outputs)]
        classes = list(known)
    return Network(what, model.to(device), normalize.to(device), classes, shape[0], side)


@torch.no_grad()
def predict(
    network: Network, paths: Sequence[Path], shown: int = SHOWN, skipped: list[str] | None = None
) -> Iterator[Prediction]:
    """What ``network`` says of each picture.

    Args:
        network: of :func:`load_network`.
        paths: of the pictures.
        shown: so many, the first ones, get their masks.
        skipped: takes the faults of pictures that cannot be read; None ends with the first.

    Raises:
        PictureError: a picture cannot be read.
    """
    device, masked = network.normalize.offset.device, has_attention(network.model)
    for first in range(0, len(paths), BATCH):
        read: list[tuple[Path, Tensor]] = []
        for path in paths[first : first + BATCH]:
            try:
                read.append((path, read_picture(path, network.size, network.channels)[0]))
            except PictureError as error:
                if skipped is None:
                    raise
                skipped.append(str(error))
        if not read:
            continue
        inputs = network.normalize(torch.stack([image for _, image in read]).to(device))
        shares = network.model(inputs).float().softmax(1).cpu()
        maps = attention_masks(network.model, inputs) if masked and first < shown else {}
        for row, (path, image) in enumerate(read):
            yield Prediction(path, image, shares[row], {name: mask[row].cpu() for name, mask in maps.items()})


def overlay(image: Tensor, mask: Tensor) -> Image.Image:
    """A mask in colours, dark for its least value and bright for its greatest, laid over a picture.

    >>> overlay(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.rand(8, 8)).size
    (8, 8)
    """
    low, high = mask.min(), mask.max()
    stretched = (255 * (mask - low) / (high - low).clamp_min(1e-6)).round().to(torch.uint8)
    black, middle, white = COLOURS
    heat = ImageOps.colorize(Image.fromarray(stretched.numpy()), black=black, white=white, mid=middle)
    return Image.blend(as_picture(image), heat, SHARE)


def as_picture(image: Tensor) -> Image.Image:
    """uint8 ``(C, H, W)`` as Pillow's, of mode RGB."""
    return Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def page(network: Network, predictions: Sequence[Prediction], top: int, left_out: int = 0) -> str:
    """The page, as HTML.

    Args:
        network: whose ``predictions`` these are.
        predictions: to show.
        top: classes to name.
        left_out: how many pictures the page does not show.
    """
    depth = depths(network.model)
    parts = [PAGE_BEGIN, f"<h1>{len(predictions) + left_out} pictures</h1><p>{html.escape(network.name)}. "]
    if any(prediction.masks for prediction in predictions):
        parts.append("The masks are laid over what the network saw: dark for the least value, bright for the greatest.")
    parts.append(f" Of {left_out} more the CSV tells.</p>" if left_out else "</p>")
    for prediction in predictions:
        figures = [figure(as_picture(prediction.image), "as the network saw it")]
        for name, mask in prediction.masks.items():
            known = f", depth {depth[name]}" if name in depth else ""
            text = f"{name.removesuffix('.gate')}{known}: {mask.min():.2f} to {mask.max():.2f}"
            figures.append(figure(overlay(prediction.image, mask), text))
        bars = "".join(bar(*pair) for pair in likeliest(prediction.probabilities, network.classes, top))
        title = f"<h2>{html.escape(str(prediction.path))}</h2>"
        parts.append(f'<section>{title}<div class="row">{"".join(figures)}<table>{bars}</table></div></section>')
    return "\n".join([*parts, "</body></html>", ""])


def likeliest(probabilities: Tensor, classes: Sequence[str], top: int) -> list[tuple[str, float]]:
    """The likeliest classes with their probabilities.

    >>> likeliest(torch.tensor([0.25, 0.75]), ["cat", "dog"], 1)
    [('dog', 0.75)]
    """
    shares, labels = probabilities.topk(min(top, len(classes)))
    return [(classes[label], share) for share, label in zip(shares.tolist(), labels.tolist(), strict=True)]


def figure(picture: Image.Image, text: str) -> str:
    """A picture inside HTML, with a line below it."""
    small, data = max(picture.size) <= SMALL, io.BytesIO()
    picture.save(data, **({"format": "png"} if small else {"format": "jpeg", "quality": 85}))
    kind, code = "png" if small else "jpeg", base64.b64encode(data.getvalue()).decode()
    alt = html.escape(text)
    return f'<figure><img alt="{alt}" src="data:image/{kind};base64,{code}"><figcaption>{alt}</figcaption></figure>'


def bar(name: str, share: float) -> str:
    """A class and its probability as a row of a table."""
    width = f'<div class="bar" style="width:{100 * share:.1f}%"></div>'
    return f"<tr><td>{html.escape(name)}</td><td class=share>{share:.1%}</td><td class=bars>{width}</td></tr>"


PAGE_BEGIN = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Predictions</title><style>
:root { color-scheme: light dark; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; }
h1 { font-size: 1.4em; } h2 { font-size: 1em; overflow-wrap: anywhere; margin: 0 0 .5em; }
section { border-top: 1px solid #8885; padding: 1em 0; }
.row { display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start; }
figure { margin: 0; width: 11em; } figcaption { font-size: .8em; opacity: .75; }
img { width: 100%; image-rendering: pixelated; display: block; }
table { border-spacing: .5em 0; } td { white-space: nowrap; }
.share { text-align: right; } .bars { width: 10em; } .bar { height: .7em; background: #b73779; }
</style></head><body>"""


def run(options: argparse.Namespace) -> None:
    """Predict, print a line a picture, and write both files."""
    network = load_network(options.checkpoint, options.model, options.size, choose_device(options.device))
    paths = list(find_pictures(options.pictures))
    skipped: list[str] = []
    kept: list[Prediction] = []
    names, shares = list[Path](), list[Tensor]()
    for prediction in predict(network, paths, SHOWN, skipped if options.skip_broken else None):
        kept += [prediction] if len(kept) < SHOWN else []
        names.append(prediction.path)
        shares.append(prediction.probabilities)
        found = likeliest(prediction.probabilities, network.classes, min(3, options.top))
        print(f"{prediction.path}: {', '.join(f'{name} {share:.1%}' for name, share in found)}")
    if not names:
        raise PictureError(f"none of the {len(paths)} pictures can be read: {skipped[0]}")
    write(options.out, page(network, kept, options.top, len(names) - len(kept)))
    write(options.csv, predictions_csv(names, torch.stack(shares), network.classes, top=options.top))
    if skipped:
        print("\n".join([f"left out, {len(skipped)} in all:", *(f"  {fault}" for fault in skipped)]), file=sys.stderr)
    print(f"{options.out}\n{options.csv}")


def write(path: Path, text: str) -> None:
    """Write ``text``, whole or not at all."""
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise PictureError(f"cannot write {path} ({error.strerror}); name another --out or --csv") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    parser = Parser(prog="ran-ext-predict", description=(__doc__ or "").partition(": ")[2])
    add = parser.add_argument
    add("pictures", type=Path, nargs="+", metavar="PICTURE", help="files, or folders of them at any depth")
    add("--checkpoint", type=Path, metavar="PATH", help="a training's folder, or its model.pt or last.pt")
    pretrained = ", ".join(list_pretrained())
    add("--pretrained", action="store_true", help=f"take the weights in the package instead ({pretrained})")
    add("--model", default="ran_compact", help="whose weights, with --pretrained (default: ran_compact)")
    add("--top", type=int, default=5, metavar="K", help="how many classes to name (default: 5)")
    add("--size", type=int, metavar="PIXELS", help="side that the network gets (default: that it was trained on)")
    add("--out", type=Path, default=Path("predictions.html"), help="the page (default: predictions.html)")
    add("--csv", type=Path, default=Path("predictions.csv"), help="the table (default: predictions.csv)")
    add("--skip-broken", action="store_true", help="leave out pictures that cannot be read, and list them at the end")
    add("--device", default="auto", help="auto (cuda where there is one, else cpu), or any that torch has")
    options = parser.parse_args(argv)
    if (options.checkpoint is None) == (not options.pretrained):
        parser.error("give either --checkpoint or --pretrained")
    for name, most in (("top", 1000), ("size", MOST_PIXELS)):
        if (value := getattr(options, name)) is not None and not 1 <= value <= most:
            parser.error(f"--{name} must be from 1 to {most}, got {value}")
    try:
        run(options)
    except (TrainingError, DatasetError, ValueError) as error:
        print(f"ran-ext-predict: error: {one_line(error, most=2000)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ran-ext-predict: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
