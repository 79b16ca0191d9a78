"""A run of a tiny network, in milliseconds, for the tests that do it a hundred times."""

import functools

import torch
from torch import nn

from ran_ext.data import CIFAR10
from ran_ext.train import Config, fit

#: Everything that has a state: momentum, average, dropout, running statistics.
CONFIG = Config(dropout=0.3, batch_size=8, epochs=2, patience=0, ema=0.9, weight_decay_scope="all", dtype="float32")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(256, 10)
    )


@functools.cache
def images(count: int = 40) -> CIFAR10:
    return CIFAR10.sample("train").subset(torch.arange(count))


def train(out, model=None, config=CONFIG, quiet=True, **options):
    return fit(model or network(), images(), images(20), config, out, quiet=quiet, **options)
