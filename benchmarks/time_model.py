#!/usr/bin/env python
"""Predicts the time of one BN-ReLU-convolution, forward + backward inside CUDA graphs, for each path.

python -m benchmarks.time_model                     with assumed constants
python -m benchmarks.time_model constants.json      with those that constants.py measured

A kernel takes its launch, and the longer of its traffic over the bandwidth and its arithmetic over the rate it reaches.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ran_ext._command import Parser

from .cases import BNReLUConv, units

BYTES = 2  # of one value in 16 bits
BATCHES = (128, 1024)
#: Share of the peak that a library's convolution reaches, by taps, where it was not measured (assumed).
LIBRARY_SHARE = {1: 0.60, 9: 0.70}
#: Share of the peak that a kernel with everything fused reaches, with each kind of tensor-core instruction (assumed).
FUSED_SHARE = {"fused, mma": 0.50, "fused, wgmma": 0.62}
#: Bytes that a kernel can hold in the shared memory of all multiprocessors between two passes (H100, H200).
RESIDENT = 24e6


@dataclass(frozen=True)
class Constants:
    """What is known of a machine; the defaults are assumed for an H200.

    Args:
        launch: seconds of one more kernel inside a graph.
        bandwidth: bytes a second, read and written, beyond the launch.
        peak: operations a second of a large matrix product.
        library: measured seconds by unit and pass ("forward", "dgrad", "batch norm forward", ...).
    """

    launch: float = 1.5e-6
    bandwidth: float = 4.3e12
    peak: float = 790e12
    library: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, dtype: str) -> Constants:
        """Those that constants.py wrote, for one dtype.

        Raises:
            ValueError: the file has none for ``dtype``.
        """
        content = json.loads(path.read_text())
        if dtype not in content["matmul"]:
            raise ValueError(f"time_model: {path} must hold constants for {dtype}, has {', '.join(content['matmul'])}")
        size = max(content["copy"], key=int)
        moved = 2 * (int(size) << 20)
        rows = [row for row in content["units"] if row["dtype"] == dtype]
        return cls(
            content["launch"],
            moved / (moved / content["copy"][size] - content["launch"]),  # the model counts the launch apart
            content["matmul"][dtype],
            {(row["unit"], name): row[name] for row in rows for name in row.keys() - {"unit", "dtype"}},
        )

    def seconds(self, launches: int, moved: float = 0.0, operations: float = 0.0, share: float = 1.0) -> float:
        """Of ``launches`` kernels that together move ``moved`` bytes and do ``operations`` at ``share`` of the peak."""
        return launches * self.launch + max(moved / self.bandwidth, operations / (share * self.peak))


def unit_seconds(unit: BNReLUConv, constants: Constants) -> dict[str, float]:
    """Seconds of one unit by strategy; what ``constants`` measured of the library takes the place of the model's.

    >>> {name: round(1e6 * value) for name, value in unit_seconds(units(128)[0], Constants()).items()}
    {'eager': 58, 'compile': 46, 'one-kernel BN': 30, 'fused, mma': 28, 'fused, wgmma': 28}
    """
    n, c, h, w = unit.shape
    pixels, taps = n * h * w, unit.kernel**2
    x, y, weight = BYTES * pixels * c, BYTES * pixels * unit.out_channels, BYTES * c * unit.out_channels * taps
    operations, k = unit.flops(False), constants.seconds

    def measured(name: str, modelled: float) -> float:
        return constants.library.get((unit.name, name), modelled)

    convolution = (x + y + weight, operations, LIBRARY_SHARE[taps])
    library = measured("forward", k(1, *convolution)) + measured("dgrad", k(1, *convolution))
    library += measured("wgrad", k(2, *convolution))
    norm = measured("batch norm forward", k(4, x) + k(1, 2 * x))
    norm += measured("batch norm backward", k(1) + k(1, 2 * x) + k(1, 3 * x))
    relu = k(1, 2 * x) + k(1, 3 * x)
    resident = k(1, 2 * x) if x <= RESIDENT else k(2, x) + k(1, 2 * x)
    resident += k(1, 3 * x) if 2 * x <= RESIDENT else k(2, 2 * x) + k(1, 3 * x)
    times = {
        "eager": norm + relu + library,
        "compile": k(2, x) + k(1, 2 * x) + library + k(2, 3 * x) + k(1, 4 * x),
        "one-kernel BN": resident + library,
    }
    for name, share in FUSED_SHARE.items():
        products = k(1, x + y + weight, operations, share) + k(1, 2 * x + y + weight, operations, share)
        times[name] = products + k(2, x + y + weight, operations, share) + k(1, 3 * x) + k(1)
    return times


def table(batch: int, constants: Constants) -> str:
    """Microseconds of the seven units and their sum, and of the sum how many times faster than compile."""
    rows = {unit.name.removeprefix("bn_relu_conv2d "): unit_seconds(unit, constants) for unit in units(batch)}
    strategies = list(next(iter(rows.values())))
    rows["sum"] = {name: sum(times[name] for times in rows.values()) for name in strategies}
    lines = [f"| batch {batch}, us | " + " | ".join(strategies) + " |", "| --- |" + " ---: |" * len(strategies)]
    for unit, times in rows.items():
        lines.append(f"| {unit} | " + " | ".join(f"{1e6 * times[name]:.1f}" for name in strategies) + " |")
    faster = (f"{rows['sum']['compile'] / rows['sum'][name]:.2f}" for name in strategies)
    return "\n".join([*lines, "| times faster than compile | " + " | ".join(faster) + " |"])


def main(argv: list[str] | None = None) -> int:
    """Print the constants, where each is from, and the tables."""
    parser = Parser(description=__doc__)
    parser.add_argument("constants", type=Path, nargs="?", help="JSON of constants.py; without it all are assumed")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    options = parser.parse_args(argv)
    try:
        constants = Constants.read(options.constants, options.dtype) if options.constants else Constants()
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    source = f"measured, {options.constants}" if options.constants else "assumed"
    print(f"launch {1e6 * constants.launch:.2f} us ({source})")
    print(f"bandwidth {constants.bandwidth / 1e12:.3g} TB/s ({source})")
    print(f"matrix products {constants.peak / 1e12:.3g} TFLOP/s ({source})")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in FUSED_SHARE.items())
    print(f"share of those that a fused kernel reaches: {shares} (assumed)")
    for batch in BATCHES:
        known = any((unit.name, "forward") in constants.library for unit in units(batch))
        print(f"\nThe library's convolutions and batch norm: {source if known else 'assumed'}\n")
        print(table(batch, constants))
    return 0


if __name__ == "__main__":
    sys.exit(main())
