#!/usr/bin/env python
"""Measures the paths of the network's passes on a GPU, as ran_ext.tune does, for the table that comes with the package.

python -m benchmarks.dispatch --out FILE --install             on a GPU; also makes it the package's own table
python -m benchmarks.dispatch --out FILE --device cpu --quick  a rehearsal; its times mean nothing

Rows of other architectures are kept. ``csrc/common/measured.h`` says how a row is used, ``ran_ext.explain`` shows it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ran_ext import _backend, _measured, models
from ran_ext._candidates import measure
from ran_ext._command import Parser
from ran_ext._files import write_json
from ran_ext._tune import passes

from .timing import environment

#: Characters of a line of the table, so that a row stands on one.
ROW = 220


def rows(batches: list[int], dtypes: list[torch.dtype], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row for every pass of the network that has several paths, at each batch and dtype."""
    model = models.ran_compact().to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = []
    for batch in batches:
        images = torch.zeros(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        for dtype in dtypes:
            with torch.autocast(device.type, dtype):
                asked = passes(model, (images,))
            for shape, allowed, rule in asked:
                row = _measured.as_row(shape, measure(shape, allowed, rule, rounds))
                print(json.dumps(row), file=sys.stderr, flush=True)
                found += [row] if row["us"] else []
    return found


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: one small batch, two rounds")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--install", action="store_true", help=f"write {_measured.SHIPPED.name} of ran_ext too")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if missing := _backend.why_not_native(device.type):
        parser.error(f"nothing to measure: ran_ext has no kernels for {device.type}: {missing}")
    if options.install and (device.type != "cuda" or options.quick):
        parser.error("--install: the table is for GPUs and measured in full, got --device cpu or --quick")
    batches, dtypes = ([2], [torch.bfloat16]) if options.quick else ([128, 1024], [torch.bfloat16, torch.float16])
    found = rows(batches, dtypes, device, 2 if options.quick else 7)
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "cpu"
    table = json.loads(_measured.SHIPPED.read_text())
    table["tuned"][arch] = found
    table[f"environment {arch}"] = environment(device)
    for path in (options.out, *([_measured.SHIPPED] if options.install else [])):
        write_json(path, table, width=ROW)
    faster = sum(min(row["us"], key=row["us"].get) in ("product", "resident") for row in found)
    print(f"ours is the fastest in {faster} of {len(found)} passes; {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
