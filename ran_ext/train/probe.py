"""How fast a recipe trains here, by a few of its own steps; the run that follows is the same bit for bit without it."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import torch

from ..data import CIFAR10
from .config import Config
from .distributed import Ranks
from .errors import out_of_memory_explained
from .folder import run_folder
from .run import Run
from .scales import choose_scale, run_seconds

#: A first step of so many seconds is measured enough: what it does but once is little beside it.
LONG_STEP = 5.0


def images_per_second(config: Config, train_set: CIFAR10, ranks: Ranks, seconds: float = 3.0) -> float:
    """Images a second of the training step, from augmentation to optimizer, all processes together.

    A network of its own takes the steps, and torch's random generators are put back. The first step, which chooses
    kernels and gets memory, is not counted.

    Args:
        config: with a dtype of its own, not ``auto``.
        train_set: holds at least one batch.
        ranks: the processes, which must all call this; each takes its share of the batch, eager and without exchange.
        seconds: to measure for; at least two steps are taken, unless the first takes ``LONG_STEP``.
    """
    alone = Ranks(0, 1, ranks.device)
    share = config.batch_size // ranks.world_size
    devices = [ranks.device] if ranks.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        tempfile.TemporaryDirectory() as folder,
        out_of_memory_explained(ranks.device, config.batch_size),
        run_folder(Path(folder), alone) as lock,
    ):
        mine = dataclasses.replace(config, batch_size=share)
        run = Run(
            mine.create_model(),
            train_set,
            None,
            mine,
            Path(folder),
            alone,
            lock,
            callbacks=(),
            augment=None,
            checkpoint_every=1,
            asked_dtype=mine.dtype,
        )
        run.prepare("eager", None, quiet=True)
        rate = share / _step_seconds(run, seconds)
    return float(ranks.sum(torch.tensor(rate, dtype=torch.float64, device=ranks.device)))


def fitting_scale(
    config: Config, train_set: CIFAR10, val_set: CIFAR10 | None, ranks: Ranks
) -> tuple[str, dict[str, float]]:
    """:func:`ran_ext.train.scales.choose_scale` by the speed measured here, once for each width looked at."""
    rates: dict[float, float] = {}

    def seconds(candidate: Config) -> float:
        width = candidate.model_options.get("width", 1.0)
        if width not in rates:
            rates[width] = images_per_second(candidate, train_set, ranks)
        return run_seconds(candidate, len(train_set), len(val_set or ()), rates[width])

    return choose_scale(config, seconds)


def _step_seconds(run: Run, seconds: float) -> float:
    run.state.model.train()
    times: list[float] = []
    for indices, draws in run.batches.plan():
        start = time.perf_counter()
        run.step(indices, draws)[0].item()  # waits for the device
        times.append(time.perf_counter() - start)
        if times[0] > LONG_STEP:
            return times[0]
        if len(times) > 2 and sum(times[1:]) > seconds:
            break
    counted = times[1:] or times
    return sum(counted) / len(counted)
