"""Finds the compiled module once, keeps why it is missing or unfit, and says which backend a call takes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType, TracebackType
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from torch import Tensor

BACKENDS = ("auto", "native", "reference")
CONV3X3_MODES = ("fast", "strict", "library")


def _is_beside(name: str) -> bool:
    """Whether the module lies beside this file; an editable installation also finds it for a copy that lacks it."""
    return PathFinder.find_spec(f"ran_ext.{name}", [str(Path(__file__).parent)]) is not None


def built_for() -> ModuleType | None:
    """What setup.py noted of this installation: TORCH, CUDA, ARCHS, COMPILER, WHY_NO_NATIVE, WHY_NO_CUDA."""
    return importlib.import_module("ran_ext._built_for") if _is_beside("_built_for") else None


def rebuild_command() -> str:
    """The command that builds ran_ext again, from where it was installed, against the torch that runs now."""
    pip = f"{shlex.quote(sys.executable)} -m pip install --no-deps --force-reinstall --no-cache-dir "
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "csrc").is_dir():
        return f"{pip}-e {shlex.quote(str(checkout))}"
    try:
        origin = json.loads(importlib.metadata.distribution("ran_ext").read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        origin = {}
    if "vcs_info" in origin:
        kind, commit = origin["vcs_info"]["vcs"], origin["vcs_info"]["commit_id"]
        return pip + shlex.quote(f"{kind}+{origin['url']}@{commit}")
    folder = url2pathname(urlparse(origin.get("url", "")).path)
    return pip + (shlex.quote(folder) if "dir_info" in origin and Path(folder).is_dir() else "<folder of the sources>")


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _unfit(built: ModuleType | None) -> str:
    """Why a module built like this does not fit the torch that runs; "" where it fits."""
    if built is None or built.TORCH is None:
        return ""
    running, cuda = torch.__version__, torch.version.cuda
    if _minor(built.TORCH) != _minor(running):
        return f"built for torch {built.TORCH}, but torch {running} runs"
    if built.CUDA and (cuda is None or built.CUDA.split(".")[0] != cuda.split(".")[0]):
        return f"built for CUDA {built.CUDA}, but torch {running} runs, with CUDA {cuda or 'left out'}"
    return ""


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module and "", or None and the reason. Not built is quiet; built but unfit warns once."""
    built = built_for()
    if not _is_beside("_C"):
        return None, f"not built: {(built and built.WHY_NO_NATIVE) or 'this source folder has not been built'}"
    reason = _unfit(built)
    if not reason:
        try:
            return importlib.import_module("ran_ext._C"), ""
        except ImportError as error:
            reason = f"built, but does not load: {error}"
    warnings.warn(
        f"ran_ext: the compiled kernels are not used, plain PyTorch is: {reason}. To rebuild them: {rebuild_command()}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None, reason


_C: ModuleType | None
#: Why the native backend is missing: "" where it is loaded.
why_missing: str
_C, why_missing = _load()
#: What the choice between fused and library convolutions on a GPU rests on.
DISPATCH_FILE = Path(__file__).with_name("dispatch.json")


def dispatch_table() -> list[tuple[int, str, str, int, int, int, float, float]]:
    """The measurements of ``dispatch.json``: arch, dtype, pass, rows, c_in, c_out, fused_us, library_us."""
    keys = ("arch", "dtype", "pass", "rows", "c_in", "c_out", "fused_us", "library_us")
    rows = json.loads(DISPATCH_FILE.read_text())["measured"]
    return [tuple(row[key] for key in keys) for row in rows]


#: Whether the compiled module holds CUDA kernels, and why not; kept, since torch.compile cannot trace the question.
_cuda_built = _C is not None and _C.build_info()["cuda"] is not None
if _C is not None and _cuda_built:
    _C.set_dispatch_table(dispatch_table())
_why_no_cuda = getattr(built_for(), "WHY_NO_CUDA", "") or "built without CUDA"


class set_backend:
    """Choose the backend of every following call; as a context manager, of the calls inside it.

    Args:
        name: ``"auto"`` (native where it is built for the tensor's device, else reference), ``"native"`` (an error
            where it is missing) or ``"reference"`` (plain PyTorch). ``RAN_EXT_BACKEND`` gives the initial one.

    Raises:
        ValueError: ``name`` is none of these.
        RuntimeError: ``"native"`` was asked for and the compiled module is missing; the text says why.

    >>> with set_backend("reference"):
    ...     get_backend()
    'reference'
    """

    def __init__(self, name: str):
        global _choice
        if name not in BACKENDS:
            raise ValueError(f"set_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
        if name == "native" and _C is None:
            raise RuntimeError(
                f"set_backend: name 'native' needs the compiled kernels: {why_missing}; to build: {rebuild_command()}"
            )
        self._previous, _choice = _choice, name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _choice
        _choice = self._previous


def get_backend() -> str:
    """The backend chosen: ``"auto"``, ``"native"`` or ``"reference"``."""
    return _choice


def cuda_built() -> bool:
    """Whether the compiled module holds CUDA kernels."""
    return _cuda_built


def why_not_native(device_type: str) -> str:
    """Why no compiled kernels serve ``"cpu"`` or ``"cuda"``; "" where they do."""
    if _C is None:
        return why_missing
    if device_type == "cpu" or (device_type == "cuda" and _cuda_built):
        return ""
    return _why_no_cuda if device_type == "cuda" else f"there are none for {device_type}"


def use_native(x: Tensor) -> bool:
    """Whether an op on ``x`` takes the compiled kernels.

    Function transforms (``torch.func``) and forward-mode differentiation see the composed reference, which they can
    look into; the compiled ops are opaque to them.
    """
    if _choice == "reference" or _C is None:
        return False
    missing = why_not_native(x.device.type)
    if missing and _choice == "native":
        raise RuntimeError(
            f"ran_ext: the native backend was chosen, but has no kernels for device {x.device}: {missing}; choose "
            f"set_backend('auto'), or build them: {rebuild_command()}"
        )
    if missing:
        return False
    if torch.compiler.is_compiling():
        return True
    in_transform = torch._C._functorch.peek_interpreter_stack() is not None
    return not in_transform and torch.autograd.forward_ad._current_level < 0


class set_conv3x3:
    """Choose how accurate, and how fast, 3x3 convolutions in float32 are on the CPU; as a context manager, inside it.

    It concerns stride 1 and padding 1 on channels_last tensors. Error below is the root of the mean square against
    float64, on dense inputs; ``explain`` prints what each pass of a layer takes.

    Args:
        mode: ``"fast"`` (the default: Winograd's F(4x4, 3x3) or F(2x2, 3x3), whichever is fastest at no more than twice
            PyTorch's own error), ``"strict"`` (F(2x2, 3x3) at most, at no more than 1.2 times) or ``"library"``
            (PyTorch's convolution).

    Raises:
        ValueError: ``mode`` is none of these.

    Source: Lavin and Gray 2016, arXiv:1509.09308.

    >>> with set_conv3x3("strict"):
    ...     get_conv3x3()
    'strict'
    """

    def __init__(self, mode: str):
        if mode not in CONV3X3_MODES:
            raise ValueError(f"set_conv3x3: mode must be one of {', '.join(CONV3X3_MODES)}, got {mode!r}")
        self._previous = _conv3x3
        _keep_conv3x3(mode)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _keep_conv3x3(self._previous)


def get_conv3x3() -> str:
    """The mode of 3x3 convolutions chosen: ``"fast"``, ``"strict"`` or ``"library"``."""
    return _conv3x3


def _keep_conv3x3(mode: str) -> None:
    global _conv3x3
    _conv3x3 = mode
    if _C is not None:
        _C.set_conv3x3(mode)


_conv3x3 = "fast"
_choice = "auto"
set_backend(os.environ.get("RAN_EXT_BACKEND", "auto"))
