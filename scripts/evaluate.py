#!/usr/bin/env python
"""Test accuracy of the weights that come with the package, or of a training's checkpoint, by class too.

python -m scripts.evaluate --data data                                the weights of ran_compact
python -m scripts.evaluate --data data --checkpoint runs/mine/model.pt
python -m scripts.evaluate --data pictures --checkpoint runs/mine/model.pt --predictions predictions.csv
python -m scripts.evaluate --data sample --folded                     512 embedded images, batch normalisations folded

Of pictures in folders the part test is taken, else val, else all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.command import run_command
from ran_ext import fold_for_inference, models
from ran_ext._command import Parser
from ran_ext._files import write_atomically
from ran_ext.data import Normalize, PictureFolder
from ran_ext.data.folders import is_folder_of_classes, open_folder
from ran_ext.data.images import Labelled
from ran_ext.train import Evaluation, evaluate, load_classes, load_model, load_normalize
from ran_ext.train.arguments import SAMPLE
from ran_ext.train.checkpoint import load_shape
from ran_ext.train.cli import find_data
from ran_ext.train.evaluation import confusion_csv, describe, predictions_csv
from ran_ext.train.state import SELECTED


def run(options: argparse.Namespace) -> None:
    """Print what plain predictions come to, by class too, and the accuracy of mirrored ones."""
    card = None
    if options.checkpoint:
        path = options.checkpoint / SELECTED if options.checkpoint.is_dir() else options.checkpoint
        model = load_model(path)
        normalize = load_normalize(path, torch.channels_last)
        classes, shape = load_classes(path), load_shape(path)
    else:
        card = models.model_card(options.model)
        model = models.create_model(options.model, pretrained=True).eval()
        normalize = Normalize(card.mean, card.std, torch.channels_last)
        classes, shape = list(card.classes), [3, 32, 32]
        print(f"{card.name}: {card.recipe} {card.data}; {card.trained_on}")
    test = test_images(options, shape, classes)
    names = classes or list(test.classes)
    network = fold_for_inference(model) if options.folded else model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for mirror, what in ((False, "accuracy"), (True, "accuracy_mirrored")):
        found = evaluate(network, test, normalize, mirror=mirror, keep=not mirror, batch_size=options.batch)
        if not mirror:
            print(describe(found, names))
            write(options, found, names, test)
        said = f", its card says {getattr(card, what):.4f}" if card and len(test) == 10_000 else ""
        kind = "mirrored" if mirror else "plain"
        images = f"{len(test):,} test images, {found.seconds:.1f} s"
        print(f"{kind + ':':<10}{found.accuracy:.4f} of {images}{said}", flush=True)


def test_images(options: argparse.Namespace, shape: Sequence[int] | None, classes: Sequence[str] | None) -> Labelled:
    """Those that ``--data`` names, as the network takes them, numbered as its classes are."""
    root = Path(options.data)
    if options.data != SAMPLE and is_folder_of_classes(root):
        channels, size = (shape[0], shape[1]) if shape else (None, None)
        found = open_folder(root, size, options.skip_broken, channels, classes)
    else:
        found = find_data(options.data, skip_broken=options.skip_broken)
    for fault in found.skipped:
        print(f"left out: {fault}", file=sys.stderr)
    test = found.test or found.val or found.train
    if classes is not None and list(test.classes) != list(classes):
        theirs = ", ".join(test.classes)
        raise ValueError(f"the network knows the classes {', '.join(classes)}, and {options.data} has {theirs}")
    return test


def write(options: argparse.Namespace, found: Evaluation, classes: Sequence[str], test: Labelled) -> None:
    """The files that are asked for."""
    if options.confusion:
        write_atomically(options.confusion, confusion_csv(found, classes).encode())
    if options.predictions and found.probabilities is not None:
        names: Sequence[object] = test.paths if isinstance(test, PictureFolder) else range(len(test))
        text = predictions_csv(names, found.probabilities, classes, found.labels)
        write_atomically(options.predictions, text.encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, or 1 after an error."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    data = "folder of pictures in class folders, of CIFAR-10 or CIFAR-100, or 'sample' for the embedded images"
    add("--data", default="data", help=f"{data} (default: data)")
    add("--model", default="ran_compact", help="of the weights in the package (default: ran_compact)")
    add("--checkpoint", type=Path, help="a training's folder or its model.pt instead")
    add("--folded", action="store_true", help="with fold_for_inference")
    add("--predictions", type=Path, metavar="FILE", help="write each image's likeliest classes as CSV")
    add("--confusion", type=Path, metavar="FILE", help="write the confusion matrix as CSV")
    add("--skip-broken", action="store_true", help="leave out pictures that cannot be read, and say which")
    add("--batch", type=int, default=128, help="images at a time (default: 128)")
    options = parser.parse_args(argv)
    return run_command("evaluate", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
