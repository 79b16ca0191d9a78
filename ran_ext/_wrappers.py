"""Takes wrappers (compile, DataParallel) off a model, and looks at one without leaving a trace."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``, at any depth.

    >>> inner = nn.Linear(1, 1)
    >>> unwrapped(nn.DataParallel(inner)) is inner
    True
    """
    while True:
        if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            model = model.module
        elif is_compiled(model) and isinstance(inner := model._modules["_orig_mod"], nn.Module):
            model = inner
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` made ``model``."""
    return "_orig_mod" in model._modules  # the name alone: dynamo imports slowly


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, including computed weights (pruned, normalised), which torch does not copy."""
    worked_out = (t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor))
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in worked_out if not t.is_leaf})


def eagerly() -> AbstractContextManager[None]:
    """Compiled modules run as written inside the block: their graphs skip hooks that were added later."""
    compiled = "torch._dynamo" in sys.modules  # nothing is compiled where it was never imported, and it imports slowly
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


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
