#!/usr/bin/env python
"""Compiles for the GPU suite beforehand, on a machine without a GPU.

python -m scripts.prebuilt --out DIR --archs 9.0      build; with the Python and the torch of the machine with the GPU
python -m scripts.prebuilt --install DIR              put the extension into this checkout
python -m scripts.gpu_suite --prebuilt DIR ...        does that, and compiles nothing

Holds the extension, the program of tests/emulation/compare_gpu.py, and what its emulation computes for the chip. Needs
a torch with CUDA and its nvcc. It fits one Python, one torch and one state of csrc, and says so where they differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _build import native
from ran_ext._command import Parser

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ran_ext"
#: What the emulation has to know of a chip: capability, SMs, shared bytes a block and an SM.
CHIPS = {"h100": ["90", "132", str(227 << 10), str(228 << 10)], "a100": ["80", "108", str(163 << 10), str(164 << 10)]}


def state(torch_version: str) -> dict[str, Any]:
    """What a prebuilt folder must agree with."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return {"python": ".".join(platform.python_version_tuple()[:2]), "torch": torch_version, "csrc": digest.hexdigest()}


def check(folder: Path) -> dict[str, Any]:
    """The folder's manifest.

    Raises:
        ValueError: it was made for another Python, torch or csrc, or is none.
    """
    path = folder / "prebuilt.json"
    if not path.exists():
        raise ValueError(f"--prebuilt: {folder} holds no prebuilt.json; python -m scripts.prebuilt --out makes one")
    import torch

    made, here = json.loads(path.read_text()), state(torch.__version__)
    for name, value in here.items():
        if made[name] != value:
            raise ValueError(f"--prebuilt: {folder} was made for {name} {made[name]}, here it is {value}; make it anew")
    return dict(made)


def install(folder: Path) -> None:
    """Put the extension into this checkout."""
    check(folder)
    for path in [*folder.glob("_C*.so"), folder / "_built_for.py"]:  # renamed: the one that is there may be loaded here
        beside = PACKAGE / f"{path.name}.new"
        shutil.copy2(path, beside)
        beside.replace(PACKAGE / path.name)


def make(folder: Path, archs: str, chip: str) -> None:
    """Build all of it."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    build = folder / "build"
    environment = {**os.environ, "RAN_EXT_FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": archs}

    def run(*command: object) -> None:
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True)

    run("setup.py", "build_ext", "--build-lib", build / "lib", "--build-temp", build / "temp")
    for path in (build / "lib" / "ran_ext").glob("_C*.so"):
        shutil.copy2(path, folder / path.name)
    run("setup.py", "build_py", "--build-lib", build / "lib")
    shutil.copy2(build / "lib" / "ran_ext" / "_built_for.py", folder / "_built_for.py")
    prepare = ["--prepare", folder, "--archs", archs, "--objects", native.OBJECTS, "--limits", *CHIPS[chip]]
    run("-m", "tests.emulation.compare_gpu", *prepare)
    (folder / "prebuilt.json").write_text(json.dumps({**state(torch.__version__), "archs": archs}, indent=1) + "\n")
    shutil.rmtree(build)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", help="build, into this folder")
    parser.add_argument("--archs", default="9.0", help="as TORCH_CUDA_ARCH_LIST has them (default: 9.0)")
    parser.add_argument("--chip", choices=sorted(CHIPS), default="h100", help="whose emulation is computed")
    parser.add_argument("--install", type=Path, metavar="DIR", help="put its extension into the checkout")
    options = parser.parse_args(argv)
    if (options.out is None) == (options.install is None):
        parser.error("give --out to build, or --install to use what was built")
    try:
        if options.out is not None:
            make(options.out.resolve(), options.archs, options.chip)
        else:
            install(options.install)
    except (ValueError, OSError, subprocess.CalledProcessError) as failure:
        print(f"prebuilt: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
