"""Trained weights that come with the package: float16 safetensors, read offline, checked against their model card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

FOLDER = Path(__file__).with_name("weights")


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What is to be known of trained weights; ``<name>.json`` beside them.

    Attributes:
        name: of the network, as :func:`ran_ext.models.create_model` takes it.
        data: images that it was trained on.
        recipe: in a sentence; ``config`` has every setting.
        config: of :class:`ran_ext.train.Config`.
        accuracy: on ``test_images``, of the weights as they are shipped, in float32.
        accuracy_mirrored: the same, logits of each image and of its mirror image averaged.
        test_images: how many, of which data.
        runs: how many trainings the figures are of.
        mean, std: of a channel's pixels in 0..1: what the network takes is ``(image / 255 - mean) / std``.
        classes: names, in the order of the logits.
        trained_on: processor or GPU, and versions.
        licence: of the weights.
        sha256: of the file of weights.
    """

    name: str
    data: str
    recipe: str
    config: dict[str, Any]
    accuracy: float
    accuracy_mirrored: float
    test_images: str
    runs: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    trained_on: str
    licence: str
    sha256: str


def list_pretrained() -> list[str]:
    """Networks that have weights here.

    >>> list_pretrained()
    ['ran_compact']
    """
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def model_card(name: str) -> ModelCard:
    """What is to be known of a network's trained weights.

    Raises:
        ValueError: there are none; the text lists those there are.

    >>> card = model_card("ran_compact")
    >>> card.data, card.accuracy > 0.85
    ('CIFAR-10, 50,000 training images', True)
    """
    if name not in list_pretrained():
        there = ", ".join(list_pretrained()) or "none"
        raise ValueError(f"model_card: no trained weights of {name!r} come with the package; there are {there}")
    values = json.loads((FOLDER / f"{name}.json").read_text())
    sequences = {key: tuple(values[key]) for key in ("mean", "std", "classes")}
    return ModelCard(**{**values, **sequences})


def load_pretrained(model: nn.Module, name: str) -> None:
    """Load the trained weights of ``name`` into ``model``, whose shapes must be theirs.

    Raises:
        ValueError: there are none, or ``model`` has other shapes; it is unchanged then.
        RuntimeError: the file is damaged.
    """
    card, path = model_card(name), FOLDER / f"{name}.safetensors"
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != card.sha256:
        sums = f"sha256 {found[:12]}, expected {card.sha256[:12]}"
        raise RuntimeError(f"{path} is damaged ({sums}): install ran_ext again")
    from safetensors.torch import load_file  # when it is needed: the ops need none of it

    weights = load_file(path)
    there = model.state_dict()
    unlike = [key for key in there.keys() | weights.keys() if _shape(there, key) != _shape(weights, key)]
    if unlike:
        key = min(unlike)
        raise ValueError(
            f"create_model: the trained weights of {name} fit its default options alone: {key} is "
            f"{_shape(there, key)} here and {_shape(weights, key)} there; for other classes make it with "
            "pretrained=True and replace model.fc"
        )
    model.load_state_dict(weights)


def _shape(state: dict[str, torch.Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None
