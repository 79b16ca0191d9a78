"""Pictures of any kind: what is seen is what was there, or a sentence."""

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ran_ext.data import sample
from ran_ext.data.pictures import PictureError, find_pictures, read_picture


def photograph(mode="RGB", size=(40, 64)):
    pixels = sample("test").images[1].permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize(size).convert(mode)


#: What Pillow can write of each mode.
WRITTEN = {
    "png": ("RGB", "RGBA", "L", "P", "1", "LA"),
    "jpg": ("RGB", "L", "CMYK", "YCbCr"),
    "tiff": ("RGB", "RGBA", "L", "P", "1", "LA", "PA", "CMYK", "YCbCr", "LAB", "I", "F"),
    "webp": ("RGB", "RGBA", "L", "P"),
    "gif": ("RGB", "L", "P", "1"),
}


@pytest.mark.parametrize(("mode", "ending"), [(mode, ending) for ending in WRITTEN for mode in WRITTEN[ending]])
def test_every_mode_looks_as_it_does_in_8_bits(tmp_path, mode, ending):
    path, plain = tmp_path / f"picture.{ending}", tmp_path / "plain.png"
    picture = photograph("RGB") if mode == "LAB" else photograph(mode)
    if mode == "LAB":
        lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        picture = ImageCms.applyTransform(picture, lab)
    picture.save(path)
    photograph("L" if mode in ("L", "LA", "I", "F") else "1" if mode == "1" else "RGB").save(plain)
    image, scaled = read_picture(path, 32)
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8
    difference = (image.float() - read_picture(plain, 32)[0].float()).abs().mean()
    assert difference < (20 if mode in ("P", "PA") or ending == "gif" else 8)  # a palette's colours are others
    assert scaled in ("", "greys 0 to 255 as black to white")


def test_transparent_is_white(tmp_path):
    Image.new("RGBA", (9, 5), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png", 8)[0].unique().tolist() == [255]


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    ("greys", "ending", "said"),
    [
        (RAMP.astype(np.float32), "tiff", "greys 0 to 1 as black to white"),
        ((255 * RAMP).astype(np.float32), "tiff", "greys 0 to 255 as black to white"),
        ((65535 * RAMP).astype(np.float32), "tiff", "greys 0 to 65535 as black to white"),
        ((2 * RAMP - 1).astype(np.float32), "tiff", "greys -1 to 1 as black to white"),
        ((1e6 * RAMP).astype(np.float32), "tiff", "greys 0 to 1e+06 as black to white"),
        ((65535 * RAMP).astype(np.uint16), "tiff", "greys 0 to 65535 as black to white"),
        ((65535 * RAMP).astype(np.uint16), "png", "greys 0 to 65535 as black to white"),
        ((65535 * RAMP).astype(np.int32), "tiff", "greys 0 to 65535 as black to white"),
        ((1e6 * RAMP - 5e5).astype(np.int32), "tiff", "greys -500000 to 500000 as black to white"),
    ],
)
def test_greys_of_more_than_8_bits_are_scaled_and_said(tmp_path, greys, ending, said):
    path = tmp_path / f"grey.{ending}"
    Image.fromarray(greys).save(path)
    image, scaled = read_picture(path, 64)
    assert scaled == said
    np.testing.assert_allclose(image[0].numpy(), 255 * RAMP, atol=1.01)


def test_a_dark_grey_of_16_bits_is_as_dark_as_it_was(tmp_path):
    Image.fromarray(np.full((9, 5), 0x0800, np.uint16)).save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png", 8)[0].unique().tolist() == [8]


def test_greys_that_are_all_alike_are_no_division_by_zero(tmp_path):
    Image.fromarray(np.full((9, 5), -3, np.float32)).save(tmp_path / "grey.tiff")
    assert read_picture(tmp_path / "grey.tiff", 8)[0].unique().tolist() == [0]


def test_the_camera_s_turn_is_followed(tmp_path):
    upright = photograph(size=(64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right when it is shown
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert (read_picture(tmp_path / "turned.png", 32)[0] == read_picture(tmp_path / "upright.png", 32)[0]).all()


def test_what_is_no_picture_is_refused_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    photograph().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    for name in ("text.png", "cut.png", "pipe.png", "zero.png", "nan.tiff"):
        with pytest.raises(PictureError, match=name) as caught:
            read_picture(tmp_path / name, 8)
        assert "\n" not in str(caught.value)
    with pytest.raises(PictureError, match="there is no picture"):
        read_picture(tmp_path / "missing.png", 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's guard against pictures that unfold to gigabytes
    with pytest.raises(PictureError, match=r"whole\.png"):
        read_picture(tmp_path / "whole.png", 8)


def test_a_folder_is_the_pictures_in_it_by_name(tmp_path):
    for name in ("b.png", "a.jpg", "c.TIFF"):
        photograph().save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "inner.png").mkdir()
    found = list(find_pictures([tmp_path, tmp_path / "b.png"]))
    assert [path.name for path in found] == ["a.jpg", "b.png", "c.TIFF", "b.png"]
    with pytest.raises(PictureError, match="holds no pictures"):
        list(find_pictures([tmp_path / "inner.png"]))
