#!/usr/bin/env python
"""Trains ``ran_compact`` in ran_ext and in plain PyTorch, from the same weights on the same batches; compares losses.

python -m benchmarks.loss_curves --data data --out benchmarks/results/loss_curves.json     5,000 images, 3 epochs

Rounding alone drives two trainings apart, faster the longer they run. The yardstick is therefore a third training:
plain PyTorch again, in NCHW instead of channels_last, the same mathematics in another order of summation. The extension
is right where its distance from plain PyTorch is of the size of that yardstick.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ran_ext import models, set_backend
from ran_ext._attention_maps import png
from ran_ext._command import Parser
from ran_ext._files import write_atomically, write_json
from ran_ext.data import CIFAR10, Normalize

from .reference import networks as plain_networks
from .timing import environment

OURS, PLAIN, YARDSTICK = "ran_ext", "plain PyTorch", "plain PyTorch, NCHW"


class Run:
    """One network in training: fused Adam, no dropout."""

    def __init__(self, model: nn.Module, layout: torch.memory_format, ours: bool, device: torch.device, half: bool):
        self.model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.layout, self.device, self.half = layout, device, half
        self.backend = "native" if ours else "auto"
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step; keeps its loss."""
        began = time.perf_counter()
        dtype = torch.bfloat16 if self.half else None
        with set_backend(self.backend), torch.autocast(self.device.type, dtype, enabled=self.half):
            loss = F.cross_entropy(self.model(images.to(memory_format=self.layout)), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - began


def train(data: CIFAR10, epochs: int, batch: int, half: bool, device: torch.device) -> dict[str, Run]:
    """The three trainings, in step with each other, so that a slow spell of the machine meets all of them."""
    torch.manual_seed(0)
    weights = plain_networks.ran_compact(dropout=0.0).state_dict()
    last, flat = torch.channels_last, torch.contiguous_format
    built = {
        PLAIN: (plain_networks.ran_compact(dropout=0.0), last),
        OURS: (models.ran_compact(dropout=0.0), last),
        YARDSTICK: (plain_networks.ran_compact(dropout=0.0), flat),
    }
    runs = {}
    for name, (model, layout) in built.items():
        model.load_state_dict(weights)
        runs[name] = Run(model.train(), layout, name == OURS, device, half)
    images = Normalize.per_pixel(data)(data.images).to(device)
    labels = data.labels.to(device)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=generator).to(device)
        for chosen in order.split(batch):
            for run in runs.values():
                run.step(images[chosen], labels[chosen])
        steps = -(-len(data) // batch)
        means = ", ".join(f"{name} {sum(run.losses[-steps:]) / steps:.4f}" for name, run in runs.items())
        print(f"epoch {epoch + 1}: {means}", flush=True)
    return runs


def distances(runs: dict[str, Run], name: str) -> list[float]:
    """How far each step's loss is from plain PyTorch's."""
    return [abs(a - b) for a, b in zip(runs[name].losses, runs[PLAIN].losses, strict=True)]


def summary(runs: dict[str, Run]) -> dict[str, Any]:
    """Mean distance of each curve from plain PyTorch's, over all steps and over the first tenth."""
    found: dict[str, Any] = {}
    for name in (OURS, YARDSTICK):
        apart = distances(runs, name)
        early = apart[: max(1, len(apart) // 10)]
        found[name] = {
            "mean": sum(apart) / len(apart),
            "mean of the first tenth": sum(early) / len(early),
            "largest": max(apart),
        }
    return found


def draw(path: Path, runs: dict[str, Run], title: str) -> None:
    """Above the three curves, below the distances from plain PyTorch's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # fails where matplotlib is missing, so not at import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    looks: dict[str, dict[str, Any]] = {
        YARDSTICK: {"color": "#bbbbbb", "linewidth": 4},
        PLAIN: {"color": "#d95f02", "linewidth": 2},
        OURS: {"color": "#1f5fa8", "linewidth": 1, "linestyle": "--"},
    }
    for name, look in looks.items():
        above.plot(range(1, len(runs[name].losses) + 1), runs[name].losses, label=name, **look)
        if name != PLAIN:
            below.semilogy(range(1, len(runs[name].losses) + 1), [max(d, 1e-9) for d in distances(runs, name)], **look)
    above.set_ylabel("cross entropy")
    above.legend()
    below.set_ylabel(f"distance from {PLAIN}")
    below.set_xlabel("step")
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    write_atomically(path, png(figure))


def main(argv: list[str] | None = None) -> int:
    """Train, print, write."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=None, help="folder of CIFAR-10 (default: the 2,048 embedded images)")
    add("--images", type=int, default=5000, help="the first of the training set")
    add("--epochs", type=int, default=3)
    add("--batch", type=int, default=128)
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 by autocast")
    add("--threads", type=int, default=None, help="of the CPU (default torch's)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, required=True, help="JSON; the figure is drawn beside it")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    data = CIFAR10(options.data) if options.data else CIFAR10.sample("train")
    data = data.subset(torch.arange(min(options.images, len(data))))
    before = environment(device)
    runs = train(data, options.epochs, options.batch, options.dtype == "bfloat16", device)
    found = summary(runs)
    print(f"\n| distance from {PLAIN} | mean | mean of the first tenth | largest |\n| --- | ---: | ---: | ---: |")
    for name, figures in found.items():
        print(f"| {name} | " + " | ".join(f"{value:.2e}" for value in figures.values()) + " |")
    settings = {name: str(value) for name, value in vars(options).items()} | {"images": len(data)}
    content = {
        "environment": {**before, "load_average_after": environment(device)["load_average"]},
        "settings": settings,
        "distances": found,
        "runs": {name: {"seconds": run.seconds, "losses": run.losses} for name, run in runs.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, content)
    figure = options.out.with_suffix(".png")
    draw(figure, runs, f"ran_compact, {len(data)} images, batch {options.batch}, {options.dtype}")
    print(f"{figure}\n{options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
