"""The CUDA kernels run on the CPU against double, in several thread schedules: see tests/emulation."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.check_cuda import short_name
from tests.emulation import build, mutate

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "emulation"
PROGRAMS = sorted(path.stem for path in EMULATION.glob("*_test.cpp"))
ALL_SCHEDULES = 0b11111  # forward, reverse, round-robin, shuffled, late warps
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

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("g++", "nm"))), reason="needs g++ and nm")


INSTANCES = json.loads((ROOT / "csrc" / "cuda" / "budgets.json").read_text())["sm_90a"]


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("emulation")


@pytest.fixture(scope="session")
def root(cache: Path) -> Path:
    """The sources as they are compiled once for all tests here: with the mutants, none of which is in force."""
    return mutate.with_mutants(cache)[0]


def kernels_of(program: str) -> set[str]:
    """Names of the kernels in the .cu files that a program's source includes."""
    files = re.findall(r'#include "../../(csrc/cuda/\w+\.cu)"', (EMULATION / f"{program}.cpp").read_text())
    return build.kernel_names([ROOT / file for file in files])


def addresses(program: Path) -> dict[str, int]:
    """Where a program holds each kernel instance, by the instance's name in budgets.json."""
    symbols = subprocess.run(["nm", "-C", program], capture_output=True, text=True, check=True).stdout
    entries = (line.split(" ", 2) for line in symbols.splitlines() if "_kernel" in line)
    return {short_name(name): int(address, 16) for address, kind, name in entries if kind in "tT"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_instance_matches_double_in_every_schedule(name: str, cache: Path, root: Path) -> None:
    program = build.build(name, cache, root)
    ran = build.run(program)
    assert ran.returncode == 0, ran.stderr
    first, *launches = ran.stdout.splitlines()
    assert first == f"{name.removesuffix('_test')}: ok"
    schedules = {int(address, 16): int(bits, 16) for address, bits in map(str.split, launches)}
    shipped = {instance for instance in INSTANCES if instance.split("<")[0] in kernels_of(name)}
    where = addresses(program)
    assert {instance: schedules.get(where[instance]) for instance in shipped} == dict.fromkeys(shipped, ALL_SCHEDULES)


def test_every_kernel_has_a_program() -> None:
    shipped = build.kernel_names(build.kernels())
    assert shipped == set().union(*map(kernels_of, PROGRAMS)) == {instance.split("<")[0] for instance in INSTANCES}


@pytest.mark.parametrize("schedule", ["forward", "reverse"])
@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_a_fault_ends_the_run(fault: int, schedule: str, cache: Path, root: Path) -> None:
    program = build.build("emulation_test", cache, root)
    ran = build.run(program, str(fault), *(["reverse"] if schedule == "reverse" else []))
    assert ran.returncode == 3, ran.stdout
    assert FAULTS[fault] in ran.stderr
    assert "kernel faulty_kernel" in ran.stderr
    assert "thread (" in ran.stderr


@pytest.mark.slow
def test_every_missing_barrier_is_noticed_or_explained(cache: Path) -> None:
    command = [sys.executable, "-m", "tests.emulation.mutate", "--cache", cache]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr
