#!/usr/bin/env python
"""Test accuracy of the sample run at each of its scales and dtypes: what `ran_ext.train.config` promises.

python -m benchmarks.sample_scales                      the runs that results/cpu_sample_scales.json lacks
python -m benchmarks.sample_scales --scale full --dtype float32 --seeds 1
python -m benchmarks.sample_scales --scale short --dtype float32 --seeds 5 --conv3x3 library --out library.json

Prints the table to copy into ran_ext/train/config.py; the tests hold it to the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ran_ext import get_conv3x3, set_conv3x3
from ran_ext._command import Parser
from ran_ext._paths import CONV3X3_MODES
from ran_ext.train import PRESETS, Config, Ranks, fit
from ran_ext.train.arguments import SAMPLE
from ran_ext.train.cli import load_data
from ran_ext.train.config import SCALES

from .command import run_command
from .ledger import Ledger
from .timing import environment

DTYPES = ("bfloat16", "float32")
RESULTS = Path(__file__).resolve().parent / "results" / "cpu_sample_scales.json"
CPU = torch.device("cpu")


def measure(scale: str, dtype: str, seed: int) -> dict[str, Any]:
    """One run.

    Raises:
        KeyboardInterrupt: the run was asked to stop.
    """
    config = SCALES[scale].apply(dataclasses.replace(PRESETS["sample"], dtype=dtype, seed=seed))
    train_set, val_set, test_set = load_data(SAMPLE, config)
    torch.manual_seed(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(0, 1, CPU)
        result = fit(config.create_model(), train_set, val_set, config, folder, test_set=test_set, ranks=ranks)
    if result.test is None:
        raise KeyboardInterrupt
    return row(config, scale, result.test.accuracy, result.seconds)


def row(config: Config, scale: str, accuracy: float, seconds: float) -> dict[str, Any]:
    """Of the results."""
    return {
        "scale": scale,
        "dtype": config.dtype,
        "seed": config.seed,
        "epochs": config.epochs,
        "width": config.model_options.get("width", 1.0),
        "test_accuracy": accuracy,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracies by scale and dtype, as they stand in the code.

    >>> print(table([{"scale": "full", "dtype": "bfloat16", "seed": 0, "test_accuracy": 0.5}]))
    full {'bfloat16': (0.5,)}
    """
    lines = []
    for scale in SCALES:
        found = {
            dtype: tuple(row["test_accuracy"] for row in rows if (row["scale"], row["dtype"]) == (scale, dtype))
            for dtype in DTYPES
        }
        found = {dtype: values for dtype, values in found.items() if values}
        lines += [f"{scale} {found}"] if found else []
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    """Measure what is missing, then print all."""
    settings: dict[str, Any] = {"recipe": PRESETS["sample"].to_dict(), "device": "cpu"}
    if options.conv3x3 != get_conv3x3():
        settings["conv3x3"] = options.conv3x3
    ledger = Ledger(options.out, settings, environment(CPU))
    for seed, scale, dtype in itertools.product(range(options.seeds), options.scale, options.dtype):
        if not ledger.find(scale=scale, dtype=dtype, seed=seed):
            print(f"{scale}, {dtype}, seed {seed}", flush=True)
            with set_conv3x3(options.conv3x3):
                ledger.add(measure(scale, dtype, seed))
    print(table(ledger.rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--scale", choices=SCALES, nargs="+", default=list(SCALES), help="these alone")
    add("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="these alone")
    add("--seeds", type=int, default=3, help="how many, from 0 (default: 3)")
    add("--conv3x3", choices=CONV3X3_MODES, default=get_conv3x3(), help="of set_conv3x3 (default: fast)")
    add("--out", type=Path, default=RESULTS, help="JSON (default: that of the repository)")
    options = parser.parse_args(argv)
    return run_command("sample_scales", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
