"""Measured times of the paths that a pass can take: the user's file of them, the package's, and what the kernels hold.

A file is JSON. Under ``tuned`` it has a list of rows for each machine. A row: ``pass``; ``dtype``; ``threads``, on a
CPU; the sizes of ``x`` and ``weight`` (of a gate those of its convolution, of BN-ReLU ``x`` alone); ``stride`` (of a
gate its scale) and ``padding``; and ``us``, the microseconds that each path took.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import _backend
from ._errors import one_line
from ._files import remove_unfinished, require_regular, write_json
from ._lock import FolderInUseError, FolderLock

#: Of the files: another number means other rows.
FORMAT = 1
SHIPPED = Path(__file__).with_name("dispatch.json")
# As csrc/common/measured.h has them.
PASSES = (
    *("forward", "dgrad", "wgrad", "gate"),
    *("conv2d_forward", "conv2d_dgrad", "conv2d_wgrad", "bn_relu", "bn_relu_backward"),
)
PATHS = ("library", "product", "f2x2", "f4x4", "resident", "streaming")
DTYPES = ("float32", "float64", "bfloat16", "float16")
#: The CPU, among the indices of GPUs.
CPU = -1

#: Device, threads, pass, dtype; x's (n, h, w, channels), channels of the output, kernel, stride, padding.
Shape = tuple[int, int, str, str, tuple[int, ...]]
#: Microseconds by path.
Times = dict[str, float]

_lock = threading.RLock()
#: What was tuned, by device, once it is loaded.
_tuned: dict[int, dict[Shape, Times]] = {}
_said: set[str] = set()


def file() -> Path:
    """Where the user's measurements are kept: below ``$XDG_CACHE_HOME``, or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    return folder / "ran_ext" / "tuning.json"


def machine(device: int) -> str:
    """What measurements hold for: the processor with its kernels, or the GPU, and the versions."""
    from . import __version__

    if device == CPU:
        kernels = _backend._C.build_info()["cpu_kernels"] if _backend._C else "no kernels"
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
        name = f"{_processor()}, {kernels}{f', oneDNN held to {limit}' if limit else ''}"
    else:
        name = torch.cuda.get_device_name(device)
    return f"{name}; ran_ext {__version__}, torch {torch.__version__}"


def _processor() -> str:
    """Its name, and the number of its model: virtual machines give many the same name."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        name = fields.get("model name") or fields.get("CPU implementer")
        model = fields.get("model") or fields.get("CPU part")
        if name and model:
            return f"{name} model {model}"
    return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------------ rows of a file


def as_row(shape: Shape, times: Times) -> dict[str, Any]:
    """A measurement as a file has it.

    >>> shape = (CPU, 2, "wgrad", "float32", (8, 16, 16, 32, 64, 3, 3, 1, 1, 1, 1))
    >>> row = as_row(shape, {"library": 90.5, "f2x2": 61.0})
    >>> row["x"], row["weight"], row["us"]
    ([8, 32, 16, 16], [64, 32, 3, 3], {'library': 90.5, 'f2x2': 61.0})
    """
    device, threads, name, dtype, (n, h, w, c, c_out, *geometry) = shape
    row: dict[str, Any] = {"pass": name, "dtype": dtype} | ({"threads": threads} if device == CPU else {})
    row["x"] = [n, c, h, w]
    if not name.startswith("bn_relu"):
        row |= {"weight": [c_out, c, *geometry[:2]], "stride": geometry[2:4], "padding": geometry[4:]}
    return row | {"us": times}


def from_row(device: int, row: Any) -> tuple[Shape, Times]:
    """The measurement in a row of a file; ``ValueError`` where it is none.

    >>> from_row(0, {"pass": "bn_relu", "dtype": "bfloat16", "x": [8, 64, 16, 16], "us": {"resident": 5.5}})
    ((0, 0, 'bn_relu', 'bfloat16', (8, 16, 16, 64, 64, 0, 0, 0, 0, 0, 0)), {'resident': 5.5})
    """
    if not isinstance(row, dict) or row.get("pass") not in PASSES or row.get("dtype") not in DTYPES:
        raise ValueError(f"a row must have a pass and a dtype, got {_shown(row)}")
    alone = row["pass"].startswith("bn_relu")
    x, weight = _sizes(row, "x", 4), [] if alone else _sizes(row, "weight", 4)
    geometry = [0] * 6 if alone else [*weight[2:], *_sizes(row, "stride", 2), *_sizes(row, "padding", 2)]
    times = row.get("us")
    if not isinstance(times, dict) or not times.keys() <= set(PATHS) or not all(map(_is_time, times.values())):
        raise ValueError(f"us must be positive numbers by path, got {_shown(times)}")
    threads = _sizes({"threads": [row.get("threads")]}, "threads", 1)[0] if device == CPU else 0
    sizes = (x[0], x[2], x[3], x[1], x[1] if alone else weight[0], *geometry)
    return (device, threads, row["pass"], row["dtype"], sizes), {path: float(us) for path, us in times.items()}


def _sizes(row: dict[str, Any], name: str, count: int) -> list[int]:
    sizes = row.get(name)
    if isinstance(sizes, list) and len(sizes) == count and all(type(n) is int and 0 <= n < 2**31 for n in sizes):
        return sizes
    raise ValueError(f"{name} must be {count} whole numbers from 0 on, got {_shown(sizes)}")


def _is_time(us: Any) -> bool:
    return type(us) in (int, float) and math.isfinite(us) and us > 0


def _shown(value: Any) -> str:
    return one_line(ValueError(repr(value)), 80)


def read(path: Path) -> dict[str, list[Any]]:
    """The rows of a file by machine.

    Raises:
        OSError: it cannot be read. ``FileNotFoundError``: there is none.
        ValueError: it is not such a file, not a whole one, or of another format.
    """
    require_regular(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise ValueError(f"its format must be {FORMAT}, got {_shown(found)}")
    tuned = content.get("tuned")
    if not isinstance(tuned, dict) or not all(isinstance(rows, list) for rows in tuned.values()):
        raise ValueError(f"tuned must be lists of rows by machine, got {_shown(tuned)}")
    return tuned


# ----------------------------------------------------------------------------------------------- what the kernels hold


def load(device: int) -> None:
    """Hand a device's measurements to the kernels; they ask at their first choice on it."""
    with _lock:
        if device not in _tuned:
            _tuned[device] = _from_file(device)
        _hand_down(device)


def add(device: int, rows: Iterable[tuple[Shape, Times]]) -> None:
    """Use these measurements from now on, in this process."""
    with _lock:
        if device not in _tuned:
            _tuned[device] = _from_file(device)
        _tuned[device] |= dict(rows)
        _hand_down(device)


def in_use(device: int) -> int:
    """How many passes were tuned on a device with the threads that run now."""
    with _lock:
        rows = _tuned.get(device)
        rows = _from_file(device) if rows is None else rows
    return sum(shape[1] in (0, torch.get_num_threads()) for shape in rows)


def _hand_down(device: int) -> None:
    assert _backend._C is not None
    _backend._C.set_measured(device, list(_tuned[device].items()), _shipped(device))


def _shipped(device: int) -> list[tuple[Shape, Times]]:
    if device == CPU:
        return []
    major, minor = torch.cuda.get_device_capability(device)
    return [from_row(device, row) for row in read(SHIPPED).get(f"sm_{major}{minor}", [])]


def _from_file(device: int) -> dict[Shape, Times]:
    """What the user's file holds for this machine; a sentence where it holds nothing that can be used."""
    path, here = file(), machine(device)
    try:
        by_machine = read(path)
        if here in by_machine:
            return dict(from_row(device, row) for row in by_machine[here])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _say(f"{path} is not used, it cannot be read: {one_line(error)}; ran_ext.tune measures again and replaces it")
        return {}
    if device == CPU and by_machine:
        others = " | ".join(by_machine)
        _say(f"{path} is not used: it was tuned on {others}, and this is {here}; ran_ext.tune adds this machine")
    return {}


def _say(text: str) -> None:
    """Warn, once for each text."""
    if text not in _said:
        _said.add(text)
        warnings.warn(f"ran_ext: {text}", RuntimeWarning, stacklevel=2)


def save(device: int, rows: Iterable[tuple[Shape, Times]]) -> Path | None:
    """Add measurements to the user's file, beside those of other processes; None, and a sentence, where that fails."""
    path = file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            remove_unfinished(path.parent)
            by_machine: dict[str, list[Any]] = {}
            kept: dict[Shape, Times] = {}
            with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):  # what is damaged is replaced
                by_machine = read(path)
                kept = dict(from_row(device, row) for row in by_machine.get(machine(device), []))
            kept |= dict(rows)
            by_machine[machine(device)] = [as_row(*one) for one in sorted(kept.items(), key=str)]
            about = "What ran_ext.tune measured on each machine; docs/performance.md says how it is used."
            write_json(path, {"about": about, "format": FORMAT, "tuned": by_machine})
    except (OSError, FolderInUseError) as error:
        _say(f"{path} cannot be written: {one_line(error)}; what was tuned holds for this process")
        return None
    return path


@contextlib.contextmanager
def _alone(folder: Path, seconds: float = 30.0) -> Any:
    """The folder's lock; others hold it for a moment only."""
    lock, end = FolderLock(folder), time.monotonic() + seconds
    while True:
        try:
            lock.acquire()
            break
        except FolderInUseError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
    try:
        yield
    finally:
        lock.release()
