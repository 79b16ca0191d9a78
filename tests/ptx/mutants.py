"""Barriers, waits and commits left out or weakened in what nvcc made of the kernels: which of them do the tests notice?

The mutants are those of tests/emulation/mutate.py, statement by statement of the sources. Each statement is marked by
comments in inline assembly, which nvcc carries into the PTX, and the translation lets the program choose.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..emulation import mutate
from . import programs

#: What stands in for a statement in its weaker mutant.
WEAKER = {"__syncwarp()": "warp", "__syncthreads()": "block"}


def mark(call: str, mutants: Sequence[mutate.Mutant]) -> str:
    """The statement between marks: the kind of the weaker mutant, if there is one, and the numbers of both."""
    weaker = WEAKER.get(mutants[-1].instead, "wait" if mutants[-1].instead else "none")
    numbers = " ".join(str(mutant.number) for mutant in mutants)
    begin, end = (f'asm volatile("// mutant {text}" ::: "memory");' for text in (f"begin {weaker} {numbers}", "end"))
    return f"{{ {begin} {call}; {end} }}"


def run(arch: str, cache: Path) -> Iterator[tuple[mutate.Mutant, str]]:
    """Each mutant, and the first complaint about it, or an empty string."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("csrc", "tests/emulation", "tests/ptx"):
            shutil.copytree(programs.ROOT / part, root / part)
        mutants = mutate.mutate(root, mark)
        tests = programs.build_tests(programs.programs_of(root), programs.compile_ptx(arch, cache, root), cache, root)
        files = {test: mutate.included(root / "tests" / "emulation" / f"{test}.cpp", set()) for test in tests}

        def verdict(mutant: mutate.Mutant) -> str:
            for test, program in tests.items():
                if mutant.file not in files[test]:
                    continue
                ran = programs.run(program, RAN_MUTANT=str(mutant.number), RAN_DTYPES="float32 bfloat16")
                if ran.returncode:
                    return f"{test.removesuffix('_test')}: {ran.stderr.strip().splitlines()[-1].split(': ')[-1]}"
            return ""

        yield from zip(mutants, programs.in_parallel(verdict, mutants), strict=True)
