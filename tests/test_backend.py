"""Which backend a call takes, and what is said where the compiled module is missing or does not fit."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ran_ext
from ran_ext import _backend

PACKAGE = Path(ran_ext.__file__).parent
FIELDS = {"TORCH": torch.__version__, "CUDA": None, "ARCHS": [], "COMPILER": "c++ 12", "WHY_NO_NATIVE": "",
          "WHY_NO_CUDA": "torch has no CUDA"}  # fmt: skip
OUTSIDE = os.environ.get("RAN_EXT_BACKEND") or "auto"
native = pytest.mark.skipif(_backend._C is None, reason=f"no compiled module: {_backend.why_missing}")


@pytest.fixture
def package(tmp_path):
    """A copy of the package that imports what chooses the backend; given a module's bytes and notes, it imports."""
    folder = tmp_path / "ran_ext"
    apart = shutil.ignore_patterns("_C*", "_built_for.py", "__pycache__", "sample", "weights", "train")
    shutil.copytree(PACKAGE, folder, ignore=apart)
    (folder / "__init__.py").write_text("from . import _backend\nfrom ._info import info\n__version__ = '1'\n")

    def run(code: str | list[str], module: bytes | None = None, environment: dict[str, str] | None = None, **fields):
        if fields:
            lines = [f"{name} = {value!r}" for name, value in {**FIELDS, **fields}.items()]
            (folder / "_built_for.py").write_text("\n".join(lines))
        if module is not None:
            (folder / "_C.so").write_bytes(module)
        return subprocess.run(
            [sys.executable, "-c", code] if isinstance(code, str) else [sys.executable, "-m", *code],
            cwd=tmp_path, env={**os.environ, **(environment or {})}, capture_output=True, text=True,
        )  # fmt: skip

    return run


REASON = "from ran_ext import _backend; print(_backend._C, '|', _backend.why_missing)"


def test_not_built_is_quiet(package):
    done = package(REASON)
    assert done.stdout == "None | not built: this source folder has not been built\n"
    assert done.stderr == ""


def test_pure_python_says_why(package):
    done = package(REASON, TORCH=None, WHY_NO_NATIVE="RAN_EXT_NO_NATIVE=1 was set")
    assert done.stdout == "None | not built: RAN_EXT_NO_NATIVE=1 was set\n"
    assert done.stderr == ""


def test_a_module_that_does_not_load_warns_once(package):
    done = package(REASON + "; import ran_ext; ran_ext.info()", b"not a library", TORCH=torch.__version__)
    assert "built, but does not load: " in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1
    assert "plain PyTorch is" in done.stderr


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"TORCH": "2.9.1+cpu"}, f"built for torch 2.9.1+cpu, but torch {torch.__version__} runs"),
        ({"CUDA": "11.8"}, f"built for CUDA 11.8, but torch {torch.__version__} runs, with CUDA"),
    ],
)
def test_a_build_for_another_torch_warns_with_the_command(package, fields, text):
    done = package(REASON, b"never opened", **fields)
    assert done.stdout.startswith(f"None | {text}")
    assert done.stderr.count("RuntimeWarning") == 1
    assert f"{shlex.quote(sys.executable)} -m pip install " in done.stderr


def test_a_patch_release_of_torch_fits():
    patch = ".".join([*torch.__version__.split("+")[0].split(".")[:2], "99"])
    built = type(sys)("built")
    built.TORCH, built.CUDA = patch, None
    assert _backend._unfit(built) == ""


def test_rebuild_command_of_a_checkout(package, tmp_path):
    (tmp_path / "csrc").mkdir()
    done = package("from ran_ext import _backend; print(_backend.rebuild_command())")
    words = shlex.split(done.stdout)
    assert words[:4] == [sys.executable, "-m", "pip", "install"]
    assert words[-2:] == ["-e", str(tmp_path)]


@pytest.mark.parametrize(
    ("origin", "target"),
    [
        ('{"url": "file:///tmp", "dir_info": {}}', "/tmp"),
        ('{"url": "https://x.org/r.git", "vcs_info": {"vcs": "git", "commit_id": "ab"}}', "git+https://x.org/r.git@ab"),
        ("{}", "<folder of the sources>"),
    ],
)
def test_rebuild_command_of_an_installation(package, tmp_path, origin, target):
    notes = tmp_path / "ran_ext-1.dist-info"
    notes.mkdir()
    (notes / "METADATA").write_text("Metadata-Version: 2.1\nName: ran_ext\nVersion: 1\n")
    (notes / "direct_url.json").write_text(origin)
    done = package("from ran_ext import _backend; print(_backend.rebuild_command())")
    assert done.stdout.strip().endswith(f"--no-cache-dir {target}")


@pytest.mark.parametrize("command", [["ran_ext", "info"], ["ran_ext.info"]])
def test_info_runs_as_a_command_without_a_warning(package, command):
    done = package(command)
    assert done.returncode == 0
    assert done.stderr == ""
    assert f"torch            {torch.__version__}" in done.stdout
    assert "cpu calls take   reference: not built" in done.stdout
    assert "to build         " in done.stdout


def test_info_is_a_function_and_stays_one(package):
    done = package("""
import ran_ext
ran_ext.info()
try:
    import ran_ext.info
except ImportError as error:
    print(error)
ran_ext.info()
""")
    assert done.returncode == 0
    assert done.stdout.count("ran_ext          1") == 2
    assert "ran_ext.info is a function: call ran_ext.info(), or run python -m ran_ext info" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: {info,tune,train,predict}; --help explains every flag"),
        (["inf"], "argument {info,tune,train,predict}: invalid choice: 'inf'"),
        (["info", "--brief"], "unrecognized arguments: --brief; --help explains every flag"),
    ],
)
def test_another_command_is_answered_in_one_line(package, arguments, message):
    done = package(["ran_ext", *arguments])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"python -m ran_ext: error: {message}")
    assert done.stderr.count("\n") == 1


def test_the_command_says_what_it_does(package):
    done = package(["ran_ext", "--help"])
    assert done.returncode == 0
    assert "print what was built, which kernels run" in done.stdout


def test_info_names_what_was_built(package):
    done = package(
        ["ran_ext", "info"], b"never opened", TORCH="2.9.1", CUDA="13.0", ARCHS=["8.0", "9.0"], COMPILER="c++ 12.2"
    )
    for text in ("built for torch  2.9.1\n", "compiler         c++ 12.2\n", "13.0, architectures 8.0 9.0\n"):
        assert text in done.stdout


@pytest.mark.parametrize(("name", "first"), [("reference", "reference"), ("auto", "auto"), ("", "auto")])
def test_the_environment_gives_the_first_choice(package, name, first):
    code = "from ran_ext import _backend as b; print(b.get_backend())"
    done = package(code, environment={"RAN_EXT_BACKEND": name})
    assert done.stdout.strip() == first


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fast", "ValueError: the environment variable RAN_EXT_BACKEND must be one of auto, native, reference, got 'f"),
        ("native", "RuntimeError: the environment variable RAN_EXT_BACKEND 'native' needs the compiled kernels: not b"),
    ],
)
def test_the_environment_is_named_where_it_cannot_be_met(package, name, text):
    done = package("import ran_ext", environment={"RAN_EXT_BACKEND": name})
    assert text in done.stderr.splitlines()[-1]


@native
def test_native_on_a_device_without_kernels_is_an_error():
    meta = torch.zeros(1, device="meta")
    with ran_ext.set_backend("auto"):
        assert not _backend.use_native(meta)
    with ran_ext.set_backend("native"), pytest.raises(RuntimeError, match="no kernels for device meta: there are none"):
        _backend.use_native(meta)


@native
def test_transforms_and_forward_mode_take_the_reference():
    seen = []

    def f(x):
        seen.append(_backend.use_native(x))
        return x.sum()

    with ran_ext.set_backend("auto"):
        f(torch.ones(2))
        torch.func.grad(f)(torch.ones(2))
        with torch.autograd.forward_ad.dual_level():
            f(torch.ones(2))
    assert seen == [True, False, False]


@native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_loaded():
    """Two would mean two thread pools, one of which torch.set_num_threads does not reach."""
    code = "import ran_ext._C; print(*{x.split()[-1] for x in open('/proc/self/maps') if 'gomp' in x or 'iomp' in x})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1
