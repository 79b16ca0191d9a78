"""``python -m ran_ext info`` prints what was built and what runs; ``tune`` measures which paths are fastest here.

``python -m ran_ext train`` is ``ran-ext-train``, and ``predict`` is ``ran-ext-predict``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

import torch

from . import models
from ._candidates import ROUNDS
from ._command import Parser
from ._info import info, versions
from ._tune import require_kernels, tune

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand; 0, or argparse's exit.

    >>> main(["info"])  # doctest: +ELLIPSIS
    ran_ext          ...
    0
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] in (["train"], ["predict"]):
        from . import predict  # imports the trainer, which the others need not wait for
        from .train import cli

        return {"train": cli.main, "predict": predict.main}[given[0]](given[1:])
    parser = Parser(prog="python -m ran_ext", description="Fused kernels for training in PyTorch.")
    parser.add_argument("--version", action="version", version=versions())
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,tune,train,predict}")
    commands.add_parser("info", help="print what was built, which kernels run, and why anything is missing")
    tuning = commands.add_parser(
        "tune",
        help="measure which paths of a network are fastest on this machine, and keep them",
        description="Measure every path that the passes of a network's training step can take, and keep\n"
        "the times in the user's cache folder: later processes on this machine take the fastest.",
    )
    tuning.add_argument("--model", choices=models.list_models(), default="ran_compact", help="(default: ran_compact)")
    tuning.add_argument("--batch", type=whole_number, default=128, help="images of a step (default: 128)")
    tuning.add_argument("--size", type=whole_number, default=32, help="height and width of an image (default: 32)")
    tuning.add_argument("--dtype", choices=DTYPES, default="float32", help="of autocast (default: float32, none)")
    tuning.add_argument("--device", type=device, default=torch.device("cpu"), help="cpu or cuda (default: cpu)")
    tuning.add_argument("--threads", type=whole_number, default=None, help="of the CPU (default: torch's)")
    tuning.add_argument("--rounds", type=whole_number, default=ROUNDS, help=f"timings of a path (default: {ROUNDS})")
    commands.add_parser("train", help="train a network: see train --help")
    commands.add_parser("predict", help="what a network sees in pictures: see predict --help")
    parser.epilog = tuning.format_help()
    options, unknown = parser.parse_known_args(argv)
    if unknown:  # the subcommand's own parser knows which flag is near
        (tuning if options.command == "tune" else parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command == "info":
        info()
    else:
        _tune(tuning, options)
    return 0


def device(text: str) -> torch.device:
    """The CPU or a GPU, of the command line."""
    if re.fullmatch(r"cpu|cuda(:\d+)?", text):
        return torch.device(text)
    raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:0 and so on, got {text}")


def whole_number(text: str) -> int:
    """A whole number from 1 on, of the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _tune(parser: Parser, options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    try:
        require_kernels(options.device)
        model = models.create_model(options.model).to(options.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = torch.zeros(options.batch, 3, options.size, options.size, device=options.device)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(options.device.type, dtype, enabled=dtype != torch.float32):
            print(tune(model, images, rounds=options.rounds))
    except (RuntimeError, ValueError) as error:  # no GPU, no kernels, too small an image
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
