#!/usr/bin/env python
"""Measures the error of 3x3 convolutions against float64, in units of PyTorch's own, on the CPU in float32.

Both are roots of mean squares over seeds, relative to the result, without a floor; PyTorch's is given as it is. Inputs
are dense, sparse, or those of ``ran_compact`` and ResNet-18 in training.

python -m benchmarks.conv3x3_errors --seeds 10
python -m benchmarks.conv3x3_errors --isa avx2     as on a processor with AVX2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ran_ext
from ran_ext._command import Parser
from ran_ext.data import CIFAR10
from ran_ext.models import create_model

from . import isa
from .other_cnns import resnet18
from .table import Table

PASSES = ("forward", "dgrad", "wgrad")
MODES = ("fast", "strict")
#: Batch, channels in, height, width, channels out.
SIZES = (
    (8, 32, 32, 32, 32), (8, 64, 16, 16, 64), (32, 128, 8, 8, 128), (32, 256, 4, 4, 256), (8, 96, 14, 14, 40),
    (8, 40, 15, 7, 100), (4, 48, 57, 57, 24), (32, 512, 7, 7, 512),
)  # fmt: skip
#: x (an activation: after the ReLU), weight, and the output's gradient.
Case = tuple[Tensor, Tensor, Tensor]


def passes(x: Tensor, weight: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """The convolution and its two gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = ran_ext.ops.conv2d(x, weight, padding=1)
    return (out.detach(), *torch.autograd.grad(out, (x, weight), dout))


def dense(change: Callable[[Tensor], Tensor], size: tuple[int, ...]) -> Case:
    """Normal numbers, the activation changed."""
    n, c_in, height, width, c_out = size
    x, dout = torch.randn(n, c_in, height, width), torch.randn(n, c_out, height, width)
    return change(x), torch.randn(c_out, c_in, 3, 3) / (9 * c_in) ** 0.5, dout


def sparse(share: float, size: tuple[int, ...]) -> Case:
    """Activation and gradient with this share of zeros."""
    x, weight, dout = dense(torch.abs, size)
    return x * (torch.rand_like(x) >= share), weight, dout * (torch.rand_like(dout) >= share)


KINDS: dict[str, Callable[[tuple[int, ...]], Case]] = {
    "normal": lambda size: dense(lambda x: x, size),
    "after a ReLU": lambda size: dense(F.relu, size),
    "mean of 5": lambda size: dense(lambda x: x + 5, size),
    "smooth": lambda size: dense(lambda x: F.avg_pool2d(x, 5, 1, 2) * 5 + 1, size),
    "half zeros": lambda size: sparse(0.5, size),
    "3/4 zeros": lambda size: sparse(0.75, size),
    "9/10 zeros": lambda size: sparse(0.9, size),
}


class Errors:
    """Sums of squares of relative errors: PyTorch's, and each mode's, in each pass; and the worst ratio of a size."""

    def __init__(self) -> None:
        self.worst = {mode: dict.fromkeys(PASSES, 0.0) for mode in MODES}
        self.theirs = dict.fromkeys(PASSES, 0.0)

    def add(self, cases: list[Case]) -> None:
        """The cases of one size, from several seeds."""
        squares = {mode: dict.fromkeys(PASSES, 0.0) for mode in (*MODES, "library")}
        for case in cases:
            x, weight, dout = (t.contiguous(memory_format=torch.channels_last) for t in case)
            exact = passes(x.double(), weight.double(), dout.double())
            for mode, sums in squares.items():
                with ran_ext.set_conv3x3(mode):
                    found = passes(x, weight, dout)
                for name, ours, e in zip(PASSES, found, exact, strict=True):
                    sums[name] += ((ours - e).square().sum() / e.square().sum().clamp_min(1e-300)).item() / len(cases)
        for name in PASSES:
            theirs = squares["library"][name] ** 0.5
            self.theirs[name] = max(self.theirs[name], theirs)
            for mode in MODES:
                ratio = squares[mode][name] ** 0.5 / theirs if theirs else 1.0
                self.worst[mode][name] = max(self.worst[mode][name], ratio)

    def cells(self) -> list[float]:
        """A row of the table."""
        return [*(self.worst[mode][one] for mode in MODES for one in PASSES), *self.theirs.values()]


def in_training(model: nn.Module, pixels: int, steps: int, batch: int = 32) -> Iterator[Case]:
    """What every 3x3 convolution of stride 1 takes and is given back, after ``steps`` of training on real images."""
    images = CIFAR10.sample("train")
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    seen: list[list[Tensor]] = []

    def note(conv: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append([args[0].detach(), conv.weight.detach().clone()])  # type: ignore[operator]
        out.register_hook(seen[-1].append)

    for step in range(steps + 1):
        chosen = torch.randint(len(images), (batch,))
        x = F.interpolate(images.images[chosen].float() / 128 - 1, (pixels, pixels), mode="bilinear")
        for conv in model.modules() if step == steps else ():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.stride == (1, 1):
                conv.register_forward_hook(note)  # so that a fused layer runs as written, and calls it
        loss = F.cross_entropy(model(x.to(memory_format=torch.channels_last)), images.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for case in seen:
        yield (case[0], case[1], case[2])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100, help="of training, before activations are taken")
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    options = isa.parse(parser, argv)
    columns = [
        "inputs",
        *(f"{mode}: {one}" for mode in MODES for one in PASSES),
        *(f"PyTorch's, {one}" for one in PASSES),
    ]
    title = (
        f"errors of 3x3 convolutions, the largest of {len(SIZES)} sizes or of a network's layers, {options.seeds} seeds"
    )
    table = Table(title, columns, options.out)
    for name, draw in KINDS.items():
        errors = Errors()
        for size in SIZES:
            cases = []
            for seed in range(options.seeds):
                torch.manual_seed(seed)
                cases.append(draw(size))
            errors.add(cases)
        table.add(name, *errors.cells())
    for name, build, pixels in (
        ("ran_compact in training", lambda: create_model("ran_compact"), 32),
        ("ResNet-18 in training", lambda: resnet18(classes=10), 64),
    ):
        torch.manual_seed(0)
        errors = Errors()
        for case in in_training(build(), pixels, options.steps):
            errors.add([case])
        table.add(name, *errors.cells())


if __name__ == "__main__":
    main()
