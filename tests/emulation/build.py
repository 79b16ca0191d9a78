"""Compiles the emulation's programs; standard library only.

A program is kept under a name that holds the hash of its command and of every source it may include, so that it is
built again only when one of them changes; processes that want the same at once build it once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Keeps the kernels' objects, which the comparison with a GPU and tests/emulated_gpu share.
OBJECTS = ROOT / "build" / "emulation"
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
EMULATE = ["-U_FORTIFY_SOURCE", "-DRAN_EMULATE", "-fno-strict-aliasing"]
KERNEL = re.compile(r"__global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(")
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def includes(root: Path) -> list[Path]:
    """The include folders of a tree with csrc and tests/emulation."""
    return [root / "tests" / "emulation", root / "csrc" / "common", root / "csrc" / "cuda"]


def kernels() -> list[Path]:
    """The CUDA files that are shipped."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def included(path: Path, seen: set[str]) -> set[str]:
    """Names of the files that ``path`` includes, directly or not, added to ``seen``."""
    for name in (Path(name).name for name in INCLUDE.findall(path.read_text())):
        for folder in ("csrc/cuda", "csrc/common", "tests/emulation"):
            if name not in seen and (ROOT / folder / name).exists():
                seen.add(name)
                included(ROOT / folder / name, seen)
    return seen


def kernel_names(files: Sequence[Path]) -> set[str]:
    """Names of the kernels in ``files`` and in the headers of csrc/cuda that they include."""
    seen: set[str] = set()
    for file in files:
        included(file, seen)
    headers = [path for name in seen if (path := ROOT / "csrc" / "cuda" / name).suffix == ".cuh"]
    return {name for file in [*files, *headers] for name in KERNEL.findall(file.read_text())}


def sources(root: Path) -> list[Path]:
    """Every file that a program may include."""
    files = (path for folder in includes(root) for path in folder.iterdir())
    return sorted(path for path in files if path.suffix in (".h", ".cuh", ".cu", ".cpp"))


def compile_program(name: str, command: Sequence[str | Path], cache: Path, root: Path = ROOT) -> Path:
    """Runs ``command -o program`` in ``root``, unless that has been done; returns the program, or what else it makes.

    Raises:
        RuntimeError: with what the compiler printed.
    """
    digest = hashlib.sha256(" ".join([name, *map(str, command)]).encode())
    for path in sources(root):
        digest.update(path.name.encode() + path.read_bytes())
    program = cache.resolve() / f"{name}-{digest.hexdigest()[:16]}"
    with open(cache / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            partial = program.with_suffix(".partial")
            result = subprocess.run([*command, "-o", partial], cwd=root, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"{name} does not compile:\n{result.stderr[-4000:]}")
            partial.rename(program)
    return program


def compiler(root: Path) -> list[str | Path]:
    """The command for a file of the tree at ``root``; all is named from there: equal trees share what is built."""
    return ["g++", *FLAGS, *EMULATE, *(f"-iquote{folder.relative_to(root)}" for folder in includes(root)), "-x", "c++"]


def build(name: str, cache: Path, root: Path = ROOT) -> Path:
    """``tests/emulation/<name>.cpp`` of the tree at ``root`` as an emulation."""
    return compile_program(name, [*compiler(root), f"tests/emulation/{name}.cpp"], cache, root)


def objects(files: Sequence[Path], cache: Path = OBJECTS) -> list[Path]:
    """``files`` as an emulation's objects, fit for a shared library as well."""
    cache.mkdir(parents=True, exist_ok=True)
    command = [*compiler(ROOT), "-fPIC", "-fvisibility=hidden", "-c"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda file: compile_program(file.stem, [*command, file.relative_to(ROOT)], cache), files))


def build_on_kernels(name: str, cache: Path = OBJECTS) -> Path:
    """``tests/emulation/<name>.cpp``, which includes no kernel, with all of them."""
    parts = objects([ROOT / "tests" / "emulation" / f"{name}.cpp", *kernels()], cache)
    return compile_program(name, ["g++", *parts], cache)


def run(program: Path, *arguments: str, mutant: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a program; exit status 0 means that it passed. ``mutant``: see mutate.py."""
    environment = {**os.environ, "RAN_MUTANT": str(mutant)}
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=600, env=environment)
