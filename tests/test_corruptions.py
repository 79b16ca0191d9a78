"""Corruptions: strength 0, growing distance, seeds, and each against an independent formula."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from ran_ext.data import CORRUPTIONS, corrupt, sample
from ran_ext.data.corruptions import STRENGTHS


@pytest.fixture(scope="module")
def images():
    return sample("test").images[:64]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_strength_0_is_the_image_and_each_further_one_is_farther(images, name):
    versions = [corrupt(images, name, strength, seeded()) for strength in range(STRENGTHS + 1)]
    assert torch.equal(versions[0], images)
    assert {version.dtype for version in versions} == {torch.uint8}
    assert {version.shape for version in versions} == {images.shape}
    distances = [(version.double() - images.double()).square().mean().sqrt().item() for version in versions]
    assert all(near < farther for near, farther in pairwise(distances))


@pytest.mark.parametrize("name", ["gaussian noise", "shift"])
def test_the_seed_decides(images, name):
    first = corrupt(images, name, 3, seeded(1))
    assert torch.equal(first, corrupt(images, name, 3, seeded(1)))
    assert not torch.equal(first, corrupt(images, name, 3, seeded(2)))


def test_noise_has_the_deviation_asked_for_and_stays_within_0_and_255():
    grey = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    noise = corrupt(grey, "gaussian noise", 5, seeded()).double() - 128
    assert noise.std().item() == pytest.approx(0.10 * 255, rel=0.02)
    assert abs(noise.mean().item()) < 0.3
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 64, 2)
    black, white = corrupt(ends, "gaussian noise", 5, seeded()).unbind(3)
    assert black.max() < 128 < white.min()
    assert (black == 0).double().mean() == pytest.approx(0.5, abs=0.1)


def test_blur_is_a_separable_gaussian(images):
    x = images[:2].double().numpy()
    distance = np.arange(-4, 5)
    weights = np.exp(-0.5 * distance**2)  # strength 5: sigma of 1 pixel
    weights /= weights.sum()
    padded = np.pad(x, ((0, 0), (0, 0), (4, 4), (4, 4)), mode="edge")
    for axis in (2, 3):
        padded = np.apply_along_axis(np.convolve, axis, padded, weights, mode="valid")
    assert np.abs(corrupt(images[:2], "blur", 5).numpy() - padded).max() <= 0.5 + 1e-3


def test_contrast_keeps_the_mean_and_shrinks_the_deviation(images):
    before, after = images.double(), corrupt(images, "contrast", 5).double()
    torch.testing.assert_close(after.mean((2, 3)), before.mean((2, 3)), atol=0.3, rtol=0)  # rounding
    torch.testing.assert_close(after.std((2, 3)), 0.15 * before.std((2, 3)), atol=0.3, rtol=0)  # rounding


def test_every_shift_is_a_window_of_the_mirrored_image(images):
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (6, 6), (6, 6)), mode="reflect")
    windows = [padded[:, :, top : top + 32, left : left + 32] for top, left in ((0, 6), (12, 6), (6, 0), (6, 12))]
    shifted = corrupt(images, "shift", 3, seeded()).numpy()
    matches = np.array([[np.array_equal(a, b) for a, b in zip(window, shifted, strict=True)] for window in windows])
    assert (matches.sum(0) == 1).all()
    assert (matches.sum(1) > 4).all()  # all four directions occur


def test_misuse_is_named(images):
    with pytest.raises(ValueError, match=r"name must be one of gaussian noise, blur, contrast, shift, got 'fog'"):
        corrupt(images, "fog", 1)
    with pytest.raises(ValueError, match="strength must be a whole number from 0 to 5, got 6"):
        corrupt(images, "blur", 6)
    with pytest.raises(TypeError, match=r"images must be uint8 \(N, C, H, W\), got torch.float32"):
        corrupt(images.float(), "blur", 1)


@pytest.mark.gpu
def test_cuda_equals_cpu(images):
    for name in ("blur", "contrast"):
        on_cpu, on_gpu = corrupt(images, name, 4), corrupt(images.cuda(), name, 4)
        assert (on_cpu.int() - on_gpu.cpu().int()).abs().max() <= 1  # rounding at the half
