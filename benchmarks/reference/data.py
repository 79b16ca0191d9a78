"""Pictures one by one, as a DataLoader asks for them: normalised, and moved at random in training."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

#: The report's "rotate, flip or shift": largest angle in degrees and largest shift as a share of the side.
ROTATION, SHIFT = 15.0, 0.125


def mean_image(images: Tensor) -> Tensor:
    """Per-pixel mean of uint8 ``images`` (N, 3, H, W): float32 (3, H, W) in 0..1.

    >>> mean_image(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)).item()
    0.5
    """
    return images.sum(0, dtype=torch.int64) / (255 * len(images))


def normalise(images: Tensor, mean: Tensor) -> Tensor:
    """uint8 images, one or many, to float32 in 0..1 with the mean image subtracted.

    Raises:
        TypeError: the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"normalise: images must be uint8 in 0..255, got {images.dtype}")
    return images / 255 - mean


def move(image: Tensor, degrees: float, mirrored: bool, right: float, down: float) -> Tensor:
    """A picture shifted, then turned about its centre, then mirrored left and right; bilinear, 0 comes in.

    Args:
        image: float (3, S, S).
        degrees: counter-clockwise.
        mirrored: whether to swap left and right.
        right, down: shift as a share of the side.

    >>> move(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), 0, False, 0.5, 0)
    tensor([[[0., 1.],
             [0., 3.]]])
    """
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    flip = -1 if mirrored else 1
    # From places in the result to places in the picture, where a side is 2 long and y points down.
    matrix = torch.tensor([[[flip * cos, -sin, -2 * right], [flip * sin, cos, -2 * down]]])
    grid = F.affine_grid(matrix, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]


def move_at_random(image: Tensor) -> Tensor:
    """:func:`move` by a uniform angle and shift, mirrored every other time, drawn from torch's own generator."""
    angle, flip, right, down = torch.rand(4).tolist()
    return move(image, (2 * angle - 1) * ROTATION, flip < 0.5, (2 * right - 1) * SHIFT, (2 * down - 1) * SHIFT)


class Pictures(Dataset[tuple[Tensor, int]]):
    """Normalised training pictures and their labels.

    Args:
        images, labels: uint8 (N, 3, H, W) and int64 (N,).
        mean: to subtract, float32 (3, H, W).
        augment: whether each picture is moved at random, every time anew; what comes in from outside is the mean.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, augment: bool):
        self.images, self.labels, self.mean, self.augment = images, labels, mean, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = normalise(self.images[index], self.mean)
        return (move_at_random(image) if self.augment else image), int(self.labels[index])
