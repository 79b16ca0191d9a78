#!/usr/bin/env python
"""Does attention help with corrupted images? ran_compact against the same network without masks, at equal parameters.

python -m scripts.robustness --out runs/robustness                     narrow networks, 12 minutes on 2 CPU cores
python -m scripts.robustness --out runs/robustness --scale short       full size, 8 epochs, a seed: 2 hours there
python -m scripts.robustness --out runs/robustness --scale full        the whole CIFAR-10, on a GPU
python -m scripts.robustness --out runs/robustness --quick             a rehearsal; its figures mean nothing
python -m scripts.robustness --out runs/robustness --scale full --checkpoint runs/*/model.pt    networks trained before

Without its masks the network has their parameters, to 0.1 %, in a longer trunk, which makes 1.5 times the operations.
Both are trained by the same recipe, and tested on the same images under Gaussian noise, blur, contrast and shift at
five strengths (ran_ext.data.corruptions). Leaves robustness.json, .md and .png in --out; the same command again
continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import run_command
from benchmarks.corrupted import ATTENTION, TRUNK, Seed, draw, table
from benchmarks.ledger import Ledger
from benchmarks.timing import environment
from ran_ext._command import Parser
from ran_ext._files import write_atomically
from ran_ext.data import CIFAR10, CORRUPTIONS, corrupt
from ran_ext.data.corruptions import STRENGTHS
from ran_ext.train import (
    PRESETS,
    Config,
    Ranks,
    evaluate,
    fit,
    load_config,
    load_model,
    load_normalize,
    resolve_dtype,
)
from ran_ext.train.arguments import SAMPLE
from ran_ext.train.cli import load_data
from ran_ext.train.state import LAST, SELECTED
from ran_ext.train.system import choose_device, keep_freed_memory

#: Options of ``ran_compact``.
NETWORKS: dict[str, dict[str, Any]] = {ATTENTION: {}, TRUNK: {"attention": False}}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the runs are: how many of each set's images, the networks' width, epochs, seeds."""

    train_images: int
    test_images: int
    width: float
    epochs: int
    seeds: int


SCALES = {
    "quick": Scale(256, 128, 0.125, 1, 2),
    "subset": Scale(10_000, 2_000, 0.25, 8, 4),
    "short": Scale(50_000, 10_000, 1.0, 8, 1),
    "full": Scale(50_000, 10_000, 1.0, 20, 5),
}


def config_of(scale: Scale, network: str, seed: int) -> Config:
    """The recipe, alike for both networks."""
    options = {"width": scale.width, **NETWORKS[network]}
    return dataclasses.replace(PRESETS["fast"], model_options=options, epochs=scale.epochs, seed=seed)


def network_of(checkpoint: Path) -> tuple[str, int]:
    """Which of the two a checkpoint holds, and its seed.

    Raises:
        ValueError: it holds neither.
    """
    config = load_config(checkpoint)
    if config.model != "ran_compact":
        raise ValueError(f"--checkpoint takes ran_compact, with masks or without; {checkpoint} is {config.model}")
    return (ATTENTION if config.model_options.get("attention", True) else TRUNK), config.seed


def train(config: Config, train_set: CIFAR10, folder: Path, device: torch.device) -> Path:
    """The trained network's checkpoint; an interrupted run continues from its own.

    Raises:
        KeyboardInterrupt: the run was asked to stop; its checkpoint is in ``folder``.
    """
    torch.manual_seed(config.seed)
    result = fit(config.create_model(), train_set, None, config, folder, ranks=Ranks(0, 1, device), resume=True)
    if result.interrupted:
        raise KeyboardInterrupt
    return folder / SELECTED


def accuracies(checkpoint: Path, test_set: CIFAR10, device: torch.device) -> dict[str, Any]:
    """Accuracy on ``test_set`` as it is, and by corruption at each strength; every network sees the same images."""
    config = load_config(checkpoint)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = load_model(checkpoint, device).to(memory_format=layout)  # type: ignore[call-overload]
    normalize = load_normalize(checkpoint, layout)

    def accuracy(name: str, strength: int) -> float:
        corrupted = test_set.to(device)
        generator = torch.Generator(device).manual_seed(0)
        corrupted.images = corrupt(corrupted.images, name, strength, generator)
        return evaluate(model, corrupted, normalize, dtype=config.torch_dtype).accuracy

    strengths = range(1, STRENGTHS + 1)
    return {
        "clean": accuracy("shift", 0),
        "corrupted": {name: [accuracy(name, strength) for strength in strengths] for name in CORRUPTIONS},
    }


def checkpoints(
    options: argparse.Namespace, scale: Scale, train_set: CIFAR10, device: torch.device, ledger: Ledger
) -> Iterator[tuple[Mapping[str, Any], Path]]:
    """The networks not yet in ``ledger``, trained or given, each with what its row is found by."""
    if options.checkpoint:
        for path in options.checkpoint:
            network, seed = network_of(path)
            key = {"checkpoint": str(path), "network": network, "seed": seed}
            if not ledger.find(**key):
                yield key, path
        return
    # Both networks of a seed together, so that a run cut short can be judged.
    parts = [(network, seed) for seed in range(options.seeds or scale.seeds) for network in NETWORKS]
    for count, (network, seed) in enumerate(parts, 1):
        key = {"checkpoint": None, "network": network, "seed": seed}
        if not ledger.find(**key):
            print(f"part {count} of {len(parts)}: {network}, seed {seed}", flush=True)
            folder = options.out / network.replace(" ", "_") / f"seed{seed}"
            yield key, train(config_of(scale, network, seed), train_set, folder, device)
            (folder / LAST).unlink()  # model.pt stays


def title_of(options: argparse.Namespace, scale: Scale) -> str:
    """What was trained and tested."""
    trained = f"{scale.epochs} epochs of {scale.train_images:,} images, width {scale.width:g}"
    trained = "checkpoints given" if options.checkpoint else trained
    title = f"ran_compact with and without masks, {trained}; {scale.test_images:,} test images"
    return f"REHEARSAL, the figures mean nothing: {title}" if options.scale == "quick" else title


def run(options: argparse.Namespace) -> None:
    """Train and test what is missing, then write table and figure."""
    keep_freed_memory()
    device, scale = choose_device(options.device), SCALES[options.scale]
    torch.backends.cudnn.benchmark = True
    config = resolve_dtype(config_of(scale, ATTENTION, 0), Ranks(0, 1, device))
    train_set, _, test_set = load_data(SAMPLE if options.scale == "quick" else str(options.data), config)
    train_set = train_set.subset(torch.arange(scale.train_images)).to(device)
    test_set = test_set.subset(torch.arange(scale.test_images)).to(device)
    facts = environment(device)
    settings = {
        "rehearsal": options.scale == "quick",
        "train_images": len(train_set),
        "test_images": len(test_set),
        "recipe": config.to_dict(),
        "given": bool(options.checkpoint),
        "corruptions": {name: parameters for name, (_, parameters) in CORRUPTIONS.items()},
        "device": facts["device"],
    }
    ledger = Ledger(options.out / "robustness.json", settings, facts)
    for key, checkpoint in checkpoints(options, scale, train_set, device, ledger):
        row = {**key, **accuracies(checkpoint, test_set, device)}
        ledger.add(row)
        print(f"{checkpoint}: accuracy {row['clean']:.4f} on clean images", flush=True)
    seeds = [Seed(row["network"], row["seed"], row["clean"], row["corrupted"]) for row in ledger.rows]
    title = title_of(options, scale)
    text = f"{title}\n\n{table(seeds)}\n"
    print(text)
    write_atomically(options.out / "robustness.md", text.encode())
    try:
        draw(options.out / "robustness.png", seeds, title)
    except ImportError:
        print("no robustness.png: pip install matplotlib", file=sys.stderr)
    print(*sorted(options.out.glob("robustness.*")), sep="\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the runs, the table and the figure")
    add("--data", type=Path, default=Path("data"), help="folder of CIFAR-10 (default: data; --quick needs none)")
    add("--scale", choices=SCALES, default="subset", help="how large the runs are (default: subset)")
    add("--quick", dest="scale", action="store_const", const="quick", help="the same as --scale quick")
    add("--seeds", type=int, help="how many of each network, from 0 (default: the scale's)")
    add("--checkpoint", type=Path, nargs="+", metavar="FILE", help="test these networks instead of training any")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    options = parser.parse_args(argv)
    return run_command("robustness", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
