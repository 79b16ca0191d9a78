"""Training and evaluation mode, each module's own: what the user has frozen stays frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode while entered; afterwards each of its modules is in the mode it was in.

    >>> model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout())
    >>> _ = model[0].eval()
    >>> with evaluating(model):
    ...     [module.training for module in model.modules()]
    [False, False, False]
    >>> [module.training for module in model.modules()]
    [True, False, True]
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])  # not the flags alone: some modules do more in train()
        for module, mode in modes:
            module.training = mode


def frozen(model: nn.Module) -> list[nn.Module]:
    """The modules in evaluation mode of a model in training mode; none where the whole model is in evaluation mode."""
    return [module for module in model.modules() if not module.training] if model.training else []


def train_all_but(frozen: list[nn.Module], model: nn.Module) -> None:
    """Put ``model`` into training mode, without ``frozen``."""
    model.train()
    for module in frozen:
        module.training = False
