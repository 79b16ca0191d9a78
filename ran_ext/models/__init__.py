"""The networks and their registry: ``create_model("ran_compact")``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .attention import (
    AttentionNetwork,
    InceptionUnit,
    attention56,
    attention92,
    attention92_cifar,
    attention128,
    attention164,
    attention236_cifar,
    attention452_cifar,
)
from .backbones import (
    BackboneNetwork,
    InvertedResidual,
    alexnet_attention,
    mobilenet_v2_attention,
    vgg16_attention,
)
from .cifar import ResidualAttentionNetwork, ran_base, ran_compact, ran_paper
from .classifier import ImageClassifier
from .pretrained import ModelCard, list_pretrained, load_pretrained, model_card
from .public import ProjectedUnit, PublicAttentionModule, PublicAttentionNetwork, load_public
from .sequences import AttentionLSTM, TimeMask

_BUILDERS: tuple[Callable[..., ImageClassifier], ...] = (
    ran_compact,
    ran_base,
    ran_paper,
    attention56,
    attention92,
    attention128,
    attention164,
    attention92_cifar,
    attention236_cifar,
    attention452_cifar,
    vgg16_attention,
    alexnet_attention,
    mobilenet_v2_attention,
)
_REGISTRY = {build.__name__: build for build in _BUILDERS}


def list_models() -> list[str]:
    """The names that :func:`create_model` takes.

    >>> [name for name in list_models() if name.startswith("ran_")]
    ['ran_base', 'ran_compact', 'ran_paper']
    """
    return sorted(_REGISTRY)


def create_model(name: str, *, pretrained: bool = False, **options: Any) -> ImageClassifier:
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
    "AttentionLSTM",
    "AttentionNetwork",
    "BackboneNetwork",
    "ImageClassifier",
    "InceptionUnit",
    "InvertedResidual",
    "ModelCard",
    "ProjectedUnit",
    "PublicAttentionModule",
    "PublicAttentionNetwork",
    "ResidualAttentionNetwork",
    "TimeMask",
    "alexnet_attention",
    "attention56",
    "attention92",
    "attention92_cifar",
    "attention128",
    "attention164",
    "attention236_cifar",
    "attention452_cifar",
    "create_model",
    "list_models",
    "list_pretrained",
    "load_public",
    "mobilenet_v2_attention",
    "model_card",
    "model_options",
    "ran_base",
    "ran_compact",
    "ran_paper",
    "vgg16_attention",
]
