"""The CUDA kernels of the 1x1 convolutions, run on the CPU against double: see tests/emulation."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-DRAN_EMULATE", "-fno-strict-aliasing"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("name", ["forward", "dgrad", "wgrad"])
def test_kernels_match_double(name: str, tmp_path: Path) -> None:
    emulation, csrc = ROOT / "tests" / "emulation", ROOT / "csrc"
    source, program = emulation / f"conv1x1_{name}_test.cpp", tmp_path / name
    include = [f"-I{folder}" for folder in (csrc / "cuda", csrc, emulation)]
    built = subprocess.run(["g++", *FLAGS, *include, source, "-o", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"conv1x1 {name}: ok\n"
