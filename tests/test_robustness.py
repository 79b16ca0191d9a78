"""scripts/robustness.py and benchmarks/corrupted.py: the rehearsal, checkpoints given, differences and verdicts."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.corrupted import ALL, ATTENTION, LESS_CLEAN, TRUNK, Difference, Seed, conclusion, differences, table
from ran_ext.data import CORRUPTIONS, corrupt, sample
from ran_ext.train import Config, evaluate, load_checkpoint, load_model, load_normalize
from scripts import robustness

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The folder of a rehearsal with one seed."""
    out = tmp_path_factory.mktemp("robustness")
    patch = pytest.MonkeyPatch()
    patch.setitem(robustness.SCALES, "quick", robustness.Scale(128, 40, 0.125, 1, 1))
    assert robustness.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    yield out
    patch.undo()


def test_the_rehearsal_leaves_rows_table_and_figure(rehearsed):
    content = json.loads((rehearsed / "robustness.json").read_text())
    assert content["settings"]["rehearsal"]
    assert [(row["network"], row["seed"]) for row in content["rows"]] == [(ATTENTION, 0), (TRUNK, 0)]
    for row in content["rows"]:
        assert set(row["corrupted"]) == set(CORRUPTIONS)
        assert all(len(values) == 5 for values in row["corrupted"].values())
    text = (rehearsed / "robustness.md").read_text()
    assert text.startswith("REHEARSAL, the figures mean nothing")
    assert "Attention helps with corrupted images: undecided" in text
    assert Image.open(rehearsed / "robustness.png").size[0] > 1000


def test_the_two_networks_differ_in_the_masks_alone():
    one, other = (robustness.config_of(robustness.SCALES["subset"], network, 3) for network in (ATTENTION, TRUNK))
    assert len(one.differences(other)) == 1
    assert other.model_options == {**one.model_options, "attention": False}
    counts = [sum(p.numel() for p in config.create_model().parameters()) for config in (one, other)]
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


def test_finished_parts_are_not_repeated(rehearsed, monkeypatch, capsys):
    before = (rehearsed / "robustness.json").read_bytes()
    monkeypatch.setattr(robustness, "fit", None)
    assert robustness.main(["--quick", "--device", "cpu", "--out", str(rehearsed)]) == 0
    assert "part" not in capsys.readouterr().out
    assert (rehearsed / "robustness.json").read_bytes() == before


def test_missing_matplotlib_costs_the_figure_alone(rehearsed, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert robustness.main(["--quick", "--device", "cpu", "--out", str(rehearsed)]) == 0
    assert capsys.readouterr().err == "no robustness.png: pip install matplotlib\n"


def test_checkpoints_given_are_tested_alike_and_told_apart(rehearsed, tmp_path, monkeypatch):
    paths = sorted(str(path) for path in rehearsed.glob("*/seed0/model.pt"))
    monkeypatch.setattr(robustness, "fit", None)
    assert robustness.main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--checkpoint", *paths]) == 0
    trained, given = (json.loads((folder / "robustness.json").read_text())["rows"] for folder in (rehearsed, tmp_path))
    assert [row["network"] for row in given] == [ATTENTION, TRUNK]
    assert [row["corrupted"] for row in given] == [row["corrupted"] for row in trained]


def test_accuracies_are_those_of_the_corrupted_images(rehearsed):
    checkpoint = rehearsed / "attention" / "seed0" / "model.pt"
    test_set = sample("test").subset(torch.arange(40))
    found = robustness.accuracies(checkpoint, test_set, torch.device("cpu"))
    model, normalize = load_model(checkpoint), load_normalize(checkpoint, torch.channels_last)
    dtype = Config.from_dict(load_checkpoint(checkpoint)["config"]).torch_dtype
    clean = evaluate(model, test_set, normalize, dtype=dtype).accuracy
    test_set.images = corrupt(test_set.images, "contrast", 5)
    low = evaluate(model, test_set, normalize, dtype=dtype).accuracy
    assert (found["clean"], found["corrupted"]["contrast"][4]) == (clean, low)


def test_a_foreign_checkpoint_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(robustness, "load_config", lambda path: Config(model="ran_paper"))
    flags = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--checkpoint", "x.pt"]
    assert robustness.main(flags) == 1
    assert "robustness: error: --checkpoint takes ran_compact" in capsys.readouterr().err


def seeds_of(network, values, clean=0.9):
    """Networks whose mean under every corruption is one of ``values``."""
    fall = (0.1, 0.05, 0, -0.05, -0.1)
    return [
        Seed(network, seed, clean, {name: [value + step for step in fall] for name in CORRUPTIONS})
        for seed, value in enumerate(values)
    ]


def test_a_difference_has_students_interval():
    found = Difference.of([0.70, 0.72, 0.74], [0.60, 0.64, 0.68, 0.72])
    error = math.sqrt(0.02**2 / 3 + (0.04**2 * 5 / 3) / 4)
    assert found.value == pytest.approx(0.06)
    assert found.half_width == pytest.approx(4.303 * error, rel=1e-3)


@pytest.mark.parametrize(
    ("attention", "trunk", "verdict"),
    [
        ((0.60, 0.61, 0.62), (0.50, 0.51, 0.52), "reproduced"),
        ((0.50, 0.51, 0.52), (0.60, 0.61, 0.62), "refuted"),
        ((0.600, 0.601, 0.602), (0.600, 0.601, 0.602), "refuted"),  # no difference worth the name
        ((0.50, 0.55, 0.60), (0.50, 0.54, 0.60), "undecided"),
        ((0.60,), (0.50,), "undecided"),  # a single seed shows nothing
    ],
)
def test_the_verdict_follows_from_the_numbers(attention, trunk, verdict):
    seeds = seeds_of(ATTENTION, attention) + seeds_of(TRUNK, trunk)
    assert differences(seeds)[ALL].verdict == verdict
    assert f"Attention helps with corrupted images: {verdict}" in conclusion(seeds)


def test_help_with_clean_images_is_told_from_robustness():
    seeds = seeds_of(ATTENTION, (0.70, 0.71, 0.72), clean=0.95) + seeds_of(TRUNK, (0.60, 0.61, 0.62), clean=0.80)
    found = differences(seeds)
    assert (found[ALL].verdict, found[LESS_CLEAN].verdict) == ("reproduced", "refuted")
    assert found[LESS_CLEAN].value == pytest.approx(-0.05)


def test_the_table_shows_one_network_alone_without_a_verdict():
    text = table(seeds_of(TRUNK, (0.6, 0.7)))
    assert "| blur | trunk only | 0.900 ± 0.000 | 0.750 ± 0.071 |" in text
    assert "attention" not in text
