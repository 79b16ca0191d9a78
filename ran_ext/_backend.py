"""Finds the compiled module once, keeps why it is missing or unfit, and says which backend a call takes."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from types import ModuleType, TracebackType

import torch
from torch import Tensor

BACKENDS = ("auto", "native", "reference")

_C: ModuleType | None = None
#: Why the native backend is missing: "" where it is loaded.
why_missing = ""


def rebuild_command() -> str:
    """The command that builds ran_ext against the torch that runs now."""
    return f"{sys.executable} -m pip install --no-build-isolation --force-reinstall --no-deps ran_ext"


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module and "", or None and the reason. Not built is quiet; built but unfit warns once."""
    if importlib.util.find_spec("ran_ext._C") is None:
        return (
            None,
            "not built (pure-Python install); to compile the kernels: pip install ./ran_ext, with a C++ compiler",
        )
    try:
        from ran_ext import _built_for as built  # written by setup.py beside _C
    except ImportError:
        built = None
    running, cuda = torch.__version__, torch.version.cuda
    reason = ""
    if built is not None and _minor(built.TORCH) != _minor(running):
        reason = f"built for torch {built.TORCH}, but torch {running} runs"
    elif built is not None and built.CUDA and cuda is None:
        reason = f"built for torch {built.TORCH} with CUDA {built.CUDA}, but this torch ({running}) has no CUDA"
    else:
        try:
            from ran_ext import _C as module  # type: ignore[attr-defined]

            return module, ""
        except ImportError as error:
            reason = f"built, but does not load: {error}"
    warnings.warn(
        f"ran_ext: the compiled kernels are not used, plain PyTorch is: {reason}. To rebuild them, in the source "
        f"folder: {rebuild_command().replace(' ran_ext', ' .')}",
        RuntimeWarning,
        stacklevel=3,
    )
    return None, reason


_C, why_missing = _load()


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
            raise RuntimeError(f"set_backend: the native backend is missing: {why_missing}")
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
    return _C is not None and bool(_C.build_info()["cuda"])


def use_native(x: Tensor) -> bool:
    """Whether an op on ``x`` takes the compiled kernels.

    Function transforms (``torch.func``) and forward-mode differentiation see the composed reference, which they can
    look into; the compiled ops are opaque to them.
    """
    if _choice == "reference" or _C is None:
        return False
    if not (x.device.type == "cpu" or (x.device.type == "cuda" and cuda_built())):
        if _choice == "native":
            raise RuntimeError(
                f"ran_ext: RAN_EXT_BACKEND=native, but no kernels are built for device {x.device}; build with a CUDA "
                "torch and nvcc, or choose set_backend('auto')"
            )
        return False
    if torch.compiler.is_compiling():
        return True
    in_transform = torch._C._functorch.peek_interpreter_stack() is not None
    return not in_transform and torch.autograd.forward_ad._current_level < 0


_choice = "auto"
set_backend(os.environ.get("RAN_EXT_BACKEND", "auto"))
