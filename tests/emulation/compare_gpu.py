"""The kernels on a GPU against the same kernels under emulation, launch for launch on the same inputs.

    python -m tests.emulation.compare_gpu --out compared.json
    python -m tests.emulation.compare_gpu --out compared.json --device cpu     # the emulation against itself, reversed
    python -m tests.emulation.compare_gpu --out compared.json --case dgrad --under "compute-sanitizer --tool racecheck"

Small whole numbers, whose sums are exact, must give the same bits, so that any wrong index shows; where a mean divides
by what is no power of two, and on random numbers, outputs must agree within rounding. With ``--device cpu`` warps run
in opposite orders, and all must give the same bits. Prints a line a case, writes them to ``--out``, and ends with
status 1 where any output differs. Needs g++ and numpy, and nvcc for a GPU; no torch.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from _build import native

from .build import ROOT, build_on_kernels, kernel_names, kernels

#: For --device cpu, a Hopper GPU of few SMs: capability, SMs, shared bytes a block and an SM.
SMALL_HOPPER = ["90", "4", str(227 << 10), str(228 << 10)]
#: What the emulation computed for a machine with a GPU, half as large as it is.
PREPARED = "emulated.xz"
#: A dtype's numpy type, and the distance of neighbours relative to the larger.
DTYPES = {
    "float32": (np.float32, 2.0**-23),
    "float16": (np.float16, 2.0**-10),
    "bfloat16": (np.uint16, 2.0**-7),
    "uint8": (np.uint8, 0.0),
    "int64": (np.int64, 0.0),
}


@dataclass
class Output:
    """What a case left in one tensor."""

    name: str
    dtype: str
    exact: bool
    slack: float
    data: bytes

    def values(self) -> np.ndarray:
        array = np.frombuffer(self.data, DTYPES[self.dtype][0])
        return (array.astype(np.uint32) << 16).view(np.float32) if self.dtype == "bfloat16" else array


@dataclass
class Case:
    name: str
    outputs: list[Output] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)


@dataclass
class Verdict:
    """``worst``: of the outputs that need not be equal, the largest difference as a share of what rounding may make."""

    case: str
    kernels: list[str]
    equal: int
    rounded: int
    worst: float
    faults: list[str]


def read(path: Path) -> tuple[list[str], list[Case]]:
    """The device's limits and the cases of a file that the program wrote."""
    limits: list[str] = []
    cases: list[Case] = []
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        while line := file.readline():
            kind, *words = line.decode().split()
            if kind == "device":
                limits = words
            elif kind == "case":
                cases.append(Case(words[0]))
            elif kind == "kernels":
                cases[-1].kernels = words
            else:
                numbers, name, dtype, match, slack, size = words
                data, title = file.read(int(size)), f"{name} ({dtype}, {numbers})"
                cases[-1].outputs.append(Output(title, dtype, match == "bits", float(slack), data))
    return limits, cases


def excess(got: Output, want: Output) -> float:
    """The largest difference as a share of what is allowed: one unit in the last place, and the slack."""
    a, b = got.values().astype(np.float64), want.values().astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    allowed = 1.01 * DTYPES[want.dtype][1] * np.abs(b) + want.slack
    with np.errstate(invalid="ignore"):
        share = np.where(same, 0.0, np.abs(a - b) / allowed)
    return float(np.nan_to_num(share, nan=np.inf).max(initial=0.0))


def judge(got: Case, want: Case, all_bits: bool) -> Verdict:
    """Compares one case of two runs; ``all_bits``: every output is to be the same bit for bit."""
    verdict = Verdict(want.name, want.kernels, 0, 0, 0.0, [])
    if got.kernels != want.kernels:
        verdict.faults.append(f"the device ran {' '.join(got.kernels)}")
    for a, b in zip(got.outputs, want.outputs, strict=True):
        if all_bits or b.exact:
            differ = int((a.values() != b.values()).sum()) if a.data != b.data else 0
            verdict.equal += a.data == b.data
            if a.data != b.data:
                verdict.faults.append(f"{b.name}: {differ} of {b.values().size} values differ")
        else:
            share = excess(a, b)
            verdict.rounded += share <= 1
            verdict.worst = max(verdict.worst, share)
            if share > 1:
                verdict.faults.append(f"{b.name}: off by {share:.3g} times what rounding may make")
    return verdict


def build_for_gpu(cache: Path, archs: str, objects: Path | None = None) -> Path:
    """The program for a GPU; every launch passes by compare_device.h, which notes the kernel.

    Args:
        cache: where it is built.
        archs: as TORCH_CUDA_ARCH_LIST has them.
        objects: the folder in which setup.py has compiled the kernels: those that are not stale are linked as they are.

    Raises:
        RuntimeError: with what nvcc printed, or where there is no nvcc.
    """
    home = native.find_toolkit()
    if home is None:
        raise RuntimeError("no nvcc was found; install a CUDA toolkit, or set CUDA_HOME, or give --device cpu")
    nvcc, program = home / "bin" / "nvcc", cache / "compare_gpu_cuda"
    tasks = native.cuda_tasks(objects or cache, nvcc, archs.replace(" ", ";").split(";"))
    source = ROOT / "tests" / "emulation" / "compare_gpu.cpp"
    tasks.append(native.Compile(source, cache / "compare_gpu_cuda.o", (*tasks[0].command, "-x", "cu")))
    try:
        native.compile_all(tasks)
        native.run([nvcc, "-Xlinker=--wrap=cudaLaunchKernelExC", *(task.object for task in tasks), "-o", program])
    except native.BuildFailure as failure:
        raise RuntimeError(str(failure)) from failure
    return program


def prepare(folder: Path, archs: str, limits: Sequence[str], objects: Path | None) -> None:
    """Leaves in ``folder`` what a machine with a GPU would have to compile and to emulate."""
    with tempfile.TemporaryDirectory() as cache:
        shutil.copy2(build_for_gpu(Path(cache), archs, objects), folder / "compare_gpu_cuda")
        emulated = Path(cache) / "emulated"
        run([build_on_kernels("compare_gpu")], emulated, "--limits", *limits)
        (folder / PREPARED).write_bytes(lzma.compress(emulated.read_bytes(), preset=0))


def run(command: Sequence[str | Path], out: Path, *options: str) -> tuple[list[str], list[Case]]:
    """Runs the program; what it wrote.

    Raises:
        RuntimeError: with its exit status; it has printed why.
    """
    result = subprocess.run([*command, out, *options], stdout=sys.stdout if len(command) > 1 else subprocess.DEVNULL)
    if result.returncode:
        raise RuntimeError(f"{Path(command[-1]).name} ended with status {result.returncode}")
    return read(out)


def compare(arguments: argparse.Namespace, folder: Path) -> list[Verdict]:
    """Builds in ``folder`` and runs there.

    Raises:
        RuntimeError: a program does not compile, or ends with an error.
    """
    only = ["--case", arguments.case] if arguments.case else []
    under = shlex.split(arguments.under)
    if arguments.device == "cpu":
        emulation = build_on_kernels("compare_gpu")
        options = ["--limits", *SMALL_HOPPER, *only]
        with ThreadPoolExecutor(2) as pool:
            reverse = pool.submit(run, [*under, emulation], folder / "got", "--schedule", "reverse", *options)
            forward = pool.submit(run, [emulation], folder / "want", *options)
        (_, got), (_, want) = reverse.result(), forward.result()
    else:
        prebuilt = arguments.prebuilt and arguments.prebuilt / "compare_gpu_cuda"
        program = prebuilt or build_for_gpu(folder, arguments.archs, arguments.objects)
        limits, got = run([*under, program], folder / "got", *only)
        if arguments.prebuilt:
            emulated, want = read(arguments.prebuilt / PREPARED)
            if emulated == limits:
                wanted = {case.name: case for case in want}
                return [judge(case, wanted[case.name], False) for case in got]
            print(f"emulated anew: the folder has it for {' '.join(emulated)}, the GPU is {' '.join(limits)}")
        emulation = build_on_kernels("compare_gpu")
        _, want = run([emulation], folder / "want", "--limits", *limits, *only)
    verdicts = [judge(a, b, all_bits=arguments.device == "cpu") for a, b in zip(got, want, strict=True)]
    launched = {name for verdict in verdicts for name in verdict.kernels}
    if missing := kernel_names(kernels()) - launched if arguments.device == "cpu" and not only else ():
        raise RuntimeError(f"no case launches {', '.join(sorted(missing))}")
    return verdicts


def print_table(verdicts: list[Verdict]) -> None:
    for v in verdicts:
        rounded = f"{v.rounded} within {v.worst:.2f} of rounding" if v.rounded else ""
        agrees = "DIFFERS" if v.faults else "agrees"
        print(f"{v.case:24} {agrees:7} {v.equal:3} equal bits  {rounded:27} {' '.join(v.kernels)}")
        for fault in v.faults:
            print(f"    {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, metavar="FILE", help="results, as JSON")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--archs", default="9.0", help="what to compile for, as TORCH_CUDA_ARCH_LIST has it")
    parser.add_argument("--objects", type=Path, metavar="DIR", help="where setup.py has compiled for --archs")
    parser.add_argument("--prebuilt", type=Path, metavar="DIR", help="what --prepare left there is used")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="compile and emulate into DIR; runs on no GPU")
    parser.add_argument("--limits", nargs=4, default=SMALL_HOPPER, metavar="N", help="of the GPU that --prepare is for")
    parser.add_argument("--case", default="", help="only this one")
    parser.add_argument("--under", default="", metavar="COMMAND", help="that runs the device's program, and is printed")
    arguments = parser.parse_args()
    if (arguments.out is None) == (arguments.prepare is None):
        parser.error("give --out to compare, or --prepare to compile")
    print("building and running", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if arguments.prepare:
                prepare(arguments.prepare, arguments.archs, arguments.limits, arguments.objects)
                return 0
            verdicts = compare(arguments, Path(folder))
        except RuntimeError as failure:
            print(f"compare_gpu: {failure}")
            return 2
    print_table(verdicts)
    bad = sum(bool(v.faults) for v in verdicts)
    print(f"{arguments.device}: {len(verdicts)} cases, {bad} differ")
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    results = {"device": arguments.device, "cases": [asdict(verdict) for verdict in verdicts]}
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.rename(arguments.out)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
