"""The networks and their registry: ``create_model("ran_compact")``."""

from __future__ import annotations

from typing import Any

from .cifar import ResidualAttentionNetwork, ran_base, ran_compact, ran_paper

_REGISTRY = {build.__name__: build for build in (ran_compact, ran_base, ran_paper)}


def list_models() -> list[str]:
    """The names that :func:`create_model` takes.

    >>> list_models()
    ['ran_base', 'ran_compact', 'ran_paper']
    """
    return sorted(_REGISTRY)


def create_model(name: str, **options: Any) -> ResidualAttentionNetwork:
    """Build a network by name; ``options`` go to its builder.

    Raises:
        ValueError: there is no such network; the text lists those there are.

    >>> create_model("ran_compact", num_classes=100).fc.out_features
    100
    """
    if name not in _REGISTRY:
        raise ValueError(f"create_model: no model named {name!r}; there are {', '.join(list_models())}")
    return _REGISTRY[name](**options)


__all__ = ["ResidualAttentionNetwork", "create_model", "list_models", "ran_base", "ran_compact", "ran_paper"]
