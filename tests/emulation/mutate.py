"""Does the suite notice a missing barrier? Removes and weakens each barrier, wait and commit of the kernels in turn.

    python -m tests.emulation.mutate [--cache DIR] [file.cuh ...]

prints a table of the mutants and what became of them: caught (a test program fails) or alive (all pass). A mutant that
stays alive must be explained in survivors.json beside this file, and an explanation must be of a mutant that is alive;
the exit status is 1 otherwise. Files named on the command line restrict the mutants to theirs.

All mutants are built at once, from a copy of the sources in which every such statement asks which mutant is in force;
while none is, its programs run the kernels as they are shipped, and tests/test_emulation.py runs them so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .build import ROOT, build, included, run, sources

STATEMENT = re.compile(
    r"\b(?P<call>__syncthreads|__syncwarp|cluster_sync|grid_sync|cp_async_commit|cp_async_wait<(?P<groups>[^;()]*)>)\(\);"
)
#: The narrower barrier that each might be mistaken for. A weaker wait leaves one more group in flight.
WEAKER = {"__syncthreads": "__syncwarp", "cluster_sync": "__syncthreads", "grid_sync": "__syncthreads"}
WRAPPERS = {"launch.cuh", "mma.cuh"}  # these define the statements


@dataclass(frozen=True)
class Mutant:
    """One statement of a kernel replaced by another, or by none."""

    number: int  # from 1, what the program is told
    file: str
    ordinal: int  # of the statement in its file, from 1, so that names outlive edits
    line: int
    text: str
    instead: str

    @property
    def name(self) -> str:
        return f"{self.file}#{self.ordinal} {'weakened' if self.instead else 'removed'}"

    @property
    def change(self) -> str:
        return f"{self.text} -> {self.instead}" if self.instead else self.text


def replacements(statement: re.Match[str]) -> list[str]:
    """What a statement is replaced by: nothing, and a weaker one where there is such."""
    if statement["groups"]:
        return ["", f"cp_async_wait<{statement['groups']} + 1>()"]
    return ["", f"{WEAKER[statement['call']]}()"] if statement["call"] in WEAKER else [""]


def choose(call: str, mutants: Sequence[Mutant]) -> str:
    """The statement as C++ that asks ``emu::mutant``."""
    for mutant in mutants:
        call = f"emu::mutant == {mutant.number} ? {mutant.instead or 'void()'} : {call}"
    return f"({call});"


def mutate(root: Path, rewrite: Callable[[str, Sequence[Mutant]], str] = choose) -> list[Mutant]:
    """Rewrites each such statement of the kernels below ``root``; returns all mutants."""
    found: list[Mutant] = []
    for path in sorted((root / "csrc" / "cuda").glob("*.cu*")):
        if path.name in WRAPPERS:
            continue
        text = path.read_text()
        changed, end = "", 0
        for ordinal, statement in enumerate(STATEMENT.finditer(text), 1):
            line, call = text.count("\n", 0, statement.start()) + 1, f"{statement['call']}()"
            first = len(found)
            for instead in replacements(statement):
                found.append(Mutant(len(found) + 1, path.name, ordinal, line, call, instead))
            changed += text[end : statement.start()] + rewrite(call, found[first:])
            end = statement.end()
        path.write_text(changed + text[end:])
    return found


def with_mutants(folder: Path) -> tuple[Path, list[Mutant]]:
    """The copy of the sources that holds all mutants, kept in ``folder`` by the hash of its files; and the mutants."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        copy = Path(place) / "copy"
        for part in ("csrc", "tests/emulation"):
            shutil.copytree(ROOT / part, copy / part)
        mutants = mutate(copy)
        digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sources(copy)))
        root = folder / f"mutants-{digest.hexdigest()[:16]}"
        if not root.exists():
            try:
                copy.rename(root)
            except OSError:
                assert root.exists()  # another process was quicker
    return root, mutants


def verdict(mutant: Mutant, programs: dict[str, Path], files: dict[str, set[str]]) -> str:
    """What the tests say of a mutant: the first complaint, or an empty string where it stays alive."""
    for test, program in programs.items():
        if mutant.file in files[test] and (result := run(program, mutant=mutant.number)).returncode:
            return f"{test.removesuffix('_test')}: {result.stderr.strip().splitlines()[-1].split(': ')[-1]}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("files", nargs="*", metavar="file.cuh", help="only the mutants of these")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder that keeps what was built")
    arguments = parser.parse_args()
    explained: dict[str, str] = json.loads((Path(__file__).parent / "survivors.json").read_text())
    failures, alive = [], 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        cache = arguments.cache or Path(folder)
        cache.mkdir(parents=True, exist_ok=True)
        root, mutants = with_mutants(cache)
        mutants = [mutant for mutant in mutants if not arguments.files or mutant.file in arguments.files]
        files = {path.stem: included(path, set()) for path in (ROOT / "tests/emulation").glob("*_test.cpp")}
        quickest_first = sorted(files, key=lambda test: (test != "emulation_test", test.removesuffix("_test")))
        tests = [test for test in quickest_first if files[test] & {mutant.file for mutant in mutants}]
        print(f"building {len(tests)} programs", flush=True)
        programs = dict(zip(tests, pool.map(partial(build, cache=cache, root=root), tests), strict=True))
        said = pool.map(partial(verdict, programs=programs, files=files), mutants)
        for mutant, complaint in zip(mutants, said, strict=True):
            alive += not complaint
            place = f"{mutant.file}:{mutant.line}"
            print(f"{place:30} {mutant.change:66} {'caught' if complaint else 'ALIVE '}", end="  ")
            print(complaint or explained.get(mutant.name, "not explained"), flush=True)
            if bool(complaint) == (mutant.name in explained):
                fault = "caught, yet explained as alive" if complaint else "alive, and not explained"
                failures.append(f"{mutant.name}: {fault}")
    print(f"{len(mutants)} mutants, {len(mutants) - alive} caught, {alive} alive")
    print(*failures, sep="\n", end="\n" if failures else "")
    return 1 if failures or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())
