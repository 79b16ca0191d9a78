"""The kinds of training step, and which of them runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .distributed import Ranks

#: ``auto`` picks one of the others; ``graph`` is one CUDA graph, ``compile`` the network through ``torch.compile``.
STEPS = ("auto", "eager", "graph", "compile")


def choose_step(asked: str, ranks: Ranks) -> tuple[str, str]:
    """The kind of step that runs and, where it is not the one asked for, why.

    Raises:
        ValueError: ``asked`` is none of ``STEPS``.

    >>> choose_step("auto", Ranks(0, 1, torch.device("cpu")))
    ('eager', '')
    >>> choose_step("graph", Ranks(0, 2, torch.device("cpu")))
    ('eager', 'the 2 processes exchange statistics and gradients within the step')
    """
    if asked not in STEPS:
        raise ValueError(f"fit: step must be one of {', '.join(STEPS)}, got {asked!r}")
    if asked == "auto":
        return "graph" if ranks.world_size == 1 and ranks.device.type == "cuda" else "eager", ""
    if asked != "eager" and ranks.world_size > 1:
        return "eager", f"the {ranks.world_size} processes exchange statistics and gradients within the step"
    return asked, ""


class CompiledModel:
    """``torch.compile(model)``, or ``model`` itself where it cannot be compiled.

    ``fullgraph``, so that what cannot be compiled is found before anything has run.

    Args:
        model: called on the images.
        on_fallback: told why the model runs eagerly.
    """

    def __init__(self, model: nn.Module, on_fallback: Callable[[str], None]):
        self.model, self.on_fallback = model, on_fallback
        self.call: Callable[[Tensor], Tensor] = torch.compile(model, fullgraph=True)

    def __call__(self, images: Tensor) -> Tensor:
        from torch._dynamo.exc import TorchDynamoException  # seconds to import

        try:
            return self.call(images)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            self.on_fallback(f"torch.compile failed: {type(cause).__name__}: {str(cause).strip().splitlines()[0]}")
            self.call = self.model
            return self.call(images)
