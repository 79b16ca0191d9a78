"""The batches that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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


def given_augment(augment: Callable[[Tensor], Tensor], normalize: Normalize) -> Callable[[Tensor], Tensor]:
    """An augmentation of the user's, with the normalisation that validation and test get: never with another.

    Args:
        augment: :class:`~ran_ext.data.Augment` with the same normalisation, or a function of uint8 ``(N, C, H, W)`` to
            the same, which is normalised after it.
        normalize: of all images.

    Raises:
        ValueError: the :class:`~ran_ext.data.Augment` normalises otherwise.
        TypeError (when called): the function does not return uint8.
    """
    if isinstance(augment, Augment):
        pairs = zip(augment.normalize.buffers(), normalize.buffers(), strict=True)
        if not all(torch.equal(mine.to(own.device), own) for mine, own in pairs):
            raise ValueError(
                "fit: augment must normalise as validation does: build it with build_normalize(train_set, config)"
            )
        return augment

    def normalised(images: Tensor) -> Tensor:
        augmented = augment(images)
        if not isinstance(augmented, Tensor) or augmented.dtype != torch.uint8:
            got = augmented.dtype if isinstance(augmented, Tensor) else type(augmented).__name__
            raise TypeError(
                f"fit: augment must return uint8 images, got {got}: they are normalised after it, as validation's "
                "images are, so leave conversion to float and normalisation out"
            )
        return normalize.to(images.device)(augmented)

    return normalised


def train_batches(
    train_set: CIFAR10,
    config: Config,
    ranks: Ranks,
    normalize: Normalize,
    augment: Callable[[Tensor], Tensor] | None = None,
) -> Batches:
    """The training batches, this process's share, determined by seed and epoch; a last, smaller one is left out.

    ``augment`` takes the place of ``config.augment``, as :func:`given_augment` says.
    """
    return Batches(
        train_set,
        config.batch_size,
        given_augment(augment, normalize) if augment else build_augment(config, normalize),
        generator=torch.Generator().manual_seed(config.seed),
        drop_last=True,
        device=ranks.device,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
