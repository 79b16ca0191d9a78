"""The command that draws attention: what it prints, what it draws, what it refuses."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ran_ext.data import CLASSES, sample
from ran_ext.models import create_model
from ran_ext.train import Config, fit, load_model, load_normalize, save_checkpoint
from ran_ext.train.masks import attention_maps

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "show_masks.py"


@pytest.fixture(scope="module")
def show_masks():
    spec = importlib.util.spec_from_file_location("show_masks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = {"model_options": {"width": 0.125}, "epochs": 1, "batch_size": 16, "patience": 0, "select": "last"}
    config = Config(**options)
    torch.manual_seed(0)
    fit(config.create_model(), sample("train").subset(torch.arange(32)), None, config, folder, quiet=True)
    return folder / "model.pt"


def picture(path, mode="RGB", size=(32, 32)):
    pixels = sample("test").images[1].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).resize(size).convert(mode).save(path)
    return path


def test_prints_the_network_s_own_predictions_and_draws(show_masks, checkpoint, tmp_path, capsys):
    paths = [picture(tmp_path / "own.png"), picture(tmp_path / "large.jpg", size=(300, 200))]
    out = tmp_path / "masks.png"
    assert show_masks.main([str(checkpoint), *map(str, paths), "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    with torch.no_grad():
        shares = load_model(checkpoint)(load_normalize(checkpoint)(sample("test").images[1:2])).softmax(1)[0]
    expected = ", ".join(f"{CLASSES[label]} {shares[label]:.1%}" for label in shares.argsort(descending=True)[:3])
    assert printed[0] == f"{paths[0]}: {expected}"
    assert printed[1].startswith(f"{paths[1]}: ")
    assert Image.open(out).size[0] > 1000


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA"])
def test_reads_every_mode(show_masks, tmp_path, mode):
    image = show_masks.read_picture(picture(tmp_path / "picture.png", mode, (40, 64)), 32)
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8
    assert image.float().std() > 10


def test_transparent_is_white_and_deep_grey_is_kept(show_masks, tmp_path):
    Image.new("RGBA", (9, 5), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert show_masks.read_picture(tmp_path / "clear.png", 8).unique().tolist() == [255]
    Image.fromarray(np.full((9, 5), 0x8000, np.uint16)).save(tmp_path / "grey.png")
    assert show_masks.read_picture(tmp_path / "grey.png", 8).unique().tolist() == [0x80]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.pt", "own.png"], "there is no checkpoint"),
        (["own.png", "own.png"], "damaged or no checkpoint"),
        (["other.pt", "own.png"], "no checkpoint of a training"),
        (["CHECKPOINT", "missing.png"], "there is no picture"),
        (["CHECKPOINT", "text.png"], "as a picture"),
        (["CHECKPOINT", "own.png", "--size", "64"], "--size must be 32, got 64"),
        (["CHECKPOINT", "own.png", "--out", "nowhere/masks.png"], "cannot write nowhere/masks.png"),
    ],
)
def test_refuses_in_one_sentence(show_masks, checkpoint, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "own.png")
    (tmp_path / "text.png").write_text("no picture")
    save_checkpoint("other.pt", {"weights": torch.zeros(1)})
    assert show_masks.main([str(checkpoint) if name == "CHECKPOINT" else name for name in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("show_masks: error: ")
    assert said in error
    assert error.count("\n") == 1


def test_product_is_the_gate_of_trunk_and_mask():
    model = create_model("ran_compact", width=0.125)
    maps = attention_maps(model, torch.randn(2, 3, 32, 32))
    for parts in maps.values():
        assert all(part.shape == (2, 32, 32) for part in parts)
        assert (parts.product > parts.trunk).all()
        assert (parts.product < 2 * parts.trunk).all()
        assert ((parts.mask > 0) & (parts.mask < 1)).all()
