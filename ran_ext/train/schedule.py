"""The learning rate as a function of the step: nothing to store, nothing to restore."""

from __future__ import annotations

import math

from .config import Config


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """The learning rate of optimisation step ``step`` (from 0) of a run of ``config.epochs`` epochs.

    >>> [learning_rate(Config(), 100 * epoch, 100) for epoch in (0, 19, 20)]
    [0.001, 0.001, 0.0001]
    >>> cycle = Config(schedule="onecycle", lr=1.0, epochs=4, warmup=0.25)
    >>> [round(learning_rate(cycle, step, 4), 3) for step in (0, 3, 4, 10, 15)]
    [0.25, 1.0, 1.0, 0.5, 0.017]
    """
    if config.schedule == "constant":
        return config.base_lr
    if config.schedule == "step":
        # decimal exponents are exact, repeated products are not: 1e-3 * 0.1 is 0.00010000000000000002
        return float(
            f"{config.base_lr * config.lr_step_factor ** (step // steps_per_epoch // config.lr_step_epochs):.12g}"
        )
    steps = config.epochs * steps_per_epoch
    rise = round(config.warmup * steps) if config.schedule == "onecycle" else 0
    if step < rise:
        return config.base_lr * (step + 1) / rise
    return config.base_lr * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2
