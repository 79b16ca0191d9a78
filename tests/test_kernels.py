"""The CPU kernels of processors that are not at hand: csrc/cpu compiled for them, against double (tests/kernels)."""

import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from _build import native

DRIVER = native.ROOT / "tests" / "kernels" / "driver.cpp"
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wno-psabi", *native.CPU_FLAGS[native.CPU_FLAGS.index("-fno-math-errno") :]]
FLAGS += ["-fno-strict-aliasing", "-Wno-unknown-pragmas"]
#: Compiler, flags, name of the instruction set, and what runs its programs.
PROCESSORS: dict[str, tuple[str, list[str], str, list[str]]] = {
    "aarch64": ("aarch64-linux-gnu-g++", ["-static"], "baseline", ["qemu-aarch64"]),
    # As Apple's machines have it, but for the system.
    "clang": ("clang++", ["--target=aarch64-linux-gnu", "-static"], "baseline", ["qemu-aarch64"]),
    # AVX-512's layouts and loops without its instructions; pairs of bfloat16 in software. -O1 takes minutes to compile.
    "512 bits": ("g++", ["-O0", "-DRAN_VECTOR_BYTES=64", "-DRAN_BF16_PAIRS", "-mavx2", "-mfma"], "wide", []),
}


def has_avx512() -> bool:
    return "avx512f" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False


def build(name: str, folder: Path) -> Path:
    compiler, flags, isa, _ = PROCESSORS[name]
    command = (compiler, *FLAGS, *flags, f"-DRAN_ISA={isa}")
    sources = [*sorted((native.CSRC / "cpu").glob("*.cpp")), DRIVER]
    objects = native.compile_all([native.Compile(path, folder / f"{path.stem}.o", command) for path in sources])
    native.run([compiler, *flags, *objects, "-o", folder / "driver"])
    return folder / "driver"


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_every_kernel_is_right(name, request):
    compiler, _, isa, runner = PROCESSORS[name]
    if missing := [tool for tool in (compiler, *runner) if not shutil.which(tool)]:
        pytest.skip(f"needs {', '.join(missing)} (Debian: clang, g++-aarch64-linux-gnu, qemu-user)")
    if isa == "wide" and has_avx512():
        pytest.skip("this processor runs the AVX-512 kernels themselves, in every other test")
    driver = build(name, request.config.cache.mkdir("kernels") / name.replace(" ", ""))
    done = subprocess.run([*runner, driver, "10", "1"], capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join([*runner, str(driver)])}: {done.stdout}{done.stderr}"
    assert done.stdout.startswith(f"{isa}: ")
    assert int(done.stdout.split()[1]) > 10_000


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("clang++"), reason="needs clang++ (Debian: clang)")
@pytest.mark.parametrize("isa", sorted(native.X86_ISAS))
def test_clang_takes_every_instruction_set(isa):
    sources = sorted((native.CSRC / "cpu").glob("*.cpp"))
    command = ["clang++", "--target=x86_64-linux-gnu", *FLAGS, *native.X86_ISAS[isa], f"-DRAN_ISA={isa}"]
    said = native.run([*command, "-Wno-unknown-warning-option", "-Werror", "-fsyntax-only", *sources])
    assert not said


#: Reads float16 as float32 from its input and writes both, each made of the other.
HALVES = r"""
#define RAN_ISA baseline
#include "vec.h"
#include <cstdio>
using namespace ran::cpu::baseline;
int main() {
  float x[kLanes];
  f16 h[kLanes];
  while (std::fread(x, sizeof x, 1, stdin) == 1) {
    store(h, load(x));
    store(x, load(h));
    std::fwrite(h, sizeof h, 1, stdout);
    std::fwrite(x, sizeof x, 1, stdout);
  }
}
"""


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_float16_without_instructions_is_ieee_s(compiler, tmp_path):
    """Every float16, the middle between each and the next, and what lies just beside that."""
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    (tmp_path / "halves.cpp").write_text(HALVES)
    program = tmp_path / "halves"
    native.run([compiler, "-std=c++17", "-O2", f"-I{native.CSRC / 'cpu'}", tmp_path / "halves.cpp", "-o", program])
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        middle = ((halves.astype(np.float64) + np.roll(halves, -1)) / 2).astype(np.float32)
        given = np.concatenate([halves, middle, *(np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf))])
        wanted = given.astype(np.float16)
    done = subprocess.run([program], input=given.tobytes(), capture_output=True, check=True)
    lanes = 4  # of 16 bytes
    found = np.frombuffer(done.stdout, np.dtype([("half", np.uint16, lanes), ("float", np.float32, lanes)]))
    nan = np.isnan(given)
    assert 2046 <= nan.sum() < given.size / 4
    half = found["half"].ravel()
    assert (half[~nan] == wanted.view(np.uint16)[~nan]).all()
    assert np.isnan(half.view(np.float16)[nan]).all()
    assert (found["float"].ravel()[~nan] == wanted.astype(np.float32)[~nan]).all()
