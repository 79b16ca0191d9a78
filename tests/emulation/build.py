"""Compiles the emulation's test programs with g++; standard library only.

A program is kept under a name that holds the hash of every source it may include, so that it is built again only when
one of them changes.
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
EMULATE = ["-U_FORTIFY_SOURCE", "-DRAN_EMULATE", "-fno-strict-aliasing"]


def includes(root: Path) -> list[Path]:
    """The include folders of a tree with csrc and tests/emulation."""
    return [root / "tests" / "emulation", root / "csrc", root / "csrc" / "cuda"]


def sources(root: Path) -> list[Path]:
    """Every file that a test program may include."""
    files = (path for folder in includes(root) for path in folder.iterdir())
    return sorted(path for path in files if path.suffix in (".h", ".cuh", ".cu", ".cpp"))


def build(test: str, cache: Path, root: Path = ROOT) -> Path:
    """Compiles ``tests/emulation/<test>.cpp`` of the tree at ``root``; returns the program.

    Raises:
        RuntimeError: with what g++ printed.
    """
    digest = hashlib.sha256(" ".join([test, *FLAGS, *EMULATE]).encode())
    for path in sources(root):
        digest.update(path.name.encode() + path.read_bytes())
    program = cache / f"{test}-{digest.hexdigest()[:16]}"
    if not program.exists():
        partial = program.with_suffix(".partial")
        folders = [f"-I{folder}" for folder in includes(root)]
        source = root / "tests" / "emulation" / f"{test}.cpp"
        command: list[str | Path] = ["g++", *FLAGS, *EMULATE, *folders, source, "-o", partial]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{test}.cpp does not compile:\n{result.stderr[-4000:]}")
        partial.rename(program)
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a test program; exit status 0 means that it passed."""
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)
