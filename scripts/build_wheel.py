#!/usr/bin/env python
"""Build a wheel for the torch that is installed; whoever installs it needs no compiler.

python -m scripts.build_wheel --out dist            the CPU kernels, every instruction set
python -m scripts.build_wheel --out dist --cuda     the CUDA kernels as well; needs nvcc and a CUDA build of torch

A wheel fits one minor version of torch and one of Python, and its name says so, after the version:
ran_ext-0.1.0+torch2.13.cpu-cp311-cp311-linux_x86_64.whl. Where another torch runs, the import says in one sentence
which wheel would fit, and plain PyTorch takes over.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ran_ext._command import Parser

ROOT = Path(__file__).resolve().parent.parent


class WheelError(Exception):
    """What went wrong, in a sentence."""


def tag(version: str, cuda: str | None) -> str:
    """What the wheel's version ends with.

    >>> tag("2.13.0+cpu", None), tag("2.11.0+cu130", "13.0")
    ('+torch2.13.cpu', '+torch2.11.cu130')
    """
    minor = ".".join(version.split(".")[:2])
    return f"+torch{minor}.{'cu' + cuda.replace('.', '') if cuda else 'cpu'}"


def build(out: Path, cuda: bool, platform: str | None) -> Path:
    """Build into ``out``; the wheel.

    Raises:
        WheelError: the build failed, or what it made holds no kernels.
    """
    if cuda and torch.version.cuda is None:
        raise WheelError(f"--cuda needs a CUDA build of torch, and torch {torch.__version__} has no CUDA")
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.glob("*.whl"))
    switches = {"RAN_EXT_FORCE_CUDA": "1", "RAN_EXT_NO_CUDA": ""} if cuda else {"RAN_EXT_NO_CUDA": "1"}
    ending = tag(torch.__version__, torch.version.cuda if cuda else None)
    with tempfile.TemporaryDirectory() as folder:
        words = ["setup.py", "-q", "egg_info", f"--egg-base={folder}", f"--tag-build={ending}"]
        words += ["bdist_wheel", f"--dist-dir={out.resolve()}", *([f"--plat-name={platform}"] if platform else [])]
        environment = {**os.environ, **switches, "RAN_EXT_NO_NATIVE": ""}
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment)
    made = [path for path in out.glob(f"*{ending}*.whl") if path not in before or not done.returncode]
    if done.returncode or not made:
        raise WheelError("the build failed; what it said stands above")
    wheel = max(made, key=lambda path: path.stat().st_mtime)
    kernels = [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("ran_ext/_C.")]
    if len([name for name in kernels if name.endswith((".so", ".pyd"))]) != 1:
        raise WheelError(f"{wheel} holds no compiled module; see what the build said above")
    return wheel


def main(argv: Sequence[str] | None = None) -> int:
    """Print the wheel's path and size; 0, or 1 after an error."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder of the wheel (default: dist)")
    parser.add_argument("--cuda", action="store_true", help="with the CUDA kernels")
    parser.add_argument(
        "--platform", metavar="TAG", help="such as manylinux_2_28_x86_64, where built in such a container"
    )
    options = parser.parse_args(argv)
    try:
        wheel = build(options.out, options.cuda, options.platform)
    except WheelError as error:
        print(f"build_wheel: error: {error}", file=sys.stderr)
        return 1
    print(f"{wheel}  {wheel.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
