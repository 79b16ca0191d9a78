"""Augmentation: each transform against an exact counterpart, and every draw accounted for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ran_ext.data import Augment, Normalize, sample
from ran_ext.data.augment import DRAWS

OFF = {"rotation": 0, "flip": 0, "shift": 0}
ANGLE, FLIP, DX, DY, LEFT, TOP, CUT_X, CUT_Y = range(DRAWS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are small: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images():
    return sample("test").images[:4]


@pytest.fixture(scope="module")
def normalize():
    return Normalize.per_pixel(sample("test"))


def draws_of(count, **values):
    """Draws in the middle of their range (no rotation, no shift), except those given by row."""
    draws = torch.full((DRAWS, count), 0.5)
    for name, value in values.items():
        draws[globals()[name]] = value
    return draws


def test_normalize_per_pixel_and_per_channel():
    data = sample("test")
    pixel = Normalize.per_pixel(data)(data.images)
    torch.testing.assert_close(pixel, data.images / 255 - data.mean_image(), atol=1e-6, rtol=0)
    assert pixel.mean(0).abs().max() < 1e-5
    channel = Normalize.per_channel(data)(data.images).double()
    torch.testing.assert_close(channel.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(channel.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-5, rtol=0)


def test_everything_off_is_normalize(images, normalize):
    assert torch.equal(Augment(normalize, **OFF)(images), normalize(images))


@pytest.mark.parametrize("rotation", [0, 1e-3], ids=["copied", "resampled"])
@pytest.mark.parametrize(("p", "draw", "mirrored"), [(1, 0.999, True), (0.5, 0.49, True), (0.5, 0.5, False)])
def test_flip(images, normalize, rotation, p, draw, mirrored):
    augment = Augment(normalize, rotation=rotation, flip=p, shift=0)
    expected = normalize(images).flip(3) if mirrored else normalize(images)
    got = augment(images, draws=draws_of(4, FLIP=draw))
    torch.testing.assert_close(got, expected, atol=0 if rotation == 0 else 1e-3, rtol=0)


@pytest.mark.parametrize(("draw", "turns"), [(0.0, -1), (1.0, 1)])
def test_rotation_by_90_degrees_is_rot90(images, normalize, draw, turns):
    augment = Augment(normalize, rotation=90, flip=0, shift=0)
    got = augment(images, draws=draws_of(4, ANGLE=draw))
    torch.testing.assert_close(got, normalize(images).rot90(turns, (2, 3)), atol=2e-5, rtol=0)


def test_rotation_keeps_the_shape_of_wide_images():
    """A disc stays a disc when the image is not square."""
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(64) - 31.5, indexing="ij")
    disc = ((x**2 + y**2 < 144) * 255).to(torch.uint8).expand(1, 3, 32, 64)
    augment = Augment(Normalize(torch.zeros(3, 1, 1)), rotation=45, flip=0, shift=0)
    got = augment(disc, draws=draws_of(1, ANGLE=1.0))
    assert (got - disc / 255).abs().mean() < 0.02


@settings(max_examples=20, deadline=None)
@given(dx=st.integers(-4, 4), dy=st.integers(-4, 4))
def test_shift_by_whole_pixels_fills_with_the_mean(images, normalize, dx, dy):
    draws = draws_of(4, DX=(dx / 4 + 1) / 2, DY=(dy / 4 + 1) / 2)
    got = Augment(normalize, rotation=0, flip=0, shift=0.125)(images, draws=draws)
    torch.testing.assert_close(got, window(normalize(images), dx, dy, "constant"), atol=2e-5, rtol=0)


def window(x, dx, dy, mode):
    """The image seen through a frame moved by (dx, dy): cut out of a padded copy."""
    padded = F.pad(x, (4, 4, 4, 4), mode=mode)
    return padded[:, :, 4 + dy : 4 + dy + x.shape[2], 4 + dx : 4 + dx + x.shape[3]]


@settings(max_examples=20, deadline=None)
@given(dx=st.integers(-4, 4), dy=st.integers(-4, 4), fill=st.sampled_from(["zero", "reflect"]), flip=st.booleans())
def test_crop_is_a_window_of_the_padded_image_bit_for_bit(images, normalize, dx, dy, fill, flip):
    augment = Augment(normalize, rotation=0, flip=float(flip), shift=0, crop=4, crop_fill=fill)
    got = augment(images, draws=draws_of(4, LEFT=(dx + 4.5) / 9, TOP=(dy + 4.5) / 9))
    expected = window(normalize(images), dx, dy, "constant" if fill == "zero" else "reflect")
    assert torch.equal(got, expected.flip(3) if flip else expected)


@settings(max_examples=20, deadline=None)
@given(side=st.integers(1, 40), x=st.integers(0, 31), y=st.integers(0, 31))
def test_cutout_clears_a_square_and_nothing_else(images, normalize, side, x, y):
    got = Augment(normalize, **OFF, cutout=side)(images, draws=draws_of(4, CUT_X=(x + 0.5) / 32, CUT_Y=(y + 0.5) / 32))
    expected = normalize(images)
    top, left = y - side // 2, x - side // 2
    expected[:, :, max(top, 0) : top + side, max(left, 0) : left + side] = 0
    assert torch.equal(got, expected)


def test_crop_flip_and_rotation_together_flip_once(images, normalize):
    augment = Augment(normalize, rotation=1e-3, flip=1, shift=0, crop=4)
    expected = window(normalize(images), 2, -3, "constant").flip(3)
    got = augment(images, draws=draws_of(4, LEFT=6.5 / 9, TOP=1.5 / 9))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


def test_draws_stay_in_range_and_every_image_has_its_own(normalize):
    """Angles, shifts and flips read back from an image of positions: their spread is what was asked for."""
    ramp = torch.arange(32, dtype=torch.uint8).expand(1, 3, 32, 32) * 8
    augment = Augment(Normalize(torch.zeros(3, 1, 1)))
    got = augment(ramp.expand(2000, -1, -1, -1), torch.Generator().manual_seed(0))[:, 0] * 255 / 8
    centre = got[:, 12:20, 12:20]  # far enough from every border to be free of the fill
    slope_x = (centre[:, :, 7] - centre[:, :, 0]).mean(1) / 7
    slope_y = (centre[:, 7] - centre[:, 0]).mean(1) / 7
    angle = torch.rad2deg(torch.atan2(slope_y, slope_x.abs()))
    shift = centre.mean((1, 2)) - 15.5
    assert 14.5 < angle.abs().max() <= 15.01
    assert abs(angle.std().item() - 30 / 12**0.5) < 0.3
    assert 3.9 < shift.abs().max() <= 4.01
    assert abs(shift.std().item() - 8 / 12**0.5) < 0.15
    assert 0.47 < (slope_x < 0).double().mean() < 0.53


def test_same_seed_same_batch_and_default_generator(images, normalize):
    augment = Augment(normalize, crop=2, cutout=4)
    first, second = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(4)))
    torch.manual_seed(3)
    assert torch.equal(first, augment(images))


def test_switching_one_option_leaves_the_other_draws(images, normalize):
    with_cutout = Augment(normalize, cutout=6)(images, torch.Generator().manual_seed(0))
    without = Augment(normalize)(images, torch.Generator().manual_seed(0))
    assert torch.equal(with_cutout[with_cutout != 0], without[with_cutout != 0])
    assert (with_cutout == 0).sum() > (without == 0).sum()


@pytest.mark.parametrize("options", [{}, {"rotation": 0, "shift": 0, "crop": 2, "cutout": 4}])
def test_memory_format_and_layout_of_the_input_change_no_value(images, normalize, options):
    draws = Augment.draw(4, torch.Generator().manual_seed(0))
    expected = Augment(normalize, **options)(images, draws=draws)
    assert expected.is_contiguous()
    last = Normalize.per_pixel(sample("test"), memory_format=torch.channels_last)
    for given_images in (images, images.contiguous(memory_format=torch.channels_last)):
        got = Augment(last, **options)(given_images, draws=draws)
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert last(images).is_contiguous(memory_format=torch.channels_last)


def test_autocast_moves_no_pixel(images, normalize):
    draws = Augment.draw(4, torch.Generator().manual_seed(0))
    expected = Augment(normalize)(images, draws=draws)
    with torch.autocast("cpu", torch.bfloat16):
        got = Augment(normalize)(images, draws=draws)
    assert torch.equal(got, expected)


def test_empty_batch(normalize):
    empty = torch.empty(0, 3, 32, 32, dtype=torch.uint8)
    assert Augment(normalize, crop=2, cutout=4)(empty).shape == (0, 3, 32, 32)


def test_compiles_without_graph_breaks(images, normalize):
    augment = Augment(normalize, crop=2, cutout=4)
    draws = Augment.draw(4, torch.Generator().manual_seed(0))
    compiled = torch.compile(augment, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images, draws=draws), augment(images, draws=draws))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rotation": 181}, "rotation must be from 0 to 180, got 181"),
        ({"flip": 1.5}, "flip must be from 0 to 1"),
        ({"shift": -0.1}, "shift must be from 0 to 1, got -0.1"),
        ({"crop": -1}, "crop must be a whole number of pixels >= 0, got -1"),
        ({"cutout": 2.5}, "cutout must be a whole number"),
        ({"crop_fill": "wrap"}, "crop_fill must be 'zero' or 'reflect', got 'wrap'"),
    ],
)
def test_options_out_of_range(normalize, options, text):
    with pytest.raises(ValueError, match=text):
        Augment(normalize, **options)


def test_unfit_calls(images, normalize):
    with pytest.raises(TypeError, match=r"Augment: images must be uint8 \(N, C, H, W\), got torch.float32"):
        Augment(normalize)(images.float())
    with pytest.raises(TypeError, match=r"Normalize: images must be uint8 \(N, C, H, W\), got .* \[3, 32, 32\]"):
        normalize(images[0])
    with pytest.raises(ValueError, match=r"draws must be \(8, N\).*got draws \[8, 5\]"):
        Augment(normalize)(images, draws=torch.rand(8, 5))
    with pytest.raises(ValueError, match="crop must be smaller than the image"):
        Augment(normalize, crop=32)(images)


@pytest.mark.gpu
def test_cuda_equals_cpu_and_replays_in_a_graph(images, normalize):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    augment, on_gpu = Augment(normalize, crop=2, cutout=4), images.cuda()
    draws = Augment.draw(4, torch.Generator().manual_seed(0))
    expected = augment(images, draws=draws)
    augment = augment.cuda()
    torch.testing.assert_close(augment(on_gpu, draws=draws.cuda()).cpu(), expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="generator must be of the images' device"):
        augment(on_gpu, torch.Generator())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = augment(on_gpu)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)
