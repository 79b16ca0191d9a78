"""What was built, what runs, and how to build what is missing."""

from __future__ import annotations

import platform
import sys

import torch

from . import _backend, _measured
from ._hardware import multiplies_bfloat16
from ._paths import get_conv3x3


def _built() -> list[tuple[str, str]]:
    built = _backend.built_for()
    if built is None:
        return [("built", "nothing: this is a source folder that has not been built")]
    if built.TORCH is None:
        return [("built", f"pure Python: {built.WHY_NO_NATIVE}")]
    rows = [("built for torch", built.TORCH), ("compiler", built.COMPILER)]
    if built.CUDA is None:
        return [*rows, ("built for CUDA", f"no: {built.WHY_NO_CUDA}")]
    return [*rows, ("built for CUDA", f"{built.CUDA}, architectures {' '.join(built.ARCHS)}")]


def _running() -> list[tuple[str, str]]:
    cuda = torch.version.cuda or "none"
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    rows = [
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("torch", f"{torch.__version__}, CUDA {cuda}"),
        ("CPU", cpu),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((f"GPU {index}", f"{properties.name}, sm_{properties.major}{properties.minor}"))
    if not torch.cuda.device_count():
        rows.append(("GPU", "none"))
    return [*rows, ("bfloat16", "; ".join(_bfloat16(device) for device in ("cpu", *_gpus())))]


def _gpus() -> list[str]:
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def _bfloat16(device: str) -> str:
    if multiplies_bfloat16(device):
        return f"{device}: in hardware"
    return f"{device}: emulated, slower than float32"


def _taken(device: str) -> tuple[str, str]:
    """Which backend a call on ``device`` takes; and why, where it is not the native one."""
    missing = _backend.why_not_native(device)
    if _backend.get_backend() == "reference":
        return f"{device} calls take", "reference (chosen by set_backend or RAN_EXT_BACKEND)"
    if not missing:
        kernels = f" ({_backend._C.build_info()['cpu_kernels']} kernels)" if device == "cpu" and _backend._C else ""
        return f"{device} calls take", f"native{kernels}"
    return f"{device} calls take", f"{'an error' if _backend.get_backend() == 'native' else 'reference'}: {missing}"


def _tuned() -> str:
    """The file of measurements, and how many passes of it hold here."""
    devices = [("cpu", _measured.CPU), *((f"cuda:{i}", i) for i in range(torch.cuda.device_count()))]
    counts = ", ".join(f"{name} {count}" for name, device in devices if (count := _measured.in_use(device)))
    if not counts:
        return "nothing here: python -m ran_ext tune measures what is fastest"
    return f"passes at their shapes: {counts} ({_measured.file()})"


def versions() -> str:
    """Of ran_ext and torch, in one line."""
    return f"ran_ext {_version()}, torch {torch.__version__}"


def _version() -> str:
    from . import __version__

    return __version__


def report() -> str:
    """The text that :func:`info` prints."""
    rows = [("ran_ext", _version()), *_built(), *_running(), ("backend", _backend.get_backend())]
    rows.append(("3x3 on the CPU", f"{get_conv3x3()} (set_conv3x3)"))
    if _backend._C is not None:
        rows.append(("tuned", _tuned()))
    devices = ["cpu", *(["cuda"] if torch.version.cuda else [])]
    rows += [_taken(device) for device in devices]
    if any(_backend.why_not_native(device) for device in devices):
        rows.append(("to build", _backend.rebuild_command()))
    return "\n".join(f"{name:<16} {text}" for name, text in rows)


def info() -> None:
    """Print the version, what was built, what runs, which backend a call takes, and how to build what is missing.

    >>> info()  # doctest: +ELLIPSIS
    ran_ext          ...
    """
    print(report())
