"""The batches that a configuration asks for."""

from __future__ import annotations

import torch

from ..data import CIFAR10, Augment, Batches, Normalize
from .config import Config
from .distributed import Ranks


def build_normalize(train_set: CIFAR10, config: Config) -> Normalize:
    """``config.normalize``, from the training images' own statistics."""
    build = {"per_pixel": Normalize.per_pixel, "per_channel": Normalize.per_channel}[config.normalize]
    return build(train_set, torch.channels_last if config.channels_last else torch.contiguous_format)


def build_augment(config: Config, normalize: Normalize) -> Augment | Normalize:
    """``config.augment`` and ``config.cutout``."""
    if config.augment == "none":
        return normalize
    if config.augment == "report":
        return Augment(normalize, cutout=config.cutout)
    crop = {"light": 2, "standard": 4}[config.augment]
    return Augment(normalize, rotation=0, shift=0, crop=crop, cutout=config.cutout)


def train_batches(
    train_set: CIFAR10, config: Config, ranks: Ranks, normalize: Normalize, augment: Augment | None = None
) -> Batches:
    """The training batches, this process's share, determined by seed and epoch; a last, smaller one is left out."""
    return Batches(
        train_set,
        config.batch_size,
        augment or build_augment(config, normalize),
        generator=torch.Generator().manual_seed(config.seed),
        drop_last=True,
        device=ranks.device,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
