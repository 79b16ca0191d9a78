#!/usr/bin/env python
"""Make the weights that come with the package from a finished run of scripts/record.py, and measure their card.

python -m scripts.make_pretrained --run runs/record/0.893/seed0 --record runs/record/0.893.json --data data
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.command import run_command
from ran_ext import models
from ran_ext._command import Parser
from ran_ext._files import write_json
from ran_ext.data import CIFAR10, Normalize
from ran_ext.models.pretrained import FOLDER, ModelCard
from ran_ext.train import evaluate, load_config, load_model


def run(options: argparse.Namespace) -> None:
    """Write ``<name>.safetensors`` and ``<name>.json``."""
    checkpoint = options.run / "model.pt"
    config, model = load_config(checkpoint), load_model(checkpoint)
    train, test = CIFAR10(options.data, "train"), CIFAR10(options.data, "test")
    record = json.loads(options.record.read_text())
    facts = record.get("environment", record)
    path = FOLDER / f"{config.model}.safetensors"
    path.parent.mkdir(exist_ok=True)
    halves = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    save_file({key: value.contiguous() for key, value in halves.items()}, path)
    model.load_state_dict(halves)  # what is shipped is what is measured

    mean, std = (tuple(round(value, 6) for value in values.flatten().tolist()) for values in train.channel_stats())
    taken = Normalize(mean, std, torch.channels_last)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain, mirrored = (evaluate(model, test, taken, mirror=mirror).accuracy for mirror in (False, True))
    card = ModelCard(
        name=config.model,
        data=f"CIFAR-10, {len(train):,} training images",
        recipe=f"{config.epochs} epochs by scripts/record.py, seed {config.seed}, {config.dtype},",
        config=config.to_dict(),
        accuracy=plain,
        accuracy_mirrored=mirrored,
        test_images=f"{len(test):,}, of CIFAR-10",
        runs=1,
        mean=mean,
        std=std,
        classes=tuple(train.classes),
        trained_on=f"{facts['cpu']}, torch {facts['torch']}",
        licence="MIT; CIFAR-10 (Krizhevsky 2009) is free to use for research",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    write_json(FOLDER / f"{config.model}.json", dataclasses.asdict(card))
    models.create_model(config.model, pretrained=True)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, accuracy {plain:.4f}, mirrored {mirrored:.4f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, or 1 after an error."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder of the run's model.pt")
    add("--record", type=Path, required=True, help="the results' JSON, for the machine's name")
    add("--data", type=Path, default=Path("data"), help="folder of CIFAR-10 (default: data)")
    options = parser.parse_args(argv)
    return run_command("make_pretrained", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
