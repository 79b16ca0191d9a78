"""``python -m ran_ext info`` prints what was built, which kernels run, and why anything is missing.

``python -m ran_ext train`` is ``ran-ext-train``, and ``predict`` is ``ran-ext-predict``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ._command import Parser
from ._info import info, versions


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
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,train,predict}")
    commands.add_parser("info", help="print what was built, which kernels run, and why anything is missing")
    commands.add_parser("train", help="train a network: see train --help")
    commands.add_parser("predict", help="what a network sees in pictures: see predict --help")
    parser.parse_args(argv)
    info()
    return 0


if __name__ == "__main__":
    sys.exit(main())
