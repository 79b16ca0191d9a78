"""The dtype of a run: which one ``auto`` stands for, and a word about one that is slow on this machine."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import torch

from .. import ops
from .._hardware import multiplies_bfloat16
from .checkpoint import load_config
from .config import Config
from .distributed import Ranks


def resolve_dtype(config: Config, ranks: Ranks, last: Path | None = None) -> Config:
    """``config`` with a dtype in the place of ``auto``: bfloat16 where the device multiplies it, else float32.

    Args:
        config: of the run.
        ranks: its processes, which must all call this; one without bfloat16 decides for all.
        last: a checkpoint that the run goes on from, if it is there: its dtype is kept.

    Raises:
        CheckpointError: ``last`` cannot be read.
        ValueError: the device cannot train in the dtype asked for.

    >>> resolve_dtype(Config(dtype="auto"), Ranks(0, 1, torch.device("cpu"))).dtype in ("bfloat16", "float32")
    True
    """
    if config.dtype == "float16" and ranks.device.type != "cuda":
        raise ValueError(f"fit: dtype float16 needs CUDA, got device {ranks.device}; choose auto")
    if config.dtype != "auto":
        return config
    if last is not None and os.path.lexists(last):
        dtype = load_config(last).dtype
    else:
        dtype = "float32" if ranks.any(not multiplies_bfloat16(ranks.device)) else "bfloat16"
    return dataclasses.replace(config, dtype=dtype)


def slow_dtype(dtype: str, device: torch.device) -> str:
    """A sentence for the user where ``dtype`` is slow on ``device``; "" elsewhere. Measures for up to a second."""
    if dtype != "bfloat16" or multiplies_bfloat16(device):
        return ""
    ratio = conv_seconds(torch.bfloat16, device) / conv_seconds(torch.float32, device)
    if ratio < 1.2:  # by this package's kernels, which multiply in float
        return ""
    return (
        f"dtype bfloat16 is emulated on this {device.type}: a 3x3 convolution of 128 channels, forward and backward, "
        f"takes {ratio:.1f} times as long as in float32 (measured just now); a new run with --dtype auto is faster"
    )


def conv_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a convolution, forward and backward: the shortest of three after one that is not counted."""
    x = torch.ones(8, 128, 8, 8, dtype=dtype, device=device).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.ones(128, 128, 3, 3, dtype=dtype, device=device, requires_grad=True)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        out = ops.conv2d(x, weight, padding=1)
        gradients = torch.autograd.grad(out, (x, weight), torch.ones_like(out))
        for gradient in gradients:
            gradient.flatten()[0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
