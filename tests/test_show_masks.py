"""The command that draws attention: what it prints, what it draws, what it refuses."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ran_ext._attention_maps import attention_maps
from ran_ext.data import CLASSES, sample
from ran_ext.models import create_model
from ran_ext.train import Config, fit, load_model, load_normalize, save_checkpoint

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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.pt", "own.png"], "there is no checkpoint"),
        (["own.png", "own.png"], "damaged or no checkpoint"),
        (["other.pt", "own.png"], "no checkpoint of a training"),
        (["CHECKPOINT", "missing.png"], "there is no picture"),
        (["CHECKPOINT", "text.png"], "as a picture"),
        (["CHECKPOINT", "own.png", "--size", "64"], "--size must be 32, got 64"),
        (["CHECKPOINT", "own.png", "--out", "/dev/null"], "cannot write /dev/null"),
        (["CHECKPOINT", "empty"], "the folder empty holds no pictures"),
        (["CHECKPOINT", *101 * ["own.png"]], "101 pictures do not fit into one figure"),
        (["unmasked.pt", "own.png"], "has no attention"),
        (["CHECKPOINT", "own.png", "--out", "nowhere/masks.png"], "cannot write nowhere/masks.png"),
    ],
)
def test_refuses_in_one_sentence(show_masks, checkpoint, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "own.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    save_checkpoint("other.pt", {"weights": torch.zeros(1)})
    state = torch.load(checkpoint, weights_only=True)
    state["config"]["model_options"]["attention"] = False
    state["model"] = create_model("ran_compact", width=0.125, attention=False).state_dict()
    torch.save(state, "unmasked.pt")
    assert show_masks.main([str(checkpoint) if name == "CHECKPOINT" else name for name in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("show_masks: error: ")
    assert said in error
    assert error.count("\n") == 1


def test_takes_a_folder_and_says_how_greys_were_scaled(show_masks, checkpoint, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    picture(folder / "b.png")
    Image.fromarray(np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)).save(folder / "a.tiff")
    (folder / "notes.txt").write_text("no picture")
    assert show_masks.main([str(checkpoint), str(folder), "--out", str(tmp_path / "masks.png")]) == 0
    said = capsys.readouterr()
    shown = [line.partition(":")[0] for line in said.out.splitlines()[:2]]
    assert shown == [str(folder / "a.tiff"), str(folder / "b.png")]
    assert said.err == f"{folder / 'a.tiff'}: greys 0 to 1 as black to white\n"


def test_product_is_the_gate_of_trunk_and_mask():
    model = create_model("ran_compact", width=0.125)
    maps = attention_maps(model, torch.randn(2, 3, 32, 32))
    for parts in maps.values():
        assert all(part.shape == (2, 32, 32) for part in parts)
        assert (parts.product > parts.trunk).all()
        assert (parts.product < 2 * parts.trunk).all()
        assert ((parts.mask > 0) & (parts.mask < 1)).all()
