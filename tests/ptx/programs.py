"""Builds the emulation's test programs with what nvcc made of the kernels in the place of their sources."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from _build import native

from ..emulation import build
from .translate import Kernel, read

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: Of a translation unit of kernels: large enough that starting the compiler costs nothing, small enough to share out.
UNIT_BYTES = 400_000
#: Not optimised: the emulation around a kernel takes the time of a run, and compiling takes more than running.
FLAGS = ["-std=c++20", "-O0", "-ffp-contract=off", "-Wall", "-Wno-maybe-uninitialized", "-Wno-unused"]
INCLUDED = re.compile(r'#include "../../(csrc/cuda/\w+\.cu)"')

Item, Result = TypeVar("Item"), TypeVar("Result")


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``function`` of each, as many at a time as there are cores."""
    with ThreadPoolExecutor(native.jobs()) as pool:
        return list(pool.map(function, items))


def kept(folder: Path, suffix: str, made_from: Sequence[str | bytes], make: Callable[[Path], object]) -> Path:
    """The file that ``make`` writes, unless one made from the same is there."""
    digest = hashlib.sha256(b"\0".join(part.encode() if isinstance(part, str) else part for part in made_from))
    path = folder / f"{digest.hexdigest()[:24]}{suffix}"
    if not path.exists():
        partial = folder / f"{os.getpid()}-{path.name}"
        make(partial)
        partial.rename(path)
    return path


def _sources(root: Path) -> list[bytes]:
    return [path.name.encode() + path.read_bytes() for path in [*build.sources(root), *sorted(HERE.glob("*.h"))]]


def suffix(arch: str) -> str:
    """Of the files that nvcc keeps for ``arch``.

    >>> suffix("sm_80")
    'compute_80.ptx'
    """
    return f"{arch.replace('sm', 'compute')}.ptx"


def compile_ptx(
    arch: str, folder: Path, root: Path = ROOT, names: Sequence[str] = (), made: Path | None = None
) -> dict[str, list[Kernel]]:
    """The kernels of every .cu file (or of ``names``) as nvcc compiles them for ``arch``, such as sm_90a.

    ``made``: the folder where ``check_cuda --build`` left what nvcc made of the same sources.

    Raises:
        native.BuildFailure: there is no nvcc, or it failed.
        UnknownInstruction: the PTX holds what instructions.py does not know.
    """
    home = native.find_toolkit()
    if home is None:
        raise native.BuildFailure("no nvcc was found; install a CUDA toolkit, or set CUDA_HOME")
    command = [str(home / "bin" / "nvcc"), *native.CUDA_FLAGS, f"-arch={arch}", "-lineinfo", "-ptx"]
    sources = [path for path in sorted((root / "csrc" / "cuda").glob("*.cu")) if not names or path.stem in names]
    held = _sources(root)

    def one(source: Path) -> Path:
        if made is not None:
            ptx = made / f"{source.stem}.{suffix(arch)}"
            if not ptx.exists():
                raise native.BuildFailure(
                    f"there is no {ptx}: python -m scripts.check_cuda --build {made.parent} makes it"
                )
            return ptx
        made_from = [*command, source.name, *held]
        return kept(folder, ".ptx", made_from, lambda to: native.run([*command, "-o", to, source]))

    files = in_parallel(one, sources)
    with ProcessPoolExecutor(native.jobs(), get_context("spawn")) as pool:  # Python's own work
        return dict(zip([source.stem for source in sources], pool.map(read, files), strict=True))


def compile_kernels(kernels: Iterable[Kernel], folder: Path) -> list[Path]:
    """Objects that hold the kernels' functions, each function once."""
    functions = {kernel.function: kernel.source() for kernel in kernels}
    units, size = [""], 0
    for name in sorted(functions, key=lambda name: -len(functions[name])):
        if size > UNIT_BYTES:
            units, size = [*units, ""], 0
        units[-1] += functions[name]
        size += len(functions[name])

    def one(unit: str) -> Path:
        def make(to: Path) -> None:
            source = to.with_suffix(".cpp")
            source.write_text(f'#include "instructions.h"\n{unit}')
            native.run(["g++", *FLAGS, f"-I{HERE}", "-c", source, "-o", to])
            source.unlink()

        return kept(folder, ".o", [unit, *FLAGS, (HERE / "instructions.h").read_bytes()], make)

    return in_parallel(one, units)


def table(kernels: Sequence[Kernel]) -> str:
    """C++ that gives the emulation each kernel in the place of its source, where both are in one translation unit."""
    lines = sorted({f"void {kernel.function}(const unsigned char* const*);" for kernel in kernels})
    lines += ["static const bool compiled_kernels_added = [] {"]
    for k in kernels:
        lines.append(f"  emu::compiled[reinterpret_cast<const void*>(&{k.cpp_name})] =")
        lines.append(f'      {{{k.function}, {k.static_bytes}, "{k.short_name}"}};')
    return "\n".join([*lines, "  return true;", "}();", ""])


def stems_of(program: Path) -> list[str]:
    """Names of the .cu files that a program includes, or is."""
    return [Path(file).stem for file in INCLUDED.findall(program.read_text())] or [program.stem] * (
        program.suffix == ".cu"
    )


def wrap(program: Path, kernels: dict[str, list[Kernel]], folder: Path, root: Path = ROOT) -> Path:
    """The object of a C++ file that includes .cu files, for the emulation, with the table of their kernels."""
    source = f'#include "{root}/tests/ptx/run_time.h"\n' if program.suffix == ".cpp" else ""
    source += f'#include "{program}"\n' + table([kernel for stem in stems_of(program) for kernel in kernels[stem]])
    command = ["g++", *build.FLAGS, "-std=c++20", *build.EMULATE, *(f"-iquote{path}" for path in build.includes(root))]

    def make(to: Path) -> None:
        wrapper = to.with_suffix(".cpp")
        wrapper.write_text(source)
        native.run([*command, "-c", wrapper, "-o", to])
        wrapper.unlink()

    return kept(folder, ".o", [*command, source, program.read_bytes(), *_sources(root)], make)


def link(objects: Sequence[Path], folder: Path) -> Path:
    """The program of ``objects``."""
    return kept(folder, "", [str(path) for path in objects], lambda to: native.run(["g++", *objects, "-o", to]))


def programs_of(root: Path = ROOT) -> list[Path]:
    """The test programs of the emulation that run kernels."""
    tests = sorted((root / "tests" / "emulation").glob("*_test.cpp"))
    return [test for test in tests if INCLUDED.search(test.read_text())]


def build_tests(
    tests: Sequence[Path], kernels: dict[str, list[Kernel]], folder: Path, root: Path = ROOT
) -> dict[str, Path]:
    """The programs of ``tests`` on ``kernels``, by name."""
    wrapped = in_parallel(lambda test: wrap(test, kernels, folder, root), tests)
    stems = dict.fromkeys(stem for test in tests for stem in stems_of(test))
    objects = compile_kernels([kernel for stem in stems for kernel in kernels[stem]], folder)
    return {test.stem: link([one, *objects], folder) for test, one in zip(tests, wrapped, strict=True)}


def build_layout(kernels: dict[str, list[Kernel]], folder: Path) -> Path:
    """layout.cpp on ``kernels``."""
    files = [HERE / "layout.cpp", *(native.CSRC / "cuda" / f"{stem}.cu" for stem in kernels)]
    wrapped = in_parallel(lambda file: wrap(file, kernels, folder), files)
    objects = compile_kernels([kernel for all_of in kernels.values() for kernel in all_of], folder)
    return link([*wrapped, *objects], folder)


def run(program: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a program; ``variables`` are added to the environment."""
    return subprocess.run([program], capture_output=True, text=True, timeout=3000, env={**os.environ, **variables})
