"""The GPU's torch side and its fused 3x3 convolutions, run on the CPU: errors and bytes. See tests/emulated_gpu."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EMULATED = ROOT / "tests" / "emulated_gpu"
KERNELS = {"forward3x3_kernel", "dgrad3x3_kernel", "wgrad3x3_kernel"}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulated_gpu")
    command = [sys.executable, "-m", "tests.emulated_gpu.build", request.config.cache.mkdir("emulated_gpu"), folder]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def run(program: str, site: Path) -> dict[str, Any]:
    """What a program of tests/emulated_gpu prints; it must have taken the fused kernels."""
    command = [sys.executable, "-W", "ignore", EMULATED / program]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(site)})
    assert ran.returncode == 0, ran.stderr
    said: dict[str, Any] = json.loads(ran.stdout)
    assert set(said["launched"]) >= KERNELS
    return said


def test_errors_of_fused_3x3_convolutions_are_within_twice_those_of_pytorch(site: Path) -> None:
    said = run("errors.py", site)
    assert [row for row in said["rows"] if not (row["rms"] <= 2 and row["max"] <= 2)] == []
    assert said["nan_differs"] == {}


def test_bytes_are_those_that_the_page_names(site: Path) -> None:
    said = run("memory.py", site)
    fused, library = said["layer"]["fused"], said["layer"]["library"]
    # No normalised copy: of x's size there are the output, and the gradients of relu(bn(x)) and of x.
    assert [fused[name]["tensors"] for name in fused] == [1, 2, 0]
    assert [library[name]["tensors"] for name in library] == [2, 3, 1]
    rows = [
        f"| {name} | {fused[name]['transient']:.2f} | {fused[name]['tensors']} "
        f"| {library[name]['transient']:.2f} | {library[name]['tensors']} |"
        for name in fused
    ]
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert [row for row in rows if row not in page] == []
    for name, step in said["step"].items():
        found = [step[what] / 2**20 for what in ("kept", "most", "asked")]
        [numbers] = re.findall(rf"^\| {re.escape(name)} \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
        kept, most, asked = (int(number) for number in numbers)
        assert [round(found[0]), round(found[1])] == [kept, most]
        # All that was asked for holds what libraries take in between, which differs between processors.
        assert found[2] == pytest.approx(asked, abs=1)
