"""Augmentation of whole batches on the device that holds them: no host synchronisation, every draw seeded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .images import Images

#: Uniform numbers that an image consumes, whichever options are on, so that switching one leaves the others' draws.
DRAWS = 8


class Normalize(nn.Module):
    """uint8 images to ``(image / 255 - mean) / std`` in float32.

    Args:
        mean: of pixels in 0..1, of any shape that broadcasts to (C, H, W): a mean image, or (C, 1, 1) a channel; or a
            number a channel, as in :class:`ran_ext.models.ModelCard`.
        std: likewise; None leaves the scale.
        memory_format: of the result, ``torch.contiguous_format`` or ``torch.channels_last``.

    Raises:
        ValueError: a standard deviation is 0, as of a channel that is the same in all images.

    Input uint8 (N, C, H, W), output float32 (N, C, H, W) on the same device; the module must be there too.

    >>> normalize = Normalize(torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5))
    >>> normalize(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).unique().round(decimals=6)
    tensor([1.])
    >>> Normalize((0.5, 0.5, 0.5))(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).unique()
    tensor([0.5000])
    """

    scale: Tensor
    offset: Tensor

    def __init__(
        self,
        mean: Tensor | Sequence[float],
        std: Tensor | Sequence[float] | None = None,
        memory_format: torch.memory_format | None = None,
    ):
        super().__init__()
        mean, std = _a_channel(mean), None if std is None else _a_channel(std)
        self.memory_format = memory_format or torch.contiguous_format
        std = torch.ones_like(mean) if std is None else std
        if not bool((std > 0).all()):
            raise ValueError(f"Normalize: std must be positive, got {std.min().item()}: are all images alike?")
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("offset", -mean / std, persistent=False)

    @classmethod
    def per_pixel(cls, dataset: Images, memory_format: torch.memory_format | None = None) -> Normalize:
        """The report's: subtracts the mean image of ``dataset`` (the training set), leaves the scale 0..1."""
        return cls(dataset.mean_image(), None, memory_format)

    @classmethod
    def per_channel(cls, dataset: Images, memory_format: torch.memory_format | None = None) -> Normalize:
        """Zero mean and unit variance of each channel over ``dataset`` (the training set)."""
        return cls(*dataset.channel_stats(), memory_format)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        _require_uint8("Normalize", images)
        return self.normalize(images).contiguous(memory_format=self.memory_format)

    def normalize(self, images: Tensor) -> Tensor:
        """As ``forward``, in the input's own layout."""
        return torch.addcmul(self.offset, images.to(self.offset.dtype), self.scale)


def _a_channel(values: Tensor | Sequence[float]) -> Tensor:
    return values if isinstance(values, Tensor) else torch.tensor(values).view(-1, 1, 1)


class Augment(nn.Module):
    """Random geometry, in batch: flip, crop, rotation, shift and cut-out of the normalised image.

    The image is normalised first and what comes in from outside is 0, the mean. Rotation, shift and flip are one
    bilinear resampling; without rotation and shift, crop and flip copy pixels exactly. Defaults are the report's.

    Args:
        normalize: makes floats of the uint8 images, and sets the result's memory format.
        rotation: largest angle in degrees, uniform in +-rotation; 0 turns it off.
        flip: probability of mirroring left and right.
        shift: largest translation, as a share of height and width, uniform in +-shift, not in whole pixels.
        crop: padding in pixels of a random crop, i.e. a shift by whole pixels, uniform in -crop ... crop.
        crop_fill: what the crop brings in: ``"zero"`` or ``"reflect"`` (mirrored without repeating the border).
        cutout: side in pixels of a square set to 0, centred anywhere in the image (DeVries & Taylor 2017).

    Call ``augment(images, generator=None, draws=None)``: uint8 (N, C, H, W) to float32 (N, C, H, W). ``generator`` is
    one of the images' device (default: that device's own). ``draws`` replaces it: uniform numbers in [0, 1),
    (8, N), as :meth:`draw` makes them. On CUDA nothing waits for the device, so a CUDA graph can capture the call.

    Raises:
        ValueError: an option is out of its range, or ``images`` and ``draws`` do not fit.
        TypeError: ``images`` is not uint8.

    >>> augment = Augment(Normalize(torch.zeros(3, 1, 1)), rotation=0, shift=0, flip=1)
    >>> image = torch.arange(12, dtype=torch.uint8).view(1, 3, 1, 4)
    >>> (augment(image)[0, 0] * 255).round().tolist()
    [[3.0, 2.0, 1.0, 0.0]]
    """

    def __init__(
        self,
        normalize: Normalize,
        rotation: float = 15.0,
        flip: float = 0.5,
        shift: float = 0.125,
        crop: int = 0,
        crop_fill: Literal["zero", "reflect"] = "zero",
        cutout: int = 0,
    ):
        super().__init__()
        for name, value, top in (("rotation", rotation, 180), ("flip", flip, 1), ("shift", shift, 1)):
            if not 0 <= value <= top:
                raise ValueError(f"Augment: {name} must be from 0 to {top}, got {value}")
        for name, pixels in (("crop", crop), ("cutout", cutout)):
            if pixels < 0 or pixels != int(pixels):
                raise ValueError(f"Augment: {name} must be a whole number of pixels >= 0, got {pixels}")
        if crop_fill not in ("zero", "reflect"):
            raise ValueError(f"Augment: crop_fill must be 'zero' or 'reflect', got {crop_fill!r}")
        self.normalize = normalize
        self.rotation, self.flip, self.shift = rotation, flip, shift
        self.crop, self.crop_fill, self.cutout = crop, crop_fill, cutout

    @staticmethod
    def draw(count: int, generator: torch.Generator | None = None, device: torch.device | str | None = None) -> Tensor:
        """Uniform numbers for ``count`` images, float32 (8, count): a column an image."""
        return torch.rand(DRAWS, count, generator=generator, device=device)

    @torch.no_grad()
    def forward(self, images: Tensor, generator: torch.Generator | None = None, draws: Tensor | None = None) -> Tensor:
        _require_uint8("Augment", images)
        self._require_fit(images, generator, draws)
        if draws is None:
            draws = self.draw(len(images), generator, images.device)
        u_angle, u_flip, u_dx, u_dy, u_left, u_top, u_x, u_y = draws.unbind()
        mirrored = u_flip < self.flip
        x = self.normalize.normalize(images)
        resample = self.rotation > 0 or self.shift > 0
        if self.crop or (self.flip > 0 and not resample):
            x = self._crop(x, u_left, u_top, torch.zeros_like(mirrored) if resample else mirrored)
        if resample:
            x = self._resample(x, u_angle, u_dx, u_dy, mirrored)
        if self.cutout:
            x = self._cut(x, u_x, u_y)
        return x.contiguous(memory_format=self.normalize.memory_format)

    def _resample(self, x: Tensor, u_angle: Tensor, u_dx: Tensor, u_dy: Tensor, mirrored: Tensor) -> Tensor:
        """Rotation, shift and flip as one map from output to input positions, with both sides of length 2.

        Written out rather than by ``F.affine_grid``: its matrix product would be rounded to bf16 under autocast and to
        TF32 where that is allowed, which moves pixels.
        """
        height, width = x.shape[-2:]
        angle = ((2 * u_angle - 1) * math.radians(self.rotation))[:, None, None]
        cos, sin = angle.cos(), angle.sin()
        shift_x, shift_y = ((4 * u - 2)[:, None, None] * self.shift for u in (u_dx, u_dy))
        right = _centres(width, x) * (1 - 2 * mirrored.to(x.dtype))[:, None, None]
        down = _centres(height, x)[:, None]
        grid_x = cos * right - sin * down * (height / width) + shift_x
        grid_y = sin * right * (width / height) + cos * down + shift_y
        grid = torch.stack([grid_x, grid_y], -1)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _crop(self, x: Tensor, u_left: Tensor, u_top: Tensor, mirrored: Tensor) -> Tensor:
        """Whole-pixel shift and flip as one gather: no padded copy."""
        height, width = x.shape[-2:]
        rows = self._shifted(u_top, height)
        columns = self._shifted(u_left, width)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        rows, inside_rows = self._folded(rows, height)
        columns, inside_columns = self._folded(columns, width)
        index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
        out = x.flatten(2).gather(2, index[:, None, :].expand(-1, x.shape[1], -1)).view(x.shape)
        if self.crop and self.crop_fill == "zero":
            inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
            out = out.masked_fill_(~inside, 0)
        return out

    def _shifted(self, u: Tensor, size: int) -> Tensor:
        start = (u * (2 * self.crop + 1)).long() - self.crop
        return start[:, None] + torch.arange(size, device=u.device)

    @staticmethod
    def _folded(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Indices outside 0 ... size - 1 mirrored back in, and which were inside."""
        last = size - 1
        return last - (last - index.abs()).abs(), (index >= 0) & (index <= last)

    def _cut(self, x: Tensor, u_x: Tensor, u_y: Tensor) -> Tensor:
        def covered(u: Tensor, size: int) -> Tensor:
            start = (u * size).long()[:, None] - self.cutout // 2
            offset = torch.arange(size, device=u.device) - start
            return (offset >= 0) & (offset < self.cutout)

        rows, columns = covered(u_y, x.shape[-2]), covered(u_x, x.shape[-1])
        return x.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)

    def _require_fit(self, images: Tensor, generator: torch.Generator | None, draws: Tensor | None) -> None:
        if self.crop >= min(images.shape[-2:]):
            raise ValueError(
                f"Augment: crop must be smaller than the image, got crop {self.crop} and images {list(images.shape)}"
            )
        if draws is not None and draws.shape != (DRAWS, len(images)):
            raise ValueError(
                f"Augment: draws must be ({DRAWS}, N) for N images, got draws {list(draws.shape)} and images "
                f"{list(images.shape)}"
            )
        if generator is not None and generator.device.type != images.device.type:
            raise ValueError(
                f"Augment: generator must be of the images' device, got generator on {generator.device} and images on "
                f"{images.device}; make it with torch.Generator(device=images.device)"
            )

    def extra_repr(self) -> str:
        return (
            f"rotation={self.rotation}, flip={self.flip}, shift={self.shift}, crop={self.crop} ({self.crop_fill}), "
            f"cutout={self.cutout}"
        )


def _centres(size: int, like: Tensor) -> Tensor:
    """Positions of ``size`` pixels' centres on a side from -1 to 1."""
    return (2 * torch.arange(size, dtype=like.dtype, device=like.device) + 1) / size - 1


def _require_uint8(who: str, images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise TypeError(f"{who}: images must be uint8 (N, C, H, W), got {images.dtype} {list(images.shape)}")
