#!/usr/bin/env python
"""Other backbones and an LSTM with attention and without: loss and accuracy after the same few steps, same data.

python -m benchmarks.attention_gain                     what results/cpu_attention_gain.json lacks
python -m benchmarks.attention_gain --case "LSTM, rows" --seeds 1 --out own.json

The images are those in the package; rows: each image's 32 rows as a sequence; text: 128 characters of a module of
Python's standard library, of which the module is to be told. Prints the table in docs/networks.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ran_ext._command import Parser
from ran_ext.data import CIFAR10, Normalize
from ran_ext.models import AttentionLSTM, create_model

from .command import run_command
from .ledger import Ledger
from .timing import environment

RESULTS = Path(__file__).resolve().parent / "results" / "cpu_attention_gain.json"
MODULES = ("_pydecimal", "argparse", "tarfile", "turtle", "html.entities", "encodings.cp437")
#: Characters of a window, and from one to the next.
WINDOW, STRIDE = 128, 32
STEPS, BATCH = 150, 32
#: Of Adam, for networks of convolutions and of LSTMs.
LEARNING_RATES = {"conv": 0.001, "LSTM": 0.005}


class Split(NamedTuple):
    """What a network takes, and labels; of training and test."""

    x: Tensor
    labels: Tensor
    x_test: Tensor
    labels_test: Tensor


def images() -> Split:
    """CIFAR-10 in the package, normalised."""
    train, test = CIFAR10.sample("train"), CIFAR10.sample("test")
    normalize = Normalize.per_channel(train)
    return Split(normalize(train.images), train.labels, normalize(test.images), test.labels)


def rows() -> Split:
    """The same, each image a sequence of 32 rows of 96 values."""
    split = images()
    x, x_test = (part.transpose(1, 2).flatten(2) for part in (split.x, split.x_test))
    return Split(x, split.labels, x_test, split.labels_test)


def text() -> Split:
    """Windows of the first 40,000 characters of each module, one-hot: of the first four fifths for training.

    >>> [tuple(part.shape[1:]) for part in text()]
    [(128, 96), (), (128, 96), ()]
    """
    found: list[list[Tensor]] = [[], [], [], []]
    for label, module in enumerate(MODULES):
        source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")  # type: ignore[union-attr, arg-type]
        codes = torch.tensor([min(max(ord(letter) - 32, 0), 95) for letter in source[:40_000]])
        cut = len(codes) * 4 // 5
        for place, part in ((0, codes[:cut]), (2, codes[cut:])):
            windows = part.unfold(0, WINDOW, STRIDE)
            found[place].append(windows)
            found[place + 1].append(torch.full((len(windows),), label))
    x, labels, x_test, labels_test = (torch.cat(parts) for parts in found)
    return Split(F.one_hot(x, 96).float(), labels, F.one_hot(x_test, 96).float(), labels_test)


def backbone(name: str) -> Callable[[bool], nn.Module]:
    """An eighth as wide as published."""
    return lambda attention: create_model(name, width=0.125, attention=attention)


#: By name: the network with attention or without, and its data.
CASES: dict[str, tuple[Callable[[bool], nn.Module], Callable[[], Split]]] = {
    "VGG-16": (backbone("vgg16_attention"), images),
    "AlexNet": (backbone("alexnet_attention"), images),
    "MobileNetV2": (backbone("mobilenet_v2_attention"), images),
    "LSTM, rows": (lambda attention: AttentionLSTM(96, 10, 64, depth=2, attention=attention), rows),
    "LSTM, text": (lambda attention: AttentionLSTM(96, len(MODULES), 64, depth=3, attention=attention), text),
}


def measure(case: str, attention: bool, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """One training: the loss of the first and of the last fifth of the steps, and test accuracy."""
    build, load = CASES[case]
    split = load()
    torch.manual_seed(seed)
    model = build(attention)
    order = torch.randint(len(split.x), (steps, BATCH), generator=torch.Generator().manual_seed(seed))
    rate = LEARNING_RATES["LSTM" if isinstance(model, AttentionLSTM) else "conv"]
    optimizer = torch.optim.Adam(model.parameters(), rate)
    losses = []
    for batch in order:
        loss = F.cross_entropy(model(split.x[batch]), split.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        told = torch.cat([model.eval()(part).argmax(1) for part in split.x_test.split(128)])
    fifth = max(1, steps // 5)
    return {
        "case": case,
        "attention": attention,
        "seed": seed,
        "loss_first": round(sum(losses[:fifth]) / fifth, 4),
        "loss_last": round(sum(losses[-fifth:]) / fifth, 4),
        "accuracy": round((told == split.labels_test).float().mean().item(), 4),
    }


def parameters(case: str, attention: bool) -> int:
    """Of the case's network.

    >>> parameters("LSTM, rows", attention=False)
    42122
    """
    with torch.device("meta"):
        return sum(p.numel() for p in CASES[case][0](attention).parameters())


def table(found: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, in Markdown.

    >>> row = {"case": "LSTM, rows", "loss_first": 2.0, "loss_last": 1.0, "accuracy": 0.4}
    >>> print(table([row | {"attention": attention} for attention in (True, False)]).splitlines()[-1])
    | LSTM, rows | 95,690 / 42,122 | 2.00 to 1.00 | 2.00 to 1.00 | 0.400 | 0.400 |
    """
    lines = ["| network | parameters | loss, with attention | without | test accuracy, with | without |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for case in CASES:
        both = [[row for row in found if row["case"] == case and row["attention"] is one] for one in (True, False)]
        if all(both):

            def mean(key: str, both: list[list[dict[str, Any]]] = both) -> list[float]:
                return [sum(row[key] for row in rows) / len(rows) for rows in both]

            losses = [f"{a:.2f} to {b:.2f}" for a, b in zip(mean("loss_first"), mean("loss_last"), strict=True)]
            sizes = " / ".join(f"{parameters(case, one):,}" for one in (True, False))
            accuracies = [f"{value:.3f}" for value in mean("accuracy")]
            lines.append(f"| {' | '.join([case, sizes, *losses, *accuracies])} |")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    """Measure what is missing, then print all."""
    settings = {"steps": options.steps, "batch": BATCH, "Adam": LEARNING_RATES, "device": "cpu"}
    ledger = Ledger(options.out, settings, environment(torch.device("cpu")))
    for seed, case, attention in itertools.product(range(options.seeds), options.case, (True, False)):
        if not ledger.find(case=case, attention=attention, seed=seed):
            ledger.add(measure(case, attention, seed, options.steps))
    print(table(ledger.rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--case", choices=CASES, nargs="+", default=list(CASES), help="these alone")
    add("--seeds", type=int, default=2, help="how many, from 0 (default: 2)")
    add("--steps", type=int, default=STEPS, help=f"of training (default: {STEPS})")
    add("--out", type=Path, default=RESULTS, help="JSON (default: that of the repository)")
    options = parser.parse_args(argv)
    return run_command("attention_gain", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
