"""How much memory there is, asked before a network is made that would not fit: the system would kill the process."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def require_memory(parameters: int, copies: int, device: torch.device) -> None:
    """Check that ``copies`` of so many float32 parameters fit into the memory of ``device``.

    Args:
        parameters: of the network.
        copies: 1 for the network; training adds gradients, the optimizer's state, an average.
        device: a CPU, or a GPU that torch can ask.

    Raises:
        ValueError: they do not; the text says how many parameters there are.

    >>> require_memory(10**15, 1, torch.device("cpu"))
    Traceback (most recent call last):
        ...
    ValueError: the network has 1,000,000,000,000,000 parameters, which take 4,000,000 GB, but cpu has ... GB; ...
    """
    needed, there = 4 * copies * parameters, _memory(device)
    if there is not None and needed > there:
        raise ValueError(
            f"the network has {parameters:,} parameters, which take {needed / 1e9:,.0f} GB, but {device} has "
            f"{there / 1e9:,.0f} GB; choose a smaller width"
        )


def _memory(device: torch.device) -> int | None:
    """Bytes, in use or not; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()  # of a container
    except OSError:
        limit = "max"
    return there if limit == "max" else min(there, int(limit))
