"""Builds ran_ext: the one extension ``ran_ext._C`` for the torch that is installed, with CUDA where that torch has it.

``RAN_EXT_NO_NATIVE=1`` builds pure Python, ``RAN_EXT_NO_CUDA=1`` the CPU kernels only, ``RAN_EXT_FORCE_CUDA=1`` makes
leaving CUDA out an error. ``TORCH_CUDA_ARCH_LIST``, ``CUDA_HOME``, ``CXX``, ``MAX_JOBS``: as torch reads them.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

from _build import native

ROOT = Path(__file__).resolve().parent


def switch(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def why_no_native() -> str:
    if switch("RAN_EXT_NO_NATIVE"):
        return "RAN_EXT_NO_NATIVE=1 was set at installation"
    return "the kernels build on Linux and macOS only" if sys.platform == "win32" else ""


def import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"ran_ext: torch is needed to build the kernels, and does not import ({error}).\n"
            f"  install it first:      {sys.executable} -m pip install torch=={torch_pin()}\n"
            "  or build pure Python:  RAN_EXT_NO_NATIVE=1 pip install ..."
        ) from error
    return torch


def torch_pin() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ran_ext"]["torch"])


def cuda_toolkit(torch: Any) -> tuple[Path | None, str]:
    """The CUDA toolkit to build with and "", or None and why CUDA is left out."""
    reason, home = "", native.find_toolkit()
    if switch("RAN_EXT_NO_CUDA"):
        reason = "RAN_EXT_NO_CUDA=1 was set at installation"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} has no CUDA"
    elif home is None:
        reason = f"no toolkit (nvcc, cuda_runtime.h) was found for torch's CUDA {torch.version.cuda}; set CUDA_HOME"
    else:
        found = native.nvcc_version(home / "bin" / "nvcc")
        if found.split(".")[0] != torch.version.cuda.split(".")[0]:
            reason = f"{home} is CUDA {found}, but torch {torch.__version__} was built with CUDA {torch.version.cuda}"
    if reason and switch("RAN_EXT_FORCE_CUDA"):
        raise SystemExit(f"ran_ext: RAN_EXT_FORCE_CUDA=1, but CUDA cannot be built: {reason}")
    return (None, reason) if reason else (home, "")


class Plan:
    """What this build makes; it ends as ran_ext/_built_for.py, which the import compares with what runs."""

    def __init__(self) -> None:
        self.no_native = why_no_native()
        self.torch = None if self.no_native else import_torch()
        self.cuda_home: Path | None = None
        self.no_cuda = self.no_native
        self.archs: list[str] = []
        if self.torch is not None:
            self.cuda_home, self.no_cuda = cuda_toolkit(self.torch)
        if self.cuda_home is not None:
            self.archs = native.cuda_archs(self.cuda_home / "bin" / "nvcc")

    def requirement(self) -> str:
        """A compiled module fits one minor version of torch, and no other."""
        if self.torch is None:
            return "torch>=2.11,<2.16"
        return f"torch=={'.'.join(self.torch.__version__.split('.')[:2])}.*"

    def write(self, folder: Path) -> None:
        compiler = ""
        if self.torch is not None:
            compiler = native.run([*native.cxx(), "--version"]).splitlines()[0]
        fields = {
            "TORCH": None if self.torch is None else str(self.torch.__version__),
            "CUDA": None if self.cuda_home is None else native.nvcc_version(self.cuda_home / "bin" / "nvcc"),
            "ARCHS": self.archs,
            "COMPILER": compiler,
            "WHY_NO_NATIVE": self.no_native,
            "WHY_NO_CUDA": self.no_cuda,
        }
        lines = ['"""What this installation was built for; written by setup.py."""', ""]
        lines += [f"{name}{': list[str]' if name == 'ARCHS' else ''} = {value!r}" for name, value in fields.items()]
        (folder / "_built_for.py").write_text("\n".join(lines) + "\n")

    def extension(self) -> Any:
        """The torch side; the kernel objects are added when they are compiled."""
        from torch.utils.cpp_extension import CppExtension

        assert self.torch is not None
        macros: list[tuple[str, str | None]] = [("RAN_TORCH_VERSION", f'"{self.torch.__version__}"')]
        if len(native.isas()) > 1:
            macros.append(("RAN_X86_ISAS", None))  # the objects beyond the baseline are linked in
        include, libraries, folders = [], [], []
        if self.cuda_home is not None:
            macros += [("RAN_WITH_CUDA", None), ("RAN_CUDA_VERSION", f'"{self.torch.version.cuda}"')]
            include = [str(self.cuda_home / "include")]
            libraries = ["c10_cuda", "torch_cuda", "cudart"]
            folders = [str(folder) for name in ("lib64", "lib") if (folder := self.cuda_home / name).is_dir()]
        # at::parallel_for is serial in a file compiled without OpenMP; Apple's compiler has none.
        openmp = ["-fopenmp"] if sys.platform == "linux" else []
        return CppExtension(
            "ran_ext._C",
            [str(path.relative_to(ROOT)) for path in native.torch_units(ROOT / "build" / "torch")],
            include_dirs=include,
            define_macros=macros,
            libraries=libraries,
            library_dirs=folders,
            # GCC tells of signs that are compared in torch's headers once these are compiled apart
            extra_compile_args=[*native.TORCH_FLAGS, *openmp, "-Wno-sign-compare"],
            extra_link_args=openmp,
            depends=[str(path) for path in [*native.torch_sources(), *sorted(native.CSRC.rglob("*.h"))]],
        )


PLAN = Plan()


class BuildPython(build_py):  # type: ignore[misc]
    """Adds _built_for.py, and takes away what an earlier build of other sources or other switches left."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "ran_ext", ignore_errors=True)
        super().run()
        if self.editable_mode:
            for stale in (ROOT / "ran_ext").glob("_C.*.so") if PLAN.torch is None else ():
                stale.unlink()
            PLAN.write(ROOT / "ran_ext")
        elif (Path(self.build_lib) / "ran_ext").is_dir():
            PLAN.write(Path(self.build_lib) / "ran_ext")


HELP = """
ran_ext: compiling the kernels failed; the compiler's message stands above. What can be done:
  RAN_EXT_NO_CUDA=1    build the CPU kernels only (where nvcc failed)
  RAN_EXT_NO_NATIVE=1  install pure Python: every op works, at plain PyTorch's speed
  MAX_JOBS=1           where the compiler was killed for want of memory
  TORCH_CUDA_ARCH_LIST=8.0  build for one architecture; CUDA_HOME and CXX choose the tools"""


def build_ext_command() -> Any:
    from torch.utils.cpp_extension import BuildExtension

    # Where the environment is not activated, its ninja is not on PATH.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

    class BuildKernels(BuildExtension):  # type: ignore[misc, valid-type]
        build_temp: str | None

        def finalize_options(self) -> None:
            if self.build_temp is None:  # for an editable installation too, whose own folder is thrown away
                kind = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
                self.build_temp = os.path.join("build", f"temp.{kind}")
            super().finalize_options()

        def run(self) -> None:
            super().run()
            if self.inplace:
                PLAN.write(ROOT / "ran_ext")

        def build_extensions(self) -> None:
            if PLAN.no_cuda:
                print(f"ran_ext: building the CPU kernels only: {PLAN.no_cuda}", file=sys.stderr, flush=True)
            tasks = native.cpu_tasks()
            if PLAN.cuda_home is not None:
                tasks += native.cuda_tasks(native.OBJECTS, PLAN.cuda_home / "bin" / "nvcc", PLAN.archs)
            extension, headers = self.extensions[0], self.precompilation()
            try:
                made = native.compile_all([*headers, *tasks])
                extension.extra_objects = made[len(headers) :]
                for task in headers:
                    extension.extra_compile_args += ["-include", str(task.source), "-Winvalid-pch"]
                super().build_extensions()
            except (native.BuildFailure, RuntimeError, OSError) as error:
                raise SystemExit(f"{error}\n{HELP}") from error

        def precompilation(self) -> list[native.Compile]:
            """Of the headers of the torch side, with the flags that its files will have."""
            extension, compiler = self.extensions[0], self.compiler
            flags = list(getattr(compiler, "compiler_so_cxx", compiler.compiler_so)[1:])
            macros = [*extension.define_macros, ("TORCH_API_INCLUDE_EXTENSION_H", None), ("TORCH_EXTENSION_NAME", "_C")]
            flags += [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in macros]
            flags += [f"-I{folder}" for folder in [*extension.include_dirs, *self.include_dirs]]
            flags += extension.extra_compile_args
            return native.precompilation(native.CSRC / "common" / "torch_headers.h", ROOT / str(self.build_temp), flags)

    return BuildKernels


if PLAN.torch is None:
    print(f"ran_ext: pure Python, no kernels: {PLAN.no_native}", file=sys.stderr, flush=True)
setup(
    install_requires=[PLAN.requirement(), "numpy>=1.26", "pillow>=10", "safetensors>=0.4", "tqdm>=4.66"],
    ext_modules=[] if PLAN.torch is None else [PLAN.extension()],
    cmdclass={"build_py": BuildPython, **({} if PLAN.torch is None else {"build_ext": build_ext_command()})},
)
