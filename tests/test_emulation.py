"""The CUDA kernels of the gate, the pyramid and BN-ReLU, run on the CPU against double: see tests/emulation."""

import importlib.util
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

EMULATION = Path(__file__).resolve().parent / "emulation"
PROGRAMS = ["emulation_test", "attention_gate_test", "pyramid_test", "bn_relu_test", "bn_relu_resident_test"]
# The faults of emulation_test.cpp, by number, and the words in which each is reported.
FAULTS = [
    "read before anything was written",
    "race, read after another thread's write",
    "waits at __syncthreads for threads that never come",
    "other threads of its group wait at another call",
    "shared memory: out of bounds",
    "shared memory: misaligned",
    "read before anything was written",
    "shared memory: misaligned",
    "read before its cp.async was waited for",
    "a cp.async that was never waited for",
    "global memory: out of bounds",
    "global memory: misaligned",
    "a partial mask is not emulated",
    "race, written by two threads",
    "for threads that never come",
    "the block it belongs to has ended",
    "race, written after another thread's read",
]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"emulation_{name}", EMULATION / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load("build")


@pytest.fixture(scope="session")
def programs(request: pytest.FixtureRequest) -> dict[str, Path]:
    cache = request.config.cache.mkdir("emulation")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(PROGRAMS, pool.map(lambda name: build.build(name, cache), PROGRAMS), strict=True))


@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_match_double(name: str, programs: dict[str, Path]) -> None:
    ran = build.run(programs[name])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{name.removesuffix('_test')}: ok\n"


@pytest.mark.parametrize("schedule", ["forward", "reverse"])
@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_a_fault_ends_the_run(fault: int, schedule: str, programs: dict[str, Path]) -> None:
    ran = build.run(programs["emulation_test"], str(fault), *(["reverse"] if schedule == "reverse" else []))
    assert ran.returncode == 3, ran.stdout
    assert FAULTS[fault] in ran.stderr
    assert "kernel faulty_kernel" in ran.stderr
    assert "thread (" in ran.stderr


@pytest.mark.slow
def test_every_missing_barrier_is_noticed_or_explained() -> None:
    ran = subprocess.run([sys.executable, EMULATION / "mutate.py"], capture_output=True, text=True)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr
