#!/usr/bin/env python
"""Test accuracy on CIFAR-10 of the weights that come with the package, or of a training's checkpoint.

python -m scripts.evaluate --data data                                the weights of ran_compact
python -m scripts.evaluate --data data --checkpoint runs/mine/model.pt
python -m scripts.evaluate --data sample --folded                     512 embedded images, batch normalisations folded
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
from ran_ext.data import CIFAR10, Normalize
from ran_ext.train import evaluate, load_model, load_normalize


def run(options: argparse.Namespace) -> None:
    """Print a line for plain and one for mirrored predictions."""
    test = CIFAR10.sample("test") if options.data == "sample" else CIFAR10(options.data, "test")
    card = None
    if options.checkpoint:
        model = load_model(options.checkpoint)
        normalize = load_normalize(options.checkpoint, torch.channels_last)
    else:
        card = models.model_card(options.model)
        model = models.create_model(options.model, pretrained=True).eval()
        normalize = Normalize(card.mean, card.std, torch.channels_last)
        print(f"{card.name}: {card.recipe} {card.data}; {card.trained_on}")
    network = fold_for_inference(model) if options.folded else model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for mirror, what in ((False, "accuracy"), (True, "accuracy_mirrored")):
        found = evaluate(network, test, normalize, mirror=mirror)
        said = f", its card says {getattr(card, what):.4f}" if card and len(test) == 10_000 else ""
        kind = "mirrored" if mirror else "plain"
        images = f"{len(test):,} test images, {found.seconds:.1f} s"
        print(f"{kind + ':':<10}{found.accuracy:.4f} of {images}{said}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, or 1 after an error."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", default="data", help="folder of CIFAR-10, or 'sample' for the embedded images (default: data)")
    add("--model", default="ran_compact", help="of the weights in the package (default: ran_compact)")
    add("--checkpoint", type=Path, help="a training's model.pt instead")
    add("--folded", action="store_true", help="with fold_for_inference")
    options = parser.parse_args(argv)
    return run_command("evaluate", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
