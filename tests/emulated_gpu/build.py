"""Builds ran_ext with the GPU's half of its torch side, on CPU tensors, with the kernels under emulation.

What chooses, allocates and launches is that of csrc, line for line; CUDA and c10's half for it are gpu.h.

    python -m tests.emulated_gpu.build OBJECTS SITE
    PYTHONPATH=SITE python tests/emulated_gpu/errors.py     # and memory.py
"""

from __future__ import annotations

import fcntl
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from _build import native

from ..emulation import build as emulation

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

#: Of the torch side, which takes longer to compile than it runs here.
FLAGS = ["-std=c++20", "-O0", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-w"]
MACROS = {"RAN_EMULATE": "", "RAN_WITH_CUDA": "", "RAN_CUDA_VERSION": '"emulated"', "TORCH_EXTENSION_NAME": "_C"}
#: What csrc includes of CUDA's headers and c10's half for it; gpu.h has taken their place.
STANDING_IN = ["cuda_runtime_api.h", *(f"c10/cuda/CUDA{name}.h" for name in ("Functions", "Guard", "Stream"))]
STANDING_IN += ["c10/cuda/CUDAGraphsC10Utils.h"]


def objects(folder: Path) -> list[str]:
    """The package's objects, kept in ``folder``; compiled where they are not fresh."""
    for name in STANDING_IN:
        path = folder / "include" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text("#pragma once\n")
    macros = {**MACROS, "RAN_TORCH_VERSION": f'"{torch.__version__}"'}
    flags = [*FLAGS, *(f"-D{name}={value}" for name, value in macros.items())]
    flags += [f"-iquote{ROOT}", f"-iquote{ROOT / 'tests' / 'emulation'}", f"-isystem{folder / 'include'}"]
    flags += [f"-isystem{place}" for place in (*include_paths(), sysconfig.get_paths()["include"])]
    torch_side = [*native.torch_units(folder / "units"), HERE / "memory.cpp"]
    gpu = HERE / "gpu.h"
    if headers := native.precompilation(gpu, folder, flags):
        native.compile_all(headers)
        gpu = headers[0].source
    command = (*native.cxx(), *flags, "-include", str(gpu), "-x", "c++")
    tasks = [native.Compile(source, folder / f"{source.stem}.o", command) for source in torch_side]
    tasks += [task for task in native.cpu_tasks() if task.object.parent.name == "baseline"]
    return [*native.compile_all(tasks), *map(str, emulation.objects(emulation.kernels()))]


def build(folder: Path, site: Path) -> None:
    """Puts the package into ``site``, for PYTHONPATH; what is compiled is kept in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # two workers compile once
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = objects(folder)
    package = site / "ran_ext"
    ignored = shutil.ignore_patterns("_C.*.so", "_built_for.py", "__pycache__")
    shutil.copytree(ROOT / "ran_ext", package, ignore=ignored)
    paths = package / "_paths.py"
    paths.write_text(paths.read_text().replace("x.is_cpu", "x.is_meta"))  # as gpu.h: what is asked of GPUs counts
    libraries = [*(f"-L{place}" for place in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    module = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    native.run([*native.cxx(), "-shared", *made, *libraries, "-fopenmp", "-o", module])


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
