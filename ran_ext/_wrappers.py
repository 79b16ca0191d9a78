"""Takes wrappers (compile, DataParallel) off a model."""

from __future__ import annotations

import copy
import sys
from contextlib import AbstractContextManager, nullcontext

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
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):  # the name alone: dynamo imports slowly
            model = inner
        else:
            return model


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, including computed weights (pruned, normalised), which torch does not copy."""
    worked_out = (t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor))
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in worked_out if not t.is_leaf})


def eagerly() -> AbstractContextManager[None]:
    """Compiled modules run as written inside the block: their graphs skip hooks that were added later."""
    compiled = "torch._dynamo" in sys.modules  # nothing is compiled where it was never imported, and it imports slowly
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
