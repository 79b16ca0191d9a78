#!/usr/bin/env python
"""The report's experiment, in ran_ext and in a plain reference side by side: figures 4 to 7, Table 1, the claims.

python -m scripts.reproduce_report --out runs/report --scale smoke      the embedded images, about a minute
python -m scripts.reproduce_report --out runs/report                    narrow networks, 100 minutes on 2 CPU cores
python -m scripts.reproduce_report --out runs/report --scale short      full size, 12 epochs, ran_ext alone: 5 hours
python -m scripts.reproduce_report --out runs/report --scale full       as the report did, on a GPU

Leaves report.html, report.md, the figures, runs.csv and epochs.csv in --out. The same command again continues where it
was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.command import run_command
from benchmarks.experiments.outcomes import Study
from benchmarks.experiments.page import write_page
from benchmarks.experiments.plan import SCALES
from benchmarks.experiments.runs import Deadline, Runner, Stopped, load_images
from benchmarks.experiments.sections import build
from benchmarks.experiments.tables import write_tables
from benchmarks.timing import environment
from ran_ext._command import Parser
from ran_ext.train import Config, Ranks, resolve_dtype
from ran_ext.train.system import choose_device, keep_freed_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, also when --minutes are over, 1 after an error, 130 after Ctrl-C."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the runs and of the page")
    add("--scale", choices=SCALES, default="subset", help="how large the runs are (default: subset)")
    add("--data", type=Path, default=Path("data"), help="folder of CIFAR-10 (default: data; smoke needs none)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="float32",
        help="of ran_ext's networks (default: float32, which is all that the reference has)")  # fmt: skip
    add("--minutes", type=float, help="stop after so many; the same command continues")
    options = parser.parse_args(argv)
    return run_command("reproduce_report", lambda: reproduce(options), how_to_continue(options))


def reproduce(options: argparse.Namespace) -> int:
    """Train what is missing, then write the page; the exit status."""
    keep_freed_memory()
    device, deadline = choose_device(options.device), Deadline(options.minutes)
    torch.backends.cudnn.benchmark = True
    dtype = resolve_dtype(Config(dtype=options.dtype), Ranks(0, 1, device)).dtype
    scale = dataclasses.replace(SCALES[options.scale], dtype=dtype)
    study = Study(options.scale, scale, options.out, environment(device)["device"])
    images = load_images(study.scale, options.data)
    try:
        Runner(study, images, device, deadline).run_all()
    except Stopped as reason:
        print(f"reproduce_report: {reason}; {len(study.missing)} of {len(study.plan)} runs remain; "
              f"{how_to_continue(options)}", file=sys.stderr)  # fmt: skip
    if study.outcomes:
        write_tables(study.outcomes, options.out)
        for path in write_page(build(study, images), options.out):
            print(path)
    return 0


def how_to_continue(options: argparse.Namespace) -> str:
    """For people."""
    return f"to continue: the same command again, with --out {options.out}"


if __name__ == "__main__":
    sys.exit(main())
