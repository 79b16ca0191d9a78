#!/usr/bin/env python
"""Folded networks on the CPU against what serves networks: torch.compile with freezing, onnxruntime and OpenVINO.

All run the same weights with the same number of threads, interleaved; outputs are compared before anything is timed.

python -m benchmarks.inference --out FILE
python -m benchmarks.inference --network resnet18 --dtype bfloat16

python -m benchmarks.inference --isa avx2     as on a processor with AVX2

pip install onnx onnxscript onnxruntime openvino: who is not installed is left out. onnxruntime has no bfloat16; it asks
the processor itself, so that it is left out under --isa avx2.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import ran_ext
from ran_ext._command import Parser
from ran_ext._folded_graph import differ_by

from . import isa
from .contenders import on_backend
from .other_cnns import resnet18, vgg16_bn
from .table import Table
from .timing import Spread, interleave, ratios

#: Network, batch, pixels.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "ran_compact": (lambda: ran_ext.models.create_model("ran_compact"), 32, 32),
    "resnet18": (resnet18, 8, 224),
    "vgg16_bn": (vgg16_bn, 8, 224),
}
EAGER, FROZEN, ONNX, OPENVINO, OURS = "eager", "compile, freezing", "onnxruntime", "OpenVINO", "ran_ext folded"
#: The largest difference to eager in float32, over the largest output.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}

Call = Callable[[], Tensor]


def served(model: nn.Module, images: Tensor, dtype: torch.dtype, folder: Path, native: bool) -> dict[str, Call]:
    """What onnxruntime and OpenVINO make of a network, where they are installed; ``native``: not held to AVX2."""
    found: dict[str, Call] = {}
    path, threads, array = folder / "network.onnx", torch.get_num_threads(), images.numpy()
    torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
    if native and dtype == torch.float32 and importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        [name] = [one.name for one in session.get_inputs()]
        found[ONNX] = lambda: torch.from_numpy(session.run(None, {name: array})[0])
    if importlib.util.find_spec("openvino"):
        import openvino

        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        settings["INFERENCE_NUM_THREADS"] = str(threads)
        compiled = openvino.Core().compile_model(openvino.convert_model(path), "CPU", settings)
        found[OPENVINO] = lambda: torch.from_numpy(compiled([array])[0])
    return found


def calls(
    model: nn.Module, images: Tensor, dtype: torch.dtype, options: argparse.Namespace, folder: Path
) -> dict[str, Call]:
    """Of all contenders, eager first."""
    plain = ran_ext.revert(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    folded = ran_ext.fold_for_inference(plain, dtype, images)
    found = served(plain, images, dtype, folder, options.isa == "native")
    x = images.to(dtype, memory_format=torch.channels_last)
    plain = plain.to(dtype)
    if not options.no_compile:
        frozen = torch.compile(plain, options={"freezing": True}, dynamic=False)
        found[FROZEN] = lambda: frozen(x)
        frozen(x)  # with the backend that is set now
    return {EAGER: lambda: plain(x), **found, OURS: lambda: folded(x)}


def measure(name: str, dtype: torch.dtype, options: argparse.Namespace) -> list[str | float]:
    """A row of the table."""
    make, batch, pixels = NETWORKS[name]
    torch.manual_seed(0)
    model, images = make().eval(), torch.randn(options.batch or batch, 3, pixels, pixels)
    # The library's backend without kernels is plain PyTorch: what others export and compile.
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        expected = model(images)
        with ran_ext.set_backend("reference"):
            found = calls(model, images, dtype, options, Path(folder))
        found = {one: on_backend(call, "auto" if one == OURS else "reference") for one, call in found.items()}
        for one, call in found.items():
            off = differ_by(call().float(), expected)
            if not off <= TOLERANCE[dtype]:
                raise SystemExit(f"{one} is off by {off:.2g} of the largest output of {name}")
        seconds = interleave(found, options.rounds, torch.device("cpu"))
    best = min((one for one in found if one != OURS), key=lambda one: Spread.of(seconds[one]).median)
    own = {base: ratios(seconds, base)[OURS].median for base in (EAGER, best)}
    cells = [1e3 * Spread.of(seconds[one]).median if one in seconds else "" for one in (*CONTENDERS, OURS)]
    return [name, len(images), pixels, str(dtype)[6:], *cells, own[EAGER], best, own[best]]


CONTENDERS = (EAGER, FROZEN, ONNX, OPENVINO)
COLUMNS = ["network", "batch", "pixels", "dtype", *(f"{one}, ms" for one in (*CONTENDERS, OURS))]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row a network and dtype."""
    parser = Parser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="+", default=["float32"])
    parser.add_argument("--batch", type=int, default=0, help="another than the network's")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    options = isa.parse(parser, argv)
    torch.set_num_threads(options.threads)
    table = Table("inference", [*COLUMNS, "over eager", "best other", "over it"], options.out)
    for name in options.network:
        for dtype in options.dtype:
            table.add(*measure(name, getattr(torch, dtype), options))


if __name__ == "__main__":
    main()
