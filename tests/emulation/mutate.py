"""Does the suite notice a missing barrier? Removes each barrier and each wait from a copy of the kernels in turn.

    python tests/emulation/mutate.py [file.cuh ...]

prints a table of the mutants and what became of them: caught (a test program fails) or alive (all pass). A mutant that
stays alive must be explained in survivors.json beside this file, and an explanation must be of a mutant that is alive;
the exit status is 1 otherwise. Files named on the command line restrict the mutants to theirs.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build import ROOT, build, run

STATEMENT = re.compile(r"\b(__syncthreads|__syncwarp|cluster_sync|grid_sync|cp_async_wait<[^;()]*>)\(\);")
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
WRAPPERS = {"launch.cuh", "mma.cuh"}  # these define the statements
JOBS = 2


@dataclass(frozen=True)
class Mutant:
    """One statement to be removed: the ``ordinal``-th of its file, counted from 1, so that names outlive edits."""

    file: str
    ordinal: int
    line: int
    start: int
    end: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.file}#{self.ordinal}"


def mutants() -> list[Mutant]:
    found = []
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")):
        if path.name in WRAPPERS:
            continue
        text = path.read_text()
        for ordinal, match in enumerate(STATEMENT.finditer(text), 1):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Mutant(path.name, ordinal, line, match.start(), match.end(), match.group()))
    return found


def included(path: Path, seen: set[str]) -> set[str]:
    """Names of the files that ``path`` includes, directly or not."""
    for name in (Path(name).name for name in INCLUDE.findall(path.read_text())):
        for folder in ("csrc/cuda", "csrc", "tests/emulation"):
            if name not in seen and (ROOT / folder / name).exists():
                seen.add(name)
                included(ROOT / folder / name, seen)
    return seen


def verdict(mutant: Mutant, tests: list[str]) -> str:
    """What the tests say of one mutant: the first complaint, or an empty string where it stays alive."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("csrc", "tests/emulation"):
            shutil.copytree(ROOT / part, root / part)
        path = root / "csrc" / "cuda" / mutant.file
        text = path.read_text()
        path.write_text(text[: mutant.start] + "{}" + text[mutant.end :])
        for test in tests:
            result = run(build(test, root, root))
            if result.returncode:
                return f"{test.removesuffix('_test')}: {result.stderr.strip().splitlines()[-1].split(': ')[-1]}"
    return ""


def main(arguments: list[str]) -> int:
    explained: dict[str, str] = json.loads((Path(__file__).parent / "survivors.json").read_text())
    programs = sorted(path for path in (ROOT / "tests" / "emulation").glob("*_test.cpp"))
    of_test = {path.stem: included(path, set()) for path in programs}
    chosen = [mutant for mutant in mutants() if not arguments or mutant.file in arguments]
    tests = [[test for test, files in of_test.items() if mutant.file in files] for mutant in chosen]
    alive, failures = 0, []
    with ThreadPoolExecutor(JOBS) as pool:
        for mutant, said in zip(chosen, pool.map(verdict, chosen, tests), strict=True):
            alive += not said
            print(f"{mutant.name:32} line {mutant.line:4}  {mutant.text:36} {'caught' if said else 'ALIVE '}", end="  ")
            print((said or explained.get(mutant.name, "not explained"))[:110], flush=True)
            if bool(said) == (mutant.name in explained):
                failures.append(
                    f"{mutant.name}: " + ("caught, yet explained as alive" if said else "alive, and not explained")
                )
    print(f"{len(chosen)} mutants, {len(chosen) - alive} caught, {alive} alive")
    print(*failures, sep="\n", end="\n" if failures else "")
    return 1 if failures or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
