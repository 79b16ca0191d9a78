#!/usr/bin/env python
"""What ``ran_ext.convert`` gains on other people's networks, on the CPU: training steps and bytes kept, float32.

Each network as it is written, in channels_last, against a converted copy, interleaved in one run.

python -m benchmarks.converted --rounds 9 --out benchmarks/results/cpu_convert.json
python -m benchmarks.converted --isa avx2                   the same as on a processor without AVX-512
python -m benchmarks.converted --compiled --network PreActResNet-18 DenseNet-BC-100-12      both under torch.compile
python -m benchmarks.converted --budget --network PreActResNet-18 MobileNetV2      beside torch.compile's memory budget
python -m benchmarks.converted --network efficientnet_b0 hrnet_w18      of torchvision or timm, whichever is installed
python -m benchmarks.converted --overhead                   what a converted layer costs beside its kernels
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ran_ext
from ran_ext._command import Parser
from ran_ext._compare import bytes_kept

from . import isa
from .other_cnns import (
    UNet,
    densenet121,
    densenet_bc,
    mobilenet_v2,
    preact_resnet18,
    resnet18,
    resnet50,
    silu_stack,
    vgg16_bn,
    wide_resnet,
)
from .table import Table
from .timing import interleave

#: Name, network, batch, pixels.
Row = tuple[str, Callable[[], nn.Module], int, int]
NETWORKS: list[Row] = [
    ("ResNet-18", resnet18, 16, 128),
    ("ResNet-18, 224 pixels", resnet18, 16, 224),
    ("ResNet-50", resnet50, 16, 128),
    ("VGG-16 with batch normalisation", vgg16_bn, 16, 64),
    ("PreActResNet-18", preact_resnet18, 32, 32),
    ("WRN-16-4", lambda: wide_resnet(16, 4), 32, 32),
    ("U-Net, width 32", lambda: UNet(32), 8, 64),
    ("DenseNet-BC-100-12", densenet_bc, 16, 32),
    ("SiLU stack", silu_stack, 16, 64),
    ("WRN-16-4, dropout", lambda: wide_resnet(16, 4, 0.3), 32, 32),
    ("MobileNetV2", mobilenet_v2, 16, 128),
    ("DenseNet-121", densenet121, 8, 64),
]
#: Parts of eager's bytes that ``torch.compile`` may keep; 1: as it does by itself.
BUDGETS = (1.0, 0.7, 0.5)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row a network."""
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    names = ", ".join(row[0] for row in NETWORKS)
    parser.add_argument("--network", nargs="+", help=f"these alone; here are {names}; others by torchvision's names")
    parser.add_argument("--budget", action="store_true", help="converted, and compiled with a memory budget")
    parser.add_argument("--compiled", action="store_true", help="eager, compiled, and converted and compiled")
    parser.add_argument("--overhead", action="store_true", help="microseconds a layer on tiny tensors")
    options = isa.parse(parser, argv)
    if options.overhead:
        return overhead(options.out)
    chosen = [found(name) for name in options.network] if options.network else NETWORKS
    if options.budget:
        return budgets(chosen, options.rounds, options.out)
    if options.compiled:
        return compiled(chosen, options.rounds, options.out)
    columns = ["network", "batch", "pixels", "eager, ms", "converted, ms", "times as fast", "bytes kept, of eager's"]
    table = Table("training step, float32, channels_last", columns, options.out)
    for name, build, batch, pixels in chosen:
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            both = ran_ext.compare(build(), torch.randn(batch, 3, pixels, pixels), rounds=options.rounds)
        milliseconds = 1e3 * both.plain_seconds, 1e3 * both.converted_seconds
        table.add(name, batch, pixels, *milliseconds, both.speedup, both.converted_bytes / both.plain_bytes)


def found(name: str) -> Row:
    """The network of a name: one of those here, else torchvision's or timm's, 16 images of 128 pixels."""
    for row in NETWORKS:
        if row[0] == name:
            return row
    for library, make in (("torchvision.models", "get_model"), ("timm", "create_model")):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(library)
            if name in module.list_models():
                return name, partial(getattr(module, make), name), 16, 128
    raise SystemExit(f"benchmarks.converted: --network {name}: not among those here, of torchvision or of timm")


def drawn(build: Callable[[], nn.Module], batch: int, pixels: int) -> tuple[nn.Module, Tensor]:
    """A network to be compiled and its images, in channels_last."""
    torch.compiler.reset()  # of a code compiled for many networks Dynamo compiles no more, and runs it as it is
    torch.manual_seed(0)
    plain = build().train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return plain, torch.randn(batch, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)


def budgets(chosen: Sequence[Row], rounds: int, out: Path | None) -> None:
    """Print rows a network: eager, converted, and under ``torch.compile`` with each budget."""
    columns = ["network", "batch", "pixels", "contender", "ms", "times as fast as eager", "bytes kept, of eager's"]
    table = Table("training step, float32, channels_last, torch.compile's memory budget", columns, out)
    for name, build, batch, pixels in chosen:
        plain, x = drawn(build, batch, pixels)
        networks: dict[str, Any] = {"eager": plain, "converted": ran_ext.convert(copy.deepcopy(plain))}
        for budget in BUDGETS:
            networks[f"compiled, {budget}"] = torch.compile(copy.deepcopy(plain), backend=partial(within, budget))
        steps = {key: partial(step, network, x) for key, network in networks.items()}
        seconds = interleave(steps, rounds, torch.device("cpu"))
        kept = {key: bytes_kept(network, [x]) for key, network in networks.items()}
        for key, times in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(seconds["eager"], times, strict=True))
            table.add(name, batch, pixels, key, 1e3 * statistics.median(times), ratio, kept[key] / kept["eager"])


def within(budget: float, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., object]:
    """Inductor, keeping at most this part of what eager keeps: a backend of ``torch.compile``."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(activation_memory_budget=budget):
        return compile_fx(graph, inputs)  # type: ignore[return-value,arg-type]


def compiled(chosen: Sequence[Row], rounds: int, out: Path | None) -> None:
    """Print a row a network: as it is written, under ``torch.compile``, and converted under ``torch.compile``."""
    columns = ["network", "batch", "pixels", "eager, ms", "compiled, ms", "converted and compiled, ms"]
    columns += ["times as fast as eager", "as compiled", "bytes kept compiled, of eager's", "converted and compiled"]
    table = Table("training step, float32, channels_last, torch.compile", columns, out)
    for name, build, batch, pixels in chosen:
        plain, x = drawn(build, batch, pixels)
        networks: dict[str, Any] = {
            "eager": plain,
            "compiled": torch.compile(copy.deepcopy(plain)),
            "converted": torch.compile(ran_ext.convert(copy.deepcopy(plain))),
        }
        steps = {key: partial(step, network, x) for key, network in networks.items()}
        seconds = interleave(steps, rounds, torch.device("cpu"))
        kept = {key: bytes_kept(network, [x]) for key, network in networks.items()}
        milliseconds = [1e3 * statistics.median(times) for times in seconds.values()]
        ratios = [
            statistics.median(a / b for a, b in zip(seconds[key], seconds["converted"], strict=True))
            for key in ("eager", "compiled")
        ]
        shares = [kept[key] / kept["eager"] for key in ("compiled", "converted")]
        table.add(name, batch, pixels, *milliseconds, *ratios, *shares)


def overhead(out: Path | None, layers: int = 20, rounds: int = 400) -> None:
    """Print what a BN-ReLU-convolution of 8 channels and 4 pixels takes, one thread: nearly all of it is calls."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False))]
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), *parts).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    networks = {"eager": plain, "converted": ran_ext.convert(copy.deepcopy(plain))}
    steps = {name: partial(step, network, x) for name, network in networks.items()}
    seconds = interleave(steps, rounds, torch.device("cpu"))
    eager, converted = (1e6 * min(times) / layers for times in seconds.values())  # the least: what is more is waiting
    columns = ["layers", "eager, us a layer", "converted, us a layer", "more, us a layer"]
    Table("forward and backward, the least of the rounds", columns, out).add(
        layers, eager, converted, converted - eager
    )


def step(network: nn.Module, x: Tensor) -> None:
    """Forward and backward."""
    network.zero_grad(set_to_none=True)
    network(x).sum().backward()


if __name__ == "__main__":
    main()
