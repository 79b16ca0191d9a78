"""What a figure must be read together with: versions, hardware, backend."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from .. import _backend
from .distributed import Ranks


def environment(ranks: Ranks) -> dict[str, Any]:
    """Versions, hardware and backend of this run, fit for JSON.

    >>> sorted(environment(Ranks(0, 1, torch.device("cpu"))))[:4]
    ['backend', 'cpu', 'cpu_capability', 'cuda']
    """
    from .. import __version__

    on_cuda = ranks.device.type == "cuda"
    missing = _backend.why_not_native(ranks.device.type)
    chosen = _backend.get_backend()
    return {
        "ran_ext": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(ranks.device) if on_cuda else ranks.device.type,
        "processes": ranks.world_size,
        "backend": "reference" if missing or chosen == "reference" else "native",
        "why_not_native": missing if chosen != "reference" else "the reference backend was chosen",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
