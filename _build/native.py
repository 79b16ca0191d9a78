"""How the torch-free kernel files are compiled: instruction sets, CUDA toolkit, architectures, and a small make.

setup.py compiles with it, ``scripts/check_cuda.py`` checks with it. Standard library only.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
#: The kernels' objects, whichever way of building made them. They know neither torch nor Python, so they serve again.
OBJECTS = ROOT / "build" / "kernels"

#: Never -ffast-math: NaN has to pass through the kernels. -g0: Python's own flags may carry -g.
CXX_FLAGS = ["-g0", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"]
#: GCC 12's own AVX-512 headers set off -Wuninitialized and -Wmaybe-uninitialized.
#: Loops begin with a cache line: where one happens to lie decides over a sixth of the speed of a matrix product.
CPU_FLAGS = ["-std=c++17", "-O3", *CXX_FLAGS, "-falign-loops=64", "-fno-math-errno", "-fno-trapping-math"]
CPU_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
#: What knows torch chooses, allocates and calls: -O3 takes longer to compile, not less to run.
TORCH_FLAGS = ["-std=c++20", "-O2", *CXX_FLAGS]
CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
#: Instruction sets of the CPU kernels, poorest first; the first that the linker meets gives the functions that all
#: objects share, so that code for a newer processor never runs on an older one.
X86_ISAS = {"baseline": [], "avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": [*_AVX512, "-mavx512bf16"]}

#: Sane for a release; filtered by what the nvcc at hand knows. Also as PTX are 10.0, which 11.0 compiles for itself, and
#: the last one, for what comes later.
DEFAULT_ARCHS = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
#: What TORCH_CUDA_ARCH_LIST may call them, as in torch.utils.cpp_extension.
NAMED_ARCHS = {
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
    **dict.fromkeys(["Maxwell", "Maxwell+Tegra", "Pascal", "Volta", "Volta+Tegra"], "7.0"),
    "Turing": "7.5",
}
#: Of the kernels: asynchronous copies and bfloat16.
LEAST_ARCH = 8.0


class BuildFailure(Exception):
    """A compiler or a tool failed; the text holds its command and its output."""


def isas() -> dict[str, list[str]]:
    """Flags of each instruction set that the CPU kernels are compiled for on this machine."""
    x86_linux = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
    return X86_ISAS if x86_linux else {"baseline": []}


def jobs() -> int:
    """``MAX_JOBS``, or the cores that this process may use."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            raise BuildFailure(f"MAX_JOBS must be a whole number from 1 up, got {asked!r}")
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cxx() -> list[str]:
    """The C++ compiler: ``CXX``, or ``c++``."""
    return shlex.split(os.environ.get("CXX", "c++"))


def run(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """What ``command`` prints, both streams; BuildFailure with the same text where it fails."""
    line = [str(word) for word in command]
    try:
        done = subprocess.run(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=cwd
        )
    except OSError as error:
        raise BuildFailure(f"{shlex.join(line)}\n{error}") from error
    if done.returncode:
        raise BuildFailure(f"{shlex.join(line)}\n{done.stdout}")
    return done.stdout


# ---------------------------------------------------------------------------------------------------- a small make


@dataclass(frozen=True)
class Compile:
    """One object file: the compiler and its flags, without the source, the output and the dependency file.

    The compiler is called in ROOT, and what lies below is named from there: objects copied with their sources stay fresh.
    """

    source: Path
    object: Path
    command: tuple[str, ...]

    @property
    def full_command(self) -> list[str]:
        source, made = (
            path.relative_to(ROOT) if path.is_relative_to(ROOT) else path for path in (self.source, self.object)
        )
        return [*self.command, "-MMD", "-MF", f"{made}.d", "-c", str(source), "-o", str(made)]

    def is_fresh(self) -> bool:
        """Whether the object is newer than all it was made from, and was made by the same command."""
        record, depfile = Path(f"{self.object}.cmd"), Path(f"{self.object}.d")
        if not (self.object.exists() and record.exists() and depfile.exists()):
            return False
        if record.read_text() != shlex.join(self.full_command):
            return False
        made = self.object.stat().st_mtime
        headers = [ROOT / name for name in shlex.split(depfile.read_text().replace("\\\n", " ").split(": ", 1)[1])]
        return all(header.exists() and header.stat().st_mtime <= made for header in headers)

    def run(self, told: Sequence[str] = ()) -> str:
        """Compile, and note the command beside the object; what the compiler says.

        ``told``: flags that leave the code as it is, and are not noted: whoever wants none finds the object fresh.
        """
        self.object.parent.mkdir(parents=True, exist_ok=True)
        began = time.time()
        said = run([*self.full_command, *told], cwd=ROOT)
        os.utime(self.object, (began, began))  # a source edited meanwhile is newer than its object
        Path(f"{self.object}.cmd").write_text(shlex.join(self.full_command))
        return said


def compile_all(tasks: Sequence[Compile]) -> list[str]:
    """Compile what changed, ``jobs()`` at a time; the objects in the order of ``tasks``."""

    def one(task: Compile) -> None:
        print(f"ran_ext: {task.object.parent.name}/{task.source.name}", flush=True)
        said = task.run()
        if said.strip():
            print(said, flush=True)

    with ThreadPoolExecutor(jobs()) as pool:
        running = [pool.submit(one, task) for task in tasks if not task.is_fresh()]
        try:
            for task in as_completed(running):
                task.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, what has not begun does not begin
    return [str(task.object) for task in tasks]


def precompilation(header: Path, folder: Path, flags: Sequence[str]) -> list[Compile]:
    """What compiles ``header`` once, for files that are compiled with the same ``flags``; nothing but with GCC.

    Half of such a file's time goes into reading torch's headers. GCC takes the result where it meets ``-include`` of
    the header's copy in ``folder``, and reads the copy where the flags differ.
    """
    if "Free Software Foundation" not in run([*cxx(), "--version"]):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / header.name
    if not copy.exists() or copy.read_bytes() != header.read_bytes():
        shutil.copyfile(header, copy)
    return [Compile(copy, copy.with_name(f"{copy.name}.gch"), (*cxx(), *flags, "-x", "c++-header"))]


def torch_sources() -> list[Path]:
    """The files that know torch: all but the kernels."""
    return sorted(path for path in CSRC.rglob("*.cpp") if path.parent.name not in ("cpu", "cuda"))


def torch_units(folder: Path) -> list[Path]:
    """:func:`torch_sources` by fives of a directory, as files in ``folder`` that include them.

    A file that knows torch takes 3 to 10 s, nearly all of it for torch's templates, which five files share.
    """
    units = []
    for place in sorted({path.parent for path in torch_sources()}):
        sources = [path for path in torch_sources() if path.parent == place]
        for first in range(0, len(sources), 5):
            unit = folder / f"{place.name}_{first // 5}.cpp"
            text = "".join(f'#include "{source}"\n' for source in sources[first : first + 5])
            folder.mkdir(parents=True, exist_ok=True)
            if not unit.exists() or unit.read_text() != text:
                unit.write_text(text)
            units.append(unit)
    return units


def cpu_tasks(build: Path = OBJECTS) -> list[Compile]:
    """Every file of csrc/cpu for every instruction set, in a folder each; a set's longest first."""
    return [
        Compile(source, build / isa / f"{source.stem}.o", (*cxx(), *CPU_FLAGS, *flags, f"-DRAN_ISA={isa}"))
        for isa, flags in isas().items()
        for source in sorted((CSRC / "cpu").glob("*.cpp"), reverse=True)
    ]


def cuda_tasks(build: Path, nvcc: Path, archs: Sequence[str]) -> list[Compile]:
    """Every file of csrc/cuda, for all of ``archs`` at once."""
    command = (str(nvcc), *CUDA_FLAGS, *gencode(archs))
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    return [Compile(source, build / "cuda" / f"{source.stem}.o", command) for source in sources]


# ------------------------------------------------------------------------------------------------ the CUDA toolkit


def find_toolkit() -> Path | None:
    """The folder of a CUDA toolkit with nvcc and its headers: CUDA_HOME, /usr/local/cuda, or that of nvcc on PATH."""
    on_path = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in [Path(name) for name in named if name] + ([Path(on_path).resolve().parent.parent] if on_path else []):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def nvcc_version(nvcc: Path) -> str:
    """The toolkit's release, such as ``13.0``."""
    said = run([nvcc, "--version"])
    release = re.search(r"release (\d+\.\d+)", said)
    if release is None:
        raise BuildFailure(f"{nvcc} --version names no release:\n{said}")
    return release.group(1)


def known_archs(nvcc: Path) -> set[str]:
    """Architectures that this nvcc compiles for, such as ``8.0`` and ``12.0``."""
    return {f"{number[:-1]}.{number[-1]}" for number in re.findall(r"sm_(\d+)", run([nvcc, "--list-gpu-code"]))}


def cuda_archs(nvcc: Path) -> list[str]:
    """``TORCH_CUDA_ARCH_LIST`` (``8.0;9.0a;12.0+PTX``, with spaces, or by names such as ``Hopper``), else those of the
    default that nvcc knows. What is below 8.0 is left out, with a sentence.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    if asked.strip(";"):
        named = ";".join(NAMED_ARCHS.get(arch, arch) for arch in asked.split(";"))
        archs = list(dict.fromkeys(arch for arch in named.split(";") if arch))
        wrong = [arch for arch in archs if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch)]
        if wrong:
            raise BuildFailure(
                f"TORCH_CUDA_ARCH_LIST must hold compute capabilities such as 8.0, 9.0a or 12.0+PTX, "
                f"or names such as Hopper, got {wrong[0]!r}"
            )
        taken = [arch for arch in archs if float(re.sub(r"[af]?(\+PTX)?$", "", arch)) >= LEAST_ARCH]
        if not taken:
            raise BuildFailure(
                f"TORCH_CUDA_ARCH_LIST={asked!r}: the kernels need compute capability {LEAST_ARCH} or more"
            )
        if left := [arch for arch in archs if arch not in taken]:
            print(f"ran_ext: no kernels for {', '.join(left)}: they need compute capability {LEAST_ARCH} or more")
        return taken
    known = known_archs(nvcc)
    archs = [arch for arch in DEFAULT_ARCHS if arch in known]
    if not archs:
        raise BuildFailure(f"{nvcc} knows none of the architectures {', '.join(DEFAULT_ARCHS)}: install CUDA 12 or 13")
    return [f"{arch}+PTX" if arch in ("10.0", archs[-1]) else arch for arch in archs]


def gencode(archs: Sequence[str]) -> list[str]:
    """The flags of nvcc for ``archs``; ``+PTX`` adds the intermediate code that newer chips compile for themselves.

    >>> gencode(["8.0", "12.0+PTX"])
    ['-gencode=arch=compute_80,code=sm_80', '-gencode=arch=compute_120,code=[sm_120,compute_120]']
    """
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags
