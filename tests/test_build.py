"""The build: what it makes, what it compiles again, and what it says when it cannot.

A small project with the real setup.py and the real backend, and with kernels that compile in a second, stands for the
package: its builds need no minutes. The package itself is built in its ways by .ci/run.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from ran_ext import _backend
from scripts import build_wheel

ROOT = Path(__file__).resolve().parent.parent
SWITCHES = ("RAN_EXT_", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")
MINOR = ".".join(torch.__version__.split(".")[:2])

BINDINGS = """
#include <torch/csrc/utils/pybind.h>
namespace ran::cpu {
#define DECLARE(isa) namespace isa { const char* name(); }
DECLARE(baseline) DECLARE(avx2) DECLARE(avx512) DECLARE(avx512_bf16)
}
PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] { py::dict d; d["torch"] = RAN_TORCH_VERSION; d["cuda"] = py::none(); return d; });
  m.def("names", [] {
    return std::vector<std::string>{ran::cpu::baseline::name()
#ifdef RAN_X86_ISAS
      , ran::cpu::avx2::name(), ran::cpu::avx512::name(), ran::cpu::avx512_bf16::name()
#endif
    };
  });
}
"""
KERNEL = """
#include "kernel.h"
namespace ran::cpu::RAN_ISA {
const char* name() {
#if defined(__AVX512BF16__)
  return PREFIX "avx512_bf16";
#elif defined(__AVX512F__)
  return PREFIX "avx512";
#elif defined(__AVX2__)
  return PREFIX "avx2";
#else
  return PREFIX "baseline";
#endif
}
}
"""


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


native = load(ROOT / "_build" / "native.py")
backend = load(ROOT / "_build" / "backend.py")
needs_tools = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None or shutil.which(native.cxx()[0]) is None,
    reason="needs setuptools and a C++ compiler",
)


def call(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(SWITCHES)}
    clean = {**clean, "MAX_JOBS": "2", **environment}
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, env=clean)


#: Files of the package that the small project has, too.
COPIED = ("_backend.py", "_choice.py", "_hardware.py", "_tracing.py", "_info.py", "info.py", "_C.pyi", "py.typed")


def make_project(folder: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text("a small project\n")
    shutil.copytree(ROOT / "_build", folder / "_build", ignore=shutil.ignore_patterns("__pycache__"))
    package = folder / "ran_ext"
    package.mkdir()
    for name in COPIED:
        shutil.copy(ROOT / "ran_ext" / name, package)
    (package / "__init__.py").write_text("from . import _backend\n__version__ = '0.1.0'\n")
    (folder / "csrc/cpu").mkdir(parents=True)
    (folder / "csrc/bindings.cpp").write_text(BINDINGS)
    (folder / "csrc/cpu/kernel_cpu.cpp").write_text(KERNEL)
    (folder / "csrc/common").mkdir()
    (folder / "csrc/common/torch_headers.h").write_text("#pragma once\n#include <cstdint>\n")
    (folder / "csrc/cpu/kernel.h").write_text('#define PREFIX ""\n')
    return folder


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path)


# --------------------------------------------------------------------------------------------- what setup.py makes


@needs_tools
@pytest.mark.slow
def test_build_is_whole_and_incremental(project):
    # As where the environment is not activated: its ninja is not on PATH, nor is another.
    tools = project.parent / "tools"
    tools.mkdir()
    for tool in Path("/usr/bin").iterdir():
        if tool.name != "ninja":
            (tools / tool.name).symlink_to(tool)
    first = call(project, "setup.py", "build_ext", "--inplace", PATH=str(tools))
    assert first.returncode == 0, first.stdout + first.stderr
    if (Path(sysconfig.get_path("scripts")) / "ninja").exists():
        assert "[1/" in first.stdout
    names = "import ran_ext._C as c; print(*c.names()); print(c.build_info())"
    assert call(project, "-c", names).stdout.splitlines()[0].split() == list(native.isas())
    assert f"'torch': '{torch.__version__}'" in call(project, "-c", names).stdout

    again = call(project, "setup.py", "build_ext", "--inplace")
    assert "kernel_cpu.cpp" not in again.stdout

    (project / "csrc/cpu/kernel.h").write_text('#define PREFIX "new_"\n')
    third = call(project, "setup.py", "build_ext", "--inplace")
    assert third.stdout.count("/kernel_cpu.cpp") == len(native.isas())
    assert "[1/" not in third.stdout  # ninja had nothing to do for the torch side
    assert call(project, "-c", names).stdout.startswith("new_baseline")

    editable = call(project, "-c", "import backend; print(backend.build_editable('dist'))", PYTHONPATH="_build")
    assert editable.returncode == 0, editable.stdout + editable.stderr
    assert "kernel_cpu.cpp" not in editable.stdout
    assert "[1/" not in editable.stdout

    moved = shutil.copytree(project, project.parent / "a copy", copy_function=shutil.copy2)
    fresh = call(moved, "-c", "from _build import native; print({task.is_fresh() for task in native.cpu_tasks()})")
    assert fresh.stdout.strip() == "{True}", fresh.stderr

    noted = {}
    exec((project / "ran_ext/_built_for.py").read_text(), noted)
    assert noted["TORCH"] == torch.__version__
    assert noted["COMPILER"]

    (project / "csrc/cpu/kernel.h").write_text("#error this kernel does not compile\n")
    broken = call(project, "setup.py", "build_ext", "--inplace")
    assert broken.returncode != 0
    for text in ("this kernel does not compile", "RAN_EXT_NO_CUDA=1", "RAN_EXT_NO_NATIVE=1", "MAX_JOBS=1"):
        assert text in broken.stderr


@needs_tools
def test_flags_that_are_only_told_leave_an_object_fresh(tmp_path):
    (tmp_path / "a.cpp").write_text("int one() { return 1; }\n")
    task = native.Compile(tmp_path / "a.cpp", tmp_path / "a.o", (*native.cxx(),))
    assert "a.cpp" in task.run(["-H", "-v"])
    assert task.is_fresh()


@needs_tools
@pytest.mark.parametrize(("no_native", "wanted"), [("", f"torch=={MINOR}.*"), ("1", "torch<2.16,>=2.11")])
def test_requirement_fits_what_is_built(project, no_native, wanted):
    done = call(project, "setup.py", "-q", "egg_info", RAN_EXT_NO_NATIVE=no_native)
    assert done.returncode == 0, done.stderr
    assert wanted in (project / "ran_ext.egg-info/requires.txt").read_text().split()


@needs_tools
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_force_cuda_is_an_error_without_cuda(project):
    done = call(project, "setup.py", "--version", RAN_EXT_FORCE_CUDA="1")
    assert done.returncode != 0
    assert f"RAN_EXT_FORCE_CUDA=1, but CUDA cannot be built: torch {torch.__version__} has no CUDA" in done.stderr


@needs_tools
def test_torch_missing_is_said(project):
    (project / "torch.py").write_text("raise ImportError('hidden by the test')\n")
    done = call(project, "setup.py", "--version", PYTHONPATH=str(project))
    assert done.returncode != 0
    assert f"pip install torch=={backend_pin()}" in done.stderr
    assert "RAN_EXT_NO_NATIVE=1" in done.stderr


@needs_tools
def test_pure_wheel_holds_no_leftovers(project):
    (project / "ran_ext/_C.cpython-311-x86_64-linux-gnu.so").write_bytes(b"an earlier build")
    (project / "ran_ext/_built_for.py").write_text("TORCH = 'an earlier build'\n")
    (project / "build/lib/ran_ext").mkdir(parents=True)
    (project / "build/lib/ran_ext/removed.py").write_text("")
    code = "import backend; print(backend.build_wheel('dist'))"
    done = call(project, "-c", code, PYTHONPATH="_build", RAN_EXT_NO_NATIVE="1")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((project / "dist").glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if name.startswith("ran_ext/")}
        names = ("__init__.py", "_built_for.py", *COPIED)
        assert held == {f"ran_ext/{name}" for name in names}
        notes = wheel.read("ran_ext/_built_for.py").decode()
        assert "WHY_NO_NATIVE = 'RAN_EXT_NO_NATIVE=1 was set at installation'" in notes


@needs_tools
def test_sdist_holds_what_a_build_needs(tmp_path):
    project = make_project(tmp_path)
    shutil.copytree(ROOT / "csrc", project / "csrc", dirs_exist_ok=True)
    shutil.copytree(ROOT / "ran_ext/data", project / "ran_ext/data", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "ran_ext/_built_for.py").write_text("TORCH = None\n")
    code = "import backend; print(backend.build_sdist('dist'))"
    done = call(project, "-c", code, PYTHONPATH="_build")
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((project / "dist").glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    sample = {str(path.relative_to(ROOT)) for path in (ROOT / "ran_ext/data/sample").rglob("*") if path.is_file()}
    needed = {"setup.py", "pyproject.toml", "_build/backend.py", "_build/native.py", "LICENSE", "ran_ext/py.typed"}
    assert needed | sources | sample <= held
    assert "ran_ext/_built_for.py" not in held


# ------------------------------------------------------------------------------------------------- the PEP 517 backend


def backend_pin() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ran_ext"]["torch"]


def test_isolated_build_takes_the_torch_that_is_there(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAN_EXT_NO_NATIVE", raising=False)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("")
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name, vars=None: str(tmp_path))
    assert backend.target_torch() == tmp_path
    assert backend.get_requires_for_build_wheel() == ["setuptools>=77", "ninja"]


def test_isolated_build_asks_for_the_pin_where_no_torch_is(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAN_EXT_NO_NATIVE", raising=False)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name, vars=None: str(tmp_path))
    monkeypatch.setattr(backend.site, "getusersitepackages", lambda: str(tmp_path))
    assert f"torch=={backend_pin()}" in backend.get_requires_for_build_editable()
    assert backend.get_requires_for_build_sdist() == ["setuptools>=77"]
    monkeypatch.setenv("RAN_EXT_NO_NATIVE", "1")
    assert backend.get_requires_for_build_wheel() == ["setuptools>=77"]


def test_the_pin_stands_in_one_place():
    pin = backend_pin()
    names = (".ci/run", "*.py", "*.md", "_build/*.py", "scripts/*.py")
    files = [path for name in names for path in ROOT.glob(name)]
    assert [path for path in files if f"torch=={pin}" in path.read_text()] == []


# ---------------------------------------------------------------------------------------------- flags and architectures


@pytest.fixture
def nvcc(tmp_path):
    tool = tmp_path / "bin" / "nvcc"
    tool.parent.mkdir()
    script = "#!/bin/sh\ncase $1 in --version) echo 'release 12.4,';; *) echo sm_80; echo sm_86; echo sm_90;; esac\n"
    tool.write_text(script)
    tool.chmod(0o755)
    return tool


def test_default_architectures_are_those_that_nvcc_knows(monkeypatch, nvcc):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert native.cuda_archs(nvcc) == ["8.0", "8.6", "9.0+PTX"]
    assert native.nvcc_version(nvcc) == "12.4"


def test_arch_list_overrides_the_default(monkeypatch, nvcc):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;12.0+PTX")
    assert native.cuda_archs(nvcc) == ["8.0", "9.0a", "12.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere;Hopper 8.0")
    assert native.cuda_archs(nvcc) == ["8.0", "8.6+PTX", "9.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "sm_90")
    with pytest.raises(native.BuildFailure, match=r"TORCH_CUDA_ARCH_LIST must hold .* got 'sm_90'"):
        native.cuda_archs(nvcc)


def test_architectures_that_have_no_kernels_are_left_out_with_a_sentence(monkeypatch, nvcc, capsys):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.6")
    assert native.cuda_archs(nvcc) == ["8.6"]
    assert "no kernels for 7.5: they need compute capability 8.0 or more" in capsys.readouterr().out
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5+PTX")
    with pytest.raises(native.BuildFailure, match=r"7\.5\+PTX.*need compute capability 8\.0"):
        native.cuda_archs(nvcc)


def test_a_chip_between_two_architectures_finds_ptx(monkeypatch, nvcc):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(native, "known_archs", lambda nvcc: {*native.DEFAULT_ARCHS, "11.0"})
    archs = native.cuda_archs(nvcc)
    for chip in (11.0, 12.1):
        older = [arch for arch in archs if arch.endswith("+PTX") and float(arch.removesuffix("+PTX")) <= chip]
        assert older, f"{chip} has neither machine code nor PTX among {archs}"


def test_toolkit_needs_its_headers(monkeypatch, nvcc, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert native.find_toolkit() != tmp_path
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").write_text("")
    assert native.find_toolkit() == tmp_path


def test_max_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert native.jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(native.BuildFailure, match="MAX_JOBS must be a whole number from 1 up, got 'many'"):
        native.jobs()


def test_baseline_objects_are_linked_first(tmp_path):
    """The linker keeps the first copy of a function that several objects share: the one that every processor runs."""
    folders = [task.object.parent.name for task in native.cpu_tasks(tmp_path)]
    assert folders == sorted(folders, key=list(native.X86_ISAS).index)
    assert folders[0] == "baseline"


# ------------------------------------------------------------------------------------------------------- the wheel


def test_a_wheels_name_says_which_torch_it_fits():
    assert build_wheel.tag("2.13.0+cpu", None) == "+torch2.13.cpu"
    assert build_wheel.tag("2.11.0+cu130", "13.0") == "+torch2.11.cu130"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_wheel_with_cuda_needs_a_torch_with_cuda(tmp_path, capsys):
    assert build_wheel.main(["--cuda", "--out", str(tmp_path)]) == 1
    assert f"--cuda needs a CUDA build of torch, and torch {torch.__version__} has no CUDA" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("version", "cure"), [("0.1.0+torch2.13.cpu", "Install the wheel"), ("0.1.0", "To rebuild")])
def test_the_cure_of_an_unfit_wheel_is_another_wheel(version, cure, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert _backend._cure().startswith(cure)
