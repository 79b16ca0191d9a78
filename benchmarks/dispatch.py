#!/usr/bin/env python
"""Measures the two paths of a pass on a GPU, and writes the table from which the package chooses.

Those of a 1x1 convolution are the fused kernel and the library's; those of BN-ReLU the kernel that holds a tensor in
shared memory and those that stream it, in this order under the same keys, fused_us and library_us.

python -m benchmarks.dispatch --out FILE --install             on a GPU; also makes it the package's own table
python -m benchmarks.dispatch --out FILE --device cpu --quick  a rehearsal; its times mean nothing

Rows of other architectures are kept. ``csrc/common/measured.h`` says how a row is used, ``ran_ext.explain`` shows it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ran_ext import _backend
from ran_ext._command import Parser
from ran_ext._files import write_json

from .cases import BNReLU, BNReLUConv, ConvGate, conv_gates, draw, units
from .timing import Spread, environment, interleave

AnyCase = BNReLU | BNReLUConv | ConvGate
PASSES = {"forward": None, "dgrad": [True, False, False], "wgrad": [False, True, True]}
#: The environment variable that chooses, and its names for the fused kernel and the other path.
PATHS = {
    BNReLU: ("RAN_EXT_BN_RELU", ("resident", "streaming")),
    BNReLUConv: ("RAN_EXT_CONV1X1", ("fused", "library")),
    ConvGate: ("RAN_EXT_CONV1X1", ("fused", "library")),
}


def passes(case: AnyCase) -> list[str]:
    """The case's passes that have two paths."""
    if isinstance(case, BNReLU):
        return ["bn_relu", "bn_relu_backward"]
    return ["gate"] if isinstance(case, ConvGate) else list(PASSES)


def run_pass(case: AnyCase, name: str, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """One pass of the op, without autograd around it."""
    with torch.no_grad():
        if isinstance(case, BNReLU):
            x, weight, bias, _, _ = (t.detach() for t in case.inputs(dtype, torch.channels_last, device))
            dout = draw(case.shape, 1, dtype, device, torch.channels_last)
            mean, var = torch.ops.ran_ext.batch_norm_stats(x, [], None)
            if name == "bn_relu":
                return lambda: torch.ops.ran_ext.bn_relu(x, weight, bias, None, None, True, [], None, 1e-5)
            return lambda: torch.ops.ran_ext.bn_relu_backward(dout, x, weight, bias, mean, var, 1e-5, True)
        if isinstance(case, ConvGate):
            gate = [t.detach() for t in case.inputs(dtype, torch.channels_last, device)]
            return lambda: torch.ops.ran_ext.conv_attention_gate(*gate, 2)
        x, bn_weight, bn_bias, _, _, weight, bias = case.inputs(dtype, torch.channels_last, device)
        mean, var = torch.ops.ran_ext.batch_norm_stats(x, [], None)
        norm, geometry = (bn_weight, bn_bias, mean, var), ([1, 1], [0, 0])
        out = case.plain(x, bn_weight, bn_bias, mean.clone(), var.clone(), weight, bias)
    if name == "forward":
        named = dict(zip(("bn_weight", "bn_bias", "mean", "var"), norm, strict=True))
        return lambda: torch.ops.ran_ext.bn_relu_conv2d(x.detach(), weight, bias, running=[], **named)
    wanted = PASSES[name]
    return lambda: torch.ops.ran_ext.bn_relu_conv2d_backward(out, x, *norm, weight, *geometry, 1e-5, True, wanted, None)


@contextmanager
def chosen(variable: str, path: str) -> Iterator[None]:
    """With ``variable=path`` in the environment."""
    before = os.environ.get(variable)
    os.environ[variable] = path
    try:
        yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


def measure(batches: list[int], dtypes: list[torch.dtype], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row for every pass of every BN-ReLU of the network, and of every 1x1 convolution after one or before a gate."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    rows = []
    cases: list[AnyCase] = [case for batch in batches for case in units(batch) if case.kernel == 1]
    cases += [case for batch in batches for case in conv_gates(batch)]
    cases += [BNReLU(shape) for batch in batches for shape in dict.fromkeys(case.shape for case in units(batch))]
    for case in cases:
        variable, names = PATHS[type(case)]
        for dtype in dtypes:
            for name in passes(case):
                call = run_pass(case, name, dtype, device)

                def timed(
                    path: str, call: Callable[[], object] = call, variable: str = variable
                ) -> Callable[[], object]:
                    def run() -> object:
                        with torch.no_grad(), chosen(variable, path):
                            return call()

                    return run

                seconds = interleave({path: timed(path) for path in names}, rounds, device, flush=True)
                medians = [round(1e6 * Spread.of(seconds[path]).median, 2) for path in names]
                times = dict(zip(("fused_us", "library_us"), medians, strict=True))
                n, c, h, w = case.shape
                pixels = n * h * w // 4 if isinstance(case, ConvGate) else n * h * w
                c_out = case.out_channels if isinstance(case, BNReLUConv) else c
                rows.append({"arch": 10 * major + minor, "dtype": str(dtype).removeprefix("torch."), "pass": name})
                rows[-1] |= {"rows": pixels, "c_in": c, "c_out": c_out, **times}
                print(f"{case.name}, {rows[-1]['dtype']}, {name}: {times}", file=sys.stderr, flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: one small batch, two rounds")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--install", action="store_true", help=f"write {_backend.DISPATCH_FILE.name} of ran_ext too")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if missing := _backend.why_not_native(device.type):
        parser.error(f"nothing to measure: ran_ext has no kernels for {device.type}: {missing}")
    if options.install and (device.type != "cuda" or options.quick):
        parser.error("--install: the table is for GPUs and measured in full, got --device cpu or --quick")
    torch.backends.cudnn.benchmark = True
    batches, dtypes = ([2], [torch.bfloat16]) if options.quick else ([128, 1024], [torch.bfloat16, torch.float16])
    found = measure(batches, dtypes, device, 2 if options.quick else 15)
    table = json.loads(_backend.DISPATCH_FILE.read_text())
    arch = found[0]["arch"]
    kept = [row for row in table["measured"] if row["arch"] != arch]
    table |= {"measured": kept + found, f"environment {arch}": environment(device)}
    for path in (options.out, *([_backend.DISPATCH_FILE] if options.install else [])):
        write_json(path, table)
    faster = sum(row["fused_us"] < row["library_us"] for row in found)
    print(f"fused is faster in {faster} of {len(found)} passes; {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
