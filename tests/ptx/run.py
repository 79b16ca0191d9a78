"""Runs what nvcc made of the kernels, on the CPU, and measures how its accesses fall on memory.

    python -m tests.ptx.run                    # float32 and bfloat16, one schedule of threads
    python -m tests.ptx.run --changed          # as CI does: the same, where anything changed since --update
    python -m tests.ptx.run --all              # every dtype, schedule and mutant; writes results.md beside this file
    python -m tests.ptx.run --update           # writes csrc/cuda/layout.json from what was measured

The tests are those of tests/emulation, with their references in double; each output is also compared with that of the
kernel's source. Needs nvcc and g++; neither a GPU nor torch.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scripts import check_cuda

from . import layout, mutants, programs
from .translate import Kernel, UnknownInstruction

RESULTS = programs.HERE / "results.md"
#: Clusters exist on the first; the others run where their kernels are not the same, instruction for instruction.
ARCHS = ["sm_90a", "sm_80"]
QUICK = {"RAN_DTYPES": "float32 bfloat16", "RAN_SCHEDULES": "forward"}


@dataclass
class Ran:
    arch: str
    test: str
    fault: str
    equal: str  # how many outputs have the bits of those of the source
    seconds: float


def archs(made: Path | None) -> list[str]:
    """The first, and those of the rest that check_cuda left in ``made``: it spares what has not changed."""
    return [arch for arch in ARCHS if arch == ARCHS[0] or made is None or any(made.glob(f"*.{programs.suffix(arch)}"))]


def run_tests(kernels: dict[str, dict[str, list[Kernel]]], cache: Path, quick: bool) -> list[Ran]:
    """Every test on the first architecture; on the others those some of whose kernels differ from its own."""
    found: list[Ran] = []
    first = kernels[ARCHS[0]]
    for arch, mine in kernels.items():
        tests = [test for test in programs.programs_of() if mine is first or not same(mine, first, test)]
        variables = {**(QUICK if quick else {}), **({"RAN_NO_CLUSTERS": "1"} if arch == "sm_80" else {})}
        run_one = partial(run_test, arch, variables)
        found += programs.in_parallel(run_one, programs.build_tests(tests, mine, cache).items())
    return found


def run_test(arch: str, variables: dict[str, str], built: tuple[str, Path]) -> Ran:
    test, program = built
    began = time.monotonic()
    done = programs.run(program, **variables)
    fault = (done.stderr.strip() or f"exit status {done.returncode}") if done.returncode else ""
    equal = next((line[6:] for line in done.stdout.splitlines() if line.startswith("equal ")), "")
    ran = Ran(arch, test.removesuffix("_test"), fault, equal, time.monotonic() - began)
    print(f"{arch:7} {ran.test:23} {'FAILED' if fault else 'passed'} in {ran.seconds:5.1f} s, "
          f"outputs with the bits of the source's: {equal} {fault}", flush=True)  # fmt: skip
    return ran


def same(kernels: dict[str, list[Kernel]], others: dict[str, list[Kernel]], test: Path) -> bool:
    """Whether all kernels of a test are the same function as those of another architecture."""
    return all(
        mine.function == other.function
        for stem in programs.stems_of(test)
        for mine, other in zip(kernels[stem], others[stem], strict=True)
    )


def digest(nvcc: Path) -> str:
    """Of the kernels, their nvcc, the tests and what runs them: where all are the same, so is the result."""
    found = hashlib.sha256(check_cuda.digest(nvcc).encode())
    for folder in (programs.HERE, programs.ROOT / "tests" / "emulation"):
        for path in sorted(path for path in folder.iterdir() if path.suffix in (".py", ".h", ".cpp")):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def measure(kernels: dict[str, list[Kernel]], cache: Path, update: str | None) -> list[str]:
    """Where a kernel's layout is over its budget; ``update``: the digest to write beside new budgets."""
    ran = programs.run(programs.build_layout(kernels, cache))
    if ran.returncode:
        return [f"layout: {ran.stderr.strip()}"]
    found = layout.read(ran.stdout)
    if update is not None:
        layout.update(found, update)
    by_name = {kernel.short_name: kernel for all_of in kernels.values() for kernel in all_of}
    faults = list(layout.faults(found, layout.budgets()))
    print(f"{'wavefronts':>10} {'sectors':>8} {'narrow':>7}  of the ideal, and accesses of tensors under 16 bytes")
    for name, one in sorted(found.items()):
        figures = one.figures()
        print(f"{figures['wavefronts']:10.3f} {figures['sectors']:8.3f} {figures['narrow']:7}  {name}")
        if any(fault.startswith(f"{name}: ") for fault in faults):
            print(*(f"{'':28} {line}" for line in layout.worst(one, by_name)), sep="\n")
    return faults


def write_results(ran: list[Ran], kernels: dict[str, dict[str, list[Kernel]]], mutated: list[tuple[str, str]]) -> None:
    """Every instance, and what became of every mutant."""
    first = {kernel.short_name: kernel.function for all_of in kernels[ARCHS[0]].values() for kernel in all_of}
    lines = ["# What nvcc made of the kernels, run on the CPU", ""]
    lines += ["Written by `python -m tests.ptx.run --all`: every dtype, every schedule, against double.", ""]
    lines += ["| chip | test | | outputs with the bits of the source's |", "| --- | --- | --- | --- |"]
    lines += [f"| {r.arch} | {r.test} | {r.fault or 'passed'} | {r.equal} |" for r in ran]
    for arch in ARCHS[1:]:
        other = {kernel.short_name: kernel.function for all_of in kernels[arch].values() for kernel in all_of}
        differ = sorted(name for name in first if first[name] != other[name])
        lines += ["", f"{len(first) - len(differ)} of {len(first)} instances are the same on {arch}, instruction for "]
        lines[-1] += f"instruction. Not the same: {', '.join(f'`{name}`' for name in differ) or 'none'}."
    lines += ["", f"{len(first)} instances, each run by its test on {ARCHS[0]}:", ""]
    lines += [f"- `{name}`" for name in sorted(first)]
    lines += ["", "| barrier, wait or commit | left out or weakened: noticed as |", "| --- | --- |"]
    lines += [f"| `{name}` | {said or '**not noticed**'} |" for name, said in mutated]
    RESULTS.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--all", action="store_true", help=f"every dtype, schedule and mutant, into {RESULTS.name}")
    parser.add_argument("--update", action="store_true", help=f"rewrite {layout.BUDGETS.name}; its reasons stay")
    parser.add_argument("--changed", action="store_true", help="nothing where all is as --update saw it")
    parser.add_argument("--ptx", type=Path, metavar="DIR", help="what check_cuda --build left, not compiled again")
    parser.add_argument("--cache", type=Path, help="folder that keeps what was built")
    arguments = parser.parse_args()
    home = programs.native.find_toolkit()
    if home is None:
        print("ptx: skipped, as no nvcc was found; install a CUDA toolkit, or set CUDA_HOME")
        return 0
    made_of = digest(home / "bin" / "nvcc")
    if arguments.changed and made_of == layout.digest():
        print("ptx: neither a kernel nor nvcc nor a test has changed since --update ran them all")
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or Path(folder)
        cache.mkdir(parents=True, exist_ok=True)
        try:
            chosen = ARCHS if arguments.all else archs(arguments.ptx)
            kernels = {arch: programs.compile_ptx(arch, cache, made=arguments.ptx) for arch in chosen}
            ran = run_tests(kernels, cache, quick=not arguments.all)
            whole = chosen == ARCHS and not any(one.fault for one in ran)
            update = (made_of if whole else "") if arguments.update else None
            faults = measure(kernels[ARCHS[0]], cache, update)
            mutated = [(mutant.name, said) for mutant, said in mutants.run(ARCHS[0], cache)] if arguments.all else []
        except (programs.native.BuildFailure, UnknownInstruction) as failure:
            print(failure)
            return 1
    faults += [f"{one.arch} {one.test}: {one.fault}" for one in ran if one.fault]
    faults += [f"{name}: no test notices it" for name, said in mutated if not said]
    if arguments.all:
        write_results(ran, kernels, mutated)
    print(*(f"FAULT {fault}" for fault in faults), sep="\n", end="\n" if faults else "")
    instances = sum(map(len, kernels[ARCHS[0]].values()))
    print(f"{instances} kernels, {len(ran)} tests, {len(faults)} faults, {time.monotonic() - began:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
