"""Compiles the emulation's programs; standard library only.

A program is kept under a name that holds the hash of its command and of every source it may include, so that it is
built again only when one of them changes.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
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
    """Runs ``command -o program``, unless that has been done; returns the program.

    Raises:
        RuntimeError: with what the compiler printed.
    """
    digest = hashlib.sha256(" ".join([name, *map(str, command)]).encode())
    for path in sources(root):
        digest.update(path.name.encode() + path.read_bytes())
    program = cache / f"{name}-{digest.hexdigest()[:16]}"
    if not program.exists():
        partial = program.with_suffix(f".{os.getpid()}")
        result = subprocess.run([*command, "-o", partial], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{name} does not compile:\n{result.stderr[-4000:]}")
        partial.rename(program)
    return program


def build(name: str, cache: Path, root: Path = ROOT, others: Sequence[Path] = ()) -> Path:
    """``tests/emulation/<name>.cpp``, and ``others``, of the tree at ``root`` as an emulation."""
    folders = [f"-iquote{folder}" for folder in includes(root)]
    command = ["g++", *FLAGS, *EMULATE, *folders, "-x", "c++"]
    main = root / "tests" / "emulation" / f"{name}.cpp"
    if not others:
        return compile_program(name, [*command, main], cache, root)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        parts = pool.map(lambda file: compile_program(file.stem, [*command, "-c", file], cache, root), [main, *others])
        return compile_program(name, ["g++", *parts], cache, root)


def run(program: Path, *arguments: str, mutant: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a program; exit status 0 means that it passed. ``mutant``: see mutate.py."""
    environment = {**os.environ, "RAN_MUTANT": str(mutant)}
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=600, env=environment)
