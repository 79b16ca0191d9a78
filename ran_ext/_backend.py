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
from types import ModuleType
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from torch import Tensor

from ._choice import Choose, Setting
from ._tracing import why_watched

BACKENDS = ("auto", "native", "reference")


def _is_beside(name: str) -> bool:
    """Whether the module lies beside this file; an editable installation also finds it for a copy that lacks it."""
    return PathFinder.find_spec(f"ran_ext.{name}", [str(Path(__file__).parent)]) is not None


def built_for() -> ModuleType | None:
    """What setup.py recorded about this installation: TORCH, CUDA, ARCHS, COMPILER, WHY_NO_NATIVE, WHY_NO_CUDA."""
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


def _other_copy() -> str:
    """Why the ops cannot be registered: a copy of this package has done so, and a second time would end the process."""
    file = PathFinder.find_spec("ran_ext._C", [str(Path(__file__).parent)]).origin  # type: ignore[union-attr]
    if file in torch.ops.loaded_libraries or not hasattr(torch.ops.ran_ext, "bn_relu_conv2d"):
        return ""
    return "another copy of ran_ext was imported in this process before"


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module and "", or None and the reason. Not built is quiet; built but unfit warns once."""
    built = built_for()
    if not _is_beside("_C"):
        return None, f"not built: {(built and built.WHY_NO_NATIVE) or 'this source folder has not been built'}"
    reason, other = _unfit(built), _other_copy()
    if not reason and not other:
        try:
            module = importlib.import_module("ran_ext._C")
            torch.ops.loaded_libraries.add(module.__file__)
            return module, ""
        except ImportError as error:
            reason = f"built, but does not load: {error}"
    cure = _cure() if reason else "Start Python anew to take this copy's"
    warnings.warn(
        f"ran_ext: the compiled kernels are not used, plain PyTorch is: {reason or other}. {cure}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None, reason or other


def _cure() -> str:
    """What makes the kernels fit the torch that runs: a wheel's user takes another, whoever built them builds again."""
    try:
        of_wheel = "+torch" in importlib.metadata.version("ran_ext")
    except importlib.metadata.PackageNotFoundError:
        of_wheel = False
    if of_wheel:
        return f"Install the wheel whose name holds +torch{_minor(torch.__version__)}, or the sources"
    return f"To rebuild them: {rebuild_command()}"


_C: ModuleType | None
#: Why the native backend is missing: "" where it is loaded.
why_missing: str
_C, why_missing = _load()

#: Whether the compiled module holds CUDA kernels, and why not; kept, since torch.compile cannot trace the question.
_cuda_built = _C is not None and _C.build_info()["cuda"] is not None
_why_no_cuda = getattr(built_for(), "WHY_NO_CUDA", "") or "built without CUDA"


_backend = Setting("backend", "auto")


class set_backend(Choose):
    """Choose the backend of every following call of the process; as a context manager, of the calls inside it.

    A block holds in its own thread (or asyncio task) and in the backward passes called from it; threads that are
    started inside take the process's choice. A call inside a block holds until the block ends.

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

    setting = _backend

    def __init__(self, name: str):
        _require("set_backend: name", name)
        super().__init__(name)


def _require(asked: str, name: str) -> None:
    """Raise what :class:`set_backend` documents; ``asked`` says who gave the name."""
    if name not in BACKENDS:
        raise ValueError(f"{asked} must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "native" and _C is None:
        raise RuntimeError(f"{asked} 'native' needs the compiled kernels: {why_missing}; to build: {rebuild_command()}")


def get_backend() -> str:
    """The backend chosen here: ``"auto"``, ``"native"`` or ``"reference"``."""
    return _backend.chosen()


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


def why_plain(device_type: str) -> str:
    """Why tensors there are served by plain PyTorch; "" where they are not. For people: :func:`use_native` decides."""
    if get_backend() == "reference":
        return "the reference backend was chosen: ran_ext.set_backend('auto') takes the kernels"
    return why_not_native(device_type)


def use_native(x: Tensor, *others: Tensor | None) -> bool:
    """Whether an op on ``x`` and ``others`` takes the compiled kernels: the one place that decides.

    Tracers, exporters, transforms, modes and tensor subclasses get plain ops, whatever was chosen: see
    :func:`ran_ext._tracing.why_watched`. Devices without kernels run as plain PyTorch under ``"auto"``.

    Raises:
        RuntimeError: ``"native"`` was chosen, and has no kernels for ``x``'s device.
    """
    if _C is None or (name := _backend.chosen()) == "reference" or why_watched(x, *others):
        return False
    missing = "" if x.is_cpu else why_not_native(x.device.type)  # a device's name takes long to ask for
    if missing and name == "native":
        raise RuntimeError(
            f"ran_ext: the native backend was chosen, but has no kernels for device {x.device}: {missing}; choose "
            f"set_backend('auto'), or build them: {rebuild_command()}"
        )
    return not missing


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for ``x``'s device; torch raises an error for a device without autocast, such as meta."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


_initial = os.environ.get("RAN_EXT_BACKEND") or "auto"
_require("the environment variable RAN_EXT_BACKEND", _initial)
set_backend(_initial)
