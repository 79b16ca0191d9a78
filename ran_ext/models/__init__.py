"""The networks and their registry: ``create_model("ran_compact")``."""

from __future__ import annotations

import inspect
from typing import Any

from .cifar import ResidualAttentionNetwork, ran_base, ran_compact, ran_paper
from .pretrained import ModelCard, list_pretrained, load_pretrained, model_card

_REGISTRY = {build.__name__: build for build in (ran_compact, ran_base, ran_paper)}


def list_models() -> list[str]:
    """The names that :func:`create_model` takes.

    >>> list_models()
    ['ran_base', 'ran_compact', 'ran_paper']
    """
    return sorted(_REGISTRY)


def create_model(name: str, *, pretrained: bool = False, **options: Any) -> ResidualAttentionNetwork:
    """Build a network by name; ``options`` go to its builder.

    Args:
        name: one of :func:`list_models`.
        pretrained: load the trained weights that come with the package, of those in :func:`list_pretrained`;
            :func:`model_card` says what they were trained on, how well they do, and what images they take.
        options: of the builder.

    Raises:
        ValueError: there is no such network, it has no trained weights, or they do not fit the options.

    >>> create_model("ran_compact", num_classes=100).fc.out_features
    100
    >>> import torch
    >>> create_model("ran_compact", pretrained=True).eval()(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    if name not in _REGISTRY:
        raise ValueError(f"create_model: no model named {name!r}; there are {', '.join(list_models())}")
    if pretrained:
        model_card(name)  # before the network is made
    model = _REGISTRY[name](**options)
    if pretrained:
        load_pretrained(model, name)
    return model


def model_options(name: str) -> dict[str, Any]:
    """The options of a network's builder, with their defaults.

    Raises:
        ValueError: there is no such network.

    >>> model_options("ran_compact")["num_classes"]
    10
    """
    if name not in _REGISTRY:
        raise ValueError(f"model_options: no model named {name!r}; there are {', '.join(list_models())}")
    return {option.name: option.default for option in inspect.signature(_REGISTRY[name]).parameters.values()}


__all__ = [
    "ModelCard",
    "ResidualAttentionNetwork",
    "create_model",
    "list_models",
    "list_pretrained",
    "model_card",
    "model_options",
    "ran_base",
    "ran_compact",
    "ran_paper",
]
