"""Compile every CUDA kernel for several chips and hold it to its budget: registers, shared memory, no spills.

    python -m scripts.check_cuda                 # against csrc/cuda/budgets.json
    python -m scripts.check_cuda --update        # write what was found as the new budget
    python -m scripts.check_cuda --changed       # one chip alone where nothing changed since --update
    python -m scripts.check_cuda --archs 9.0a --files conv1x1_forward

Needs nvcc; neither a GPU nor torch. Where cuobjdump is at hand (``pip install nvidia-cuda-cuobjdump
nvidia-cuda-nvdisasm``) the machine code is read, too: no kernel may touch local memory; each pattern under "sass" in
budgets.json names instructions that the kernels it matches must hold, such as HMMA (tensor cores) or LDG.E.128 (16-byte
loads); and how many instructions a kernel has, and how many of them move less than 16 bytes of global memory ("narrow":
the ragged ends, vectors a channel, scratch), may not grow unnoticed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _build import native

ROOT = Path(__file__).resolve().parent.parent

BUDGETS = native.CSRC / "cuda" / "budgets.json"
ARCHS = ["8.0", "9.0a", "10.0", "12.0"]
#: Those whose objects other checks link and whose PTX they run; the rest are compiled for their budgets alone.
ALWAYS = ["9.0a"]
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
#: What stands beside the chips in budgets.json: patterns of machine code, and the :func:`digest` of what was compiled.
NO_CHIPS = {"sass", "digest"}


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one chip; shared memory is the static part, in bytes."""

    kernel: str
    arch: str
    registers: int
    shared: int
    spills: int


def demangle(names: Sequence[str]) -> list[str]:
    """Names as in the source, without namespaces, return type and parameters; as they are where c++filt is missing."""
    if not names or not shutil.which("c++filt"):
        return list(names)
    full = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [short_name(line) for line in full.splitlines()]


def short_name(signature: str) -> str:
    """The kernel's own name and its template arguments.

    >>> short_name("void ran::cuda::(anonymous namespace)::gate_kernel<float, (ran::Mode)1>(float*, long)")
    'gate_kernel<float, (Mode)1>'
    """
    text = re.sub(r"^void |\(anonymous namespace\)::|\bran::(\w+::)*", "", signature)
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return text[:position]
    return text


def parse_ptxas(said: str) -> list[Usage]:
    """What ``ptxas -v`` printed, a kernel and chip at a time."""
    found = []
    for block in said.split("Compiling entry function '")[1:]:
        name, arch = re.match(r"(\w+)' for '(\w+)'", block).groups()  # type: ignore[union-attr]
        numbers = {
            key: sum(int(number) for number in re.findall(pattern, block.split("Compile time")[0]))
            for key, pattern in (
                ("registers", r"Used (\d+) registers"),
                ("shared", r"(\d+) bytes smem"),
                ("spills", r"(\d+) bytes spill"),
            )
        }
        found.append(Usage(name, arch, **numbers))
    names = demangle([usage.kernel for usage in found])
    return [Usage(name, u.arch, u.registers, u.shared, u.spills) for name, u in zip(names, found, strict=True)]


def find_tool(name: str) -> str | None:
    """A tool of CUDA's on PATH, else in its wheel, such as ``nvidia-cuda-cuobjdump``."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    wheels = [str(tool) for folder in folders for tool in Path(folder).glob(f"*/bin/{name}")]
    return shutil.which(name) or next(iter(wheels), None)


#: What tells of a chip, a kernel or an instruction in what cuobjdump prints.
SASS = re.compile(
    r"^[ \t]*(?:arch = (?P<arch>sm_\w+)|code for (?P<code>sm_\w+)|Function : (?P<kernel>\S+)"
    r"|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(?P<instruction>[A-Z][\w.]+))",
    re.MULTILINE,
)


def read_sass(tool: str, compiled: Path) -> dict[tuple[str, str], Counter[str]]:
    """How often each kernel of an object file holds each instruction, keyed by kernel and chip."""
    arch, held, found = "", Counter[str](), {}
    for match in SASS.finditer(native.run([tool, "-sass", compiled])):
        if match["instruction"]:
            held[match["instruction"]] += 1
        elif match["kernel"]:
            held = found[match["kernel"], arch] = Counter[str]()
        else:
            arch = match["arch"] or match["code"]
    names = dict(zip({key[0]: 0 for key in found}, demangle(list({key[0]: 0 for key in found})), strict=True))
    return {(names[key[0]], key[1]): held for key, held in found.items()}


def code_size(held: Counter[str]) -> dict[str, int]:
    """The budgeted counts of a kernel's machine code, without padding.

    >>> code_size(Counter({"LDG.E.U16": 2, "STG.E.128": 1, "FADD": 3, "NOP": 9}))
    {'instructions': 6, 'narrow': 2}
    """
    moves = {name: count for name, count in held.items() if name.split(".")[0] in ("LDG", "STG")}
    narrow = sum(count for name, count in moves.items() if "128" not in name.split("."))
    return {"instructions": sum(held.values()) - held["NOP"], "narrow": narrow}


def sass_faults(held: dict[tuple[str, str], Counter[str]], wanted: dict[str, list[str]]) -> Iterator[str]:
    """Local memory that a kernel touches, and required instructions that it lacks."""
    for (kernel, arch), instructions in sorted(held.items()):
        local = sorted(name for name in instructions if name.split(".")[0] in ("LDL", "STL"))
        if local:
            yield f"{arch} {kernel}: touches local memory ({', '.join(local)})"
        for pattern, prefixes in wanted.items():
            missing = [p for p in prefixes if not any(name.startswith(p) for name in instructions)]
            if re.search(pattern, kernel) and missing:
                yield f"{arch} {kernel}: holds no {', '.join(missing)}"
    for pattern in wanted:
        if held and not any(re.search(pattern, kernel) for kernel, _ in held):
            yield f"sass pattern {pattern!r} of {BUDGETS.name} matches no kernel"


Held = dict[tuple[str, str], Counter[str]]


def taken(usage: Usage, sass: Held) -> dict[str, int]:
    """What one kernel takes on one chip, by the names in budgets.json."""
    held = sass.get((usage.kernel, usage.arch.rstrip("af")), sass.get((usage.kernel, usage.arch)))
    return {"registers": usage.registers, "shared": usage.shared, **(code_size(held) if held else {})}


def budget_faults(
    usages: Sequence[Usage], budgets: dict[str, Any], whole: bool, sass: Held | None = None
) -> Iterator[str]:
    """Where a kernel takes more than its budget, or has none; ``whole``: where a budget has no kernel."""
    for u in usages:
        budget = budgets.get(u.arch, {}).get(u.kernel)
        if u.spills:
            yield f"{u.arch} {u.kernel}: {u.spills} bytes of spills; none are allowed"
        if budget is None:
            yield f"{u.arch} {u.kernel}: has no budget; --update writes it"
            continue
        for name, used in taken(u, sass or {}).items():
            if used > budget.get(name, used):
                yield f"{u.arch} {u.kernel}: {used} {name}, and its budget is {budget[name]}"
    seen = {(u.arch, u.kernel) for u in usages}
    for arch in {u.arch for u in usages} & budgets.keys() if whole else ():
        for kernel in budgets[arch]:
            if (arch, kernel) not in seen:
                yield f"{arch} {kernel}: has a budget, but no kernel; --update drops it"


def sources() -> list[Path]:
    """The files that the kernels are compiled from: those of csrc/cuda, and what they include from elsewhere."""
    found = [path for path in (native.CSRC / "cuda").iterdir() if path.suffix in (".cu", ".cuh", ".h")]
    for path in found:  # grows meanwhile
        headers = [Path(os.path.normpath(path.parent / name)) for name in INCLUDE.findall(path.read_text())]
        found += [header for header in dict.fromkeys(headers) if header.exists() and header not in found]
    return sorted(found)


def digest(nvcc: Path) -> str:
    """Of all that the kernels are compiled from, by which nvcc and with which flags."""
    found = hashlib.sha256(" ".join([native.nvcc_version(nvcc), *native.CUDA_FLAGS]).encode())
    for source in sources():
        found.update(source.name.encode() + source.read_bytes())
    return found.hexdigest()


def with_chip(ptx: str, archs: Sequence[str]) -> str:
    """The name of a file that nvcc kept: of one chip alone it leaves the chip out.

    >>> with_chip("max_pool.ptx", ["9.0a"]), with_chip("max_pool.compute_80.ptx", ["8.0", "9.0a"])
    ('max_pool.compute_90a.ptx', 'max_pool.compute_80.ptx')
    """
    return ptx if len(archs) > 1 else ptx.replace(".ptx", f".compute_{archs[0].replace('.', '')}.ptx")


def chips(changed: bool, nvcc: Path | None) -> list[str]:
    """Those to compile for; ``changed``: ALWAYS are enough for what ``--update`` found within its budgets."""
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    return ALWAYS if changed and nvcc and budgets.get("digest") == digest(nvcc) else ARCHS


def write_budgets(
    usages: Sequence[Usage], sass: dict[str, list[str]], held: Held | None = None, made_of: str = ""
) -> None:
    """One line a kernel and chip, so that a change reads well in a diff."""
    parts = ["{"]
    for arch in sorted({u.arch for u in usages}, key=lambda name: int(re.sub(r"\D", "", name))):
        rows = sorted({u.kernel: u for u in usages if u.arch == arch}.items())
        lines = [f"    {json.dumps(kernel)}: {json.dumps(taken(u, held or {}))}" for kernel, u in rows]
        parts.append(f'  "{arch}": {{\n' + ",\n".join(lines) + "\n  },")
    patterns = [f"    {json.dumps(pattern)}: {json.dumps(names)}" for pattern, names in sass.items()]
    parts.append(f'  "digest": "{made_of}",')
    parts.append('  "sass": {\n' + ",\n".join(patterns) + "\n  }\n}\n")
    BUDGETS.write_text("\n".join(parts))


def print_table(usages: Sequence[Usage]) -> None:
    print(f"{'chip':8} {'regs':>4} {'smem':>6} {'spill':>5}  kernel")
    for u in sorted(usages, key=lambda u: (u.kernel, u.arch)):
        print(f"{u.arch:8} {u.registers:4} {u.shared:6} {u.spills:5}  {u.kernel}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--archs", nargs="+", metavar="X.Y", help=f"chips; default {' '.join(ARCHS)}")
    parser.add_argument("--changed", action="store_true", help=f"only {' '.join(ALWAYS)} where --update saw the rest")
    parser.add_argument(
        "--print-archs", action="store_true", help="compile nothing; print the chips, for other commands"
    )
    parser.add_argument("--files", nargs="+", default=[], metavar="STEM", help="only these files of csrc/cuda")
    parser.add_argument("--build", type=Path, metavar="DIR", help="keep the objects there, and the PTX beside them")
    parser.add_argument("--update", action="store_true", help=f"rewrite {BUDGETS.name} with what was found")
    arguments = parser.parse_args(argv)
    home = native.find_toolkit()
    archs = arguments.archs or chips(arguments.changed, home and home / "bin" / "nvcc")
    if arguments.print_archs:
        print(*archs, sep=";")
        return 0
    if home is None:
        print("check_cuda: no nvcc was found; install a CUDA toolkit, or set CUDA_HOME")
        return 2
    build = arguments.build.resolve() if arguments.build else None
    with tempfile.TemporaryDirectory() as folder:
        tasks = native.cuda_tasks(build or Path(folder), home / "bin" / "nvcc", archs)
        chosen = [task for task in tasks if not arguments.files or task.source.stem in arguments.files]
        if not chosen or len(chosen) < len(arguments.files):
            print(f"check_cuda: --files must name files among: {' '.join(task.source.stem for task in tasks)}")
            return 2
        try:
            more = ["-Xptxas=-v", *(["-lineinfo", "--keep", f"--keep-dir={folder}"] if build else [])]
            tool = find_tool("cuobjdump")

            def compile_and_read(task: native.Compile) -> tuple[list[Usage], Held]:
                usages = parse_ptxas(task.run(more))
                return usages, read_sass(tool, task.object) if tool else {}

            with ThreadPoolExecutor(native.jobs()) as pool:
                compiled = list(pool.map(compile_and_read, chosen))
            usages = [usage for file, _ in compiled for usage in file]
            sass = {key: held for _, file in compiled for key, held in file.items()}
            for ptx in Path(folder).glob("*.ptx"):
                shutil.move(ptx, tasks[0].object.parent / with_chip(ptx.name, archs))
        except native.BuildFailure as failure:
            print(failure)
            return 1
    whole = not arguments.files and archs in (ARCHS, ALWAYS)
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    wanted = budgets.get("sass", {})
    print_table(usages)
    if arguments.update:
        if arguments.files or archs != ARCHS:
            print("check_cuda: --update takes all files and all chips: leave --files, --archs and --changed out")
            return 2
        if not tool:
            print("check_cuda: --update reads the machine code: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
            return 2
        write_budgets(usages, wanted, sass, digest(home / "bin" / "nvcc"))
        budgets = json.loads(BUDGETS.read_text())
    faults = [*budget_faults(usages, budgets, whole, sass), *sass_faults(sass, wanted if whole else {})]
    print(*(f"FAULT {fault}" for fault in faults), sep="\n")
    read = "machine code read" if tool else "machine code not read: no cuobjdump"
    print(f"{len(chosen)} files, {len(usages)} kernels on {len(archs)} chips, {len(faults)} faults, {read}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
