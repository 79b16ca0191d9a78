#!/usr/bin/env python
"""Measures the constants of the time model here: launch, copies, matrix products, the library's convolutions and BN.

python -m benchmarks.constants --out constants.json          then: python -m benchmarks.time_model constants.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ran_ext._command import Parser
from ran_ext._files import write_json

from .cases import BNReLUConv, units
from .contenders import captured
from .timing import Spread, copy_rate, environment, interleave, matmul_rate

#: Sizes of the network's activations at batch 128 and 1024, MiB.
COPIES = (4, 8, 64)
#: Kernels in the graph whose replay gives the time of one launch.
LAUNCHES = 200


def launch_seconds(device: torch.device, rounds: int) -> float:
    """Seconds from one kernel to the next in a CUDA graph of nearly empty kernels; on a CPU, seconds of a call."""
    counter = torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            counter.add_(1)

    function = captured(launches) if device.type == "cuda" else launches
    return Spread.of(interleave({"launches": function}, rounds, device)["launches"]).median / LAUNCHES


def unit_seconds(unit: BNReLUConv, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of the library's passes over one BN-ReLU-convolution: forward, dgrad and wgrad, and batch norm's both."""
    inputs = unit.inputs(dtype, torch.channels_last, device)
    x, gamma, beta, mean, var, weight, _ = inputs
    image, kernel, padding = x.detach(), weight.detach(), [unit.kernel // 2] * 2
    dout = torch.randn_like(F.conv2d(image, kernel, padding=padding))
    normalised = F.batch_norm(x, mean, var, gamma, beta, training=True)
    dnormalised = torch.randn_like(normalised)

    def convolution_backward(data: bool) -> Callable[[], Any]:
        arguments = (dout, image, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [data, not data, False])
        return lambda: torch.ops.aten.convolution_backward(*arguments)

    functions = {
        "forward": lambda: F.conv2d(image, kernel, padding=padding),
        "dgrad": convolution_backward(True),
        "wgrad": convolution_backward(False),
        "batch norm forward": lambda: F.batch_norm(x, mean, var, gamma, beta, training=True),
        "batch norm backward": lambda: torch.autograd.grad(
            normalised, (x, gamma, beta), dnormalised, retain_graph=True
        ),
    }
    seconds = interleave(functions, rounds, device, flush=True, warm_up=min(3, rounds))
    return {name: Spread.of(values).median for name, values in seconds.items()}


def measure(device: torch.device, quick: bool) -> dict[str, Any]:
    """All constants, fit for JSON: seconds, bytes a second, operations a second."""
    dtypes = [torch.bfloat16] if quick else [torch.bfloat16, torch.float16]
    cuda, rounds = device.type == "cuda", 1 if quick else 7
    rows = []
    for batch in (1,) if quick else (128, 1024):
        for dtype in dtypes:
            for unit in units(batch):
                print(f"timing {unit.name}, {_name(dtype)}", file=sys.stderr, flush=True)
                rows.append({"unit": unit.name, "dtype": _name(dtype), **unit_seconds(unit, dtype, device, rounds)})
    return {
        "launch": launch_seconds(device, rounds),
        "copy": {str(size): copy_rate(device, size) for size in COPIES},
        "matmul": {_name(dtype): matmul_rate(device, dtype, 8192 if cuda else 256) for dtype in dtypes},
        "units": rows,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = Parser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: batch 1, bfloat16 only, one round")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    torch.backends.cudnn.benchmark = True
    device = torch.device(options.device)
    found = {"environment": environment(device), **measure(device, options.quick)}
    print(f"launch {1e6 * found['launch']:.2f} us")
    print(*(f"copy {size} MiB {rate / 1e9:.0f} GB/s" for size, rate in found["copy"].items()), sep="\n")
    print(*(f"matmul {name} {rate / 1e12:.1f} TFLOP/s" for name, rate in found["matmul"].items()), sep="\n")
    for row in found["units"]:
        times = ", ".join(f"{name} {1e6 * value:.1f}" for name, value in row.items() if isinstance(value, float))
        print(f"{row['unit']}, {row['dtype']}, us: {times}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
