"""Corrupted test images at five strengths, after CIFAR-10-C (Hendrycks & Dietterich 2019, arXiv:1903.12261).

Noise, blur and contrast have that benchmark's parameters; shifted images are not part of it. Results are rounded to
whole levels, which the benchmark truncates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .images import to_float

STRENGTHS = 5


def corrupt(images: Tensor, name: str, strength: int, generator: torch.Generator | None = None) -> Tensor:
    """``images`` with corruption ``name`` at ``strength``, on the images' device.

    The same generator state draws the same noise and directions at every strength, so that only the strength differs.

    Args:
        images: uint8 ``(N, C, H, W)``; for ``shift`` of more than 10x10 pixels.
        name: a key of :data:`CORRUPTIONS`.
        strength: 0 (the images themselves) to 5.
        generator: of the images' device; by default that device's own.

    Returns:
        uint8 ``(N, C, H, W)``.

    Raises:
        ValueError: there is no such corruption or strength.
        TypeError: ``images`` is not uint8 ``(N, C, H, W)``.

    >>> images = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    >>> corrupt(images, "contrast", 2).flatten().tolist()
    [64, 191]
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corrupt: name must be one of {', '.join(CORRUPTIONS)}, got {name!r}")
    if strength not in range(STRENGTHS + 1):
        raise ValueError(f"corrupt: strength must be a whole number from 0 to {STRENGTHS}, got {strength}")
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise TypeError(f"corrupt: images must be uint8 (N, C, H, W), got {images.dtype} {list(images.shape)}")
    if strength == 0:
        return images
    apply, parameters = CORRUPTIONS[name]
    corrupted = apply(to_float(images), parameters[strength - 1], generator)
    return (255 * corrupted).round_().clamp_(0, 255).to(torch.uint8)


def _noise(x: Tensor, sigma: float, generator: torch.Generator | None) -> Tensor:
    """Gaussian noise of standard deviation ``sigma``, of pixels in 0..1."""
    return x + sigma * torch.randn(x.shape, generator=generator, device=x.device)


def _blur(x: Tensor, sigma: float, generator: torch.Generator | None) -> Tensor:
    """Convolution with a Gaussian of ``sigma`` pixels, cut off at 4 sigma; the border's pixels are repeated."""
    reach = math.ceil(4 * sigma)
    distance = torch.arange(-reach, reach + 1, device=x.device)
    weights = torch.exp(-0.5 * (distance / sigma) ** 2)
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(x, weights, groups=x.shape[1]), weights.mT, groups=x.shape[1])


def _contrast(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Only ``share`` of each pixel's distance from its channel's mean in the image is left."""
    return torch.lerp(x.mean((2, 3), keepdim=True), x, share)


def _shift(x: Tensor, pixels: float, generator: torch.Generator | None) -> Tensor:
    """A shift by ``pixels`` up, down, left or right, at random; behind its border the image goes on mirrored."""
    by, (height, width) = int(pixels), x.shape[2:]
    padded = F.pad(x, (by, by, by, by), mode="reflect")
    corners = ((0, by), (2 * by, by), (by, 0), (by, 2 * by))
    windows = torch.stack([padded[:, :, top : top + height, left : left + width] for top, left in corners])
    direction = torch.randint(4, (len(x),), generator=generator, device=x.device)
    return windows[direction, torch.arange(len(x), device=x.device)]


#: By name: the function, and its parameter at strengths 1 to 5.
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, torch.Generator | None], Tensor], tuple[float, ...]]] = {
    "gaussian noise": (_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "blur": (_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "shift": (_shift, (2, 4, 6, 8, 10)),
}
