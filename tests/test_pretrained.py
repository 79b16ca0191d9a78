"""Trained weights in the package: what they predict, whom they fit, and what a damaged file says."""

import hashlib
import shutil

import pytest
import torch

from ran_ext import fold_for_inference
from ran_ext.data import CIFAR10, Normalize
from ran_ext.models import create_model, list_pretrained, model_card, pretrained
from ran_ext.train import evaluate
from scripts import evaluate as command


@pytest.mark.parametrize("name", list_pretrained())
def test_predicts_the_embedded_test_images_as_well_as_its_card_says_of_all(name):
    card, test = model_card(name), CIFAR10.sample("test")
    model = create_model(name, pretrained=True).eval()
    found = evaluate(fold_for_inference(model), test, Normalize(card.mean, card.std, torch.channels_last)).accuracy
    spread = (card.accuracy * (1 - card.accuracy) / len(test)) ** 0.5
    assert abs(found - card.accuracy) < 4 * spread
    assert card.classes == test.classes
    assert card.accuracy > 0.85


def test_the_file_is_small_half_precision_and_the_cards():
    for name in list_pretrained():
        path = pretrained.FOLDER / f"{name}.safetensors"
        assert path.stat().st_size < 15e6
        assert hashlib.sha256(path.read_bytes()).hexdigest() == model_card(name).sha256


@pytest.mark.parametrize("options", [{"num_classes": 5}, {"width": 0.5}, {"conv_bias": False}])
def test_options_of_other_shapes_are_refused(options):
    with pytest.raises(ValueError, match="fit its default options alone"):
        create_model("ran_compact", pretrained=True, **options)


def test_options_of_the_same_shapes_are_taken():
    assert create_model("ran_compact", pretrained=True, dropout=0.1).fc.out_features == 10


def test_a_network_without_weights_is_named():
    with pytest.raises(ValueError, match=r"no trained weights of 'ran_paper' .*; there are ran_compact"):
        create_model("ran_paper", pretrained=True)


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    for path in pretrained.FOLDER.iterdir():
        shutil.copy(path, tmp_path)
    weights = tmp_path / "ran_compact.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match=r"ran_compact\.safetensors is damaged \(sha256 .*install ran_ext again"):
        create_model("ran_compact", pretrained=True)


def test_the_command_prints_both_accuracies(capsys):
    assert command.main(["--data", "sample", "--folded"]) == 0
    said = capsys.readouterr().out
    assert "plain:    0." in said
    assert "of 512 test images" in said
    assert command.main(["--data", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err
