"""The sample run's length: the largest scale that ends within ten minutes, said, kept, and chosen without a trace."""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import pytest
import torch

from benchmarks import sample_scales
from ran_ext.data import CIFAR10
from ran_ext.train import PRESETS, Config, Ranks, cli
from ran_ext.train.arguments import parse
from ran_ext.train.cli import choose_scale, expected_accuracy, run_seconds
from ran_ext.train.config import SCALES
from ran_ext.train.system import TrainingError

ALONE = Ranks(0, 1, torch.device("cpu"))
SAMPLE = dataclasses.replace(PRESETS["sample"], dtype="bfloat16")
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "cpu_sample_scales.json"


@pytest.fixture
def few_images(monkeypatch):
    """The embedded sample, cut down to 80 training and 30 test images, and scales of it that are quickly trained."""
    whole = CIFAR10.sample

    def few(split="train"):
        return whole(split).subset(torch.arange(80 if split == "train" else 30))

    monkeypatch.setattr(CIFAR10, "sample", staticmethod(few))
    for name, scale in SCALES.items():
        monkeypatch.setitem(SCALES, name, dataclasses.replace(scale, epochs=scale.epochs // 8, width=scale.width / 8))


def test_the_largest_scale_within_ten_minutes_is_taken():
    def taken(rate, narrow_rate):
        def seconds(config):
            rate_of = narrow_rate if config.model_options else rate
            return run_seconds(config, 1792, 256, rate_of)

        return choose_scale(SAMPLE, seconds)[0]

    # 20 epochs of 1,792 + 256 / 2 images: 38,400; 8 of them: 15,360
    assert taken(64.0, 0) == "full"
    assert taken(63.9, 0) == "short"
    assert taken(25.6, 0) == "short"
    assert taken(25.5, 80.0) == "small"
    assert taken(2.0, 6.0) == "small"  # the smallest, whatever it takes


def test_a_scale_sets_epochs_and_width_and_leaves_the_rest():
    config = dataclasses.replace(SAMPLE, model_options={"conv_bias": False, "width": 3.0}, seed=4)
    small, full = SCALES["small"].apply(config), SCALES["full"].apply(config)
    assert (small.epochs, small.model_options, small.seed) == (8, {"conv_bias": False, "width": 0.5}, 4)
    assert (full.epochs, full.model_options) == (20, {"conv_bias": False})
    assert SCALES["full"].apply(PRESETS["sample"]) == PRESETS["sample"]


def test_the_measured_rate_leaves_out_the_first_step_and_draws_no_numbers(monkeypatch):
    class Slow(torch.nn.Module):
        """0.3 s at its first call, 0.02 s at the others."""

        def __init__(self):
            super().__init__()
            self.dense, self.seconds = torch.nn.Linear(3072, 10), [0.3]

        def forward(self, images):
            time.sleep(self.seconds.pop() if self.seconds else 0.02)
            torch.rand(3)
            return self.dense(images.flatten(1))

    monkeypatch.setattr(Config, "create_model", lambda self: Slow())
    config = Config(batch_size=8, weight_decay=0.0, dtype="float32", augment="none")
    images = CIFAR10.sample("train").subset(torch.arange(64))
    before = torch.get_rng_state()
    rate = cli.images_per_second(config, images, ALONE, seconds=0.1)
    assert torch.equal(before, torch.get_rng_state())
    assert 8 / 0.3 < rate <= 8 / 0.02
    monkeypatch.setattr(cli, "LONG_STEP", 0.1)
    assert cli.images_per_second(config, images, ALONE, seconds=0.1) <= 8 / 0.3  # the first step was enough


def test_the_processes_rates_add_up(monkeypatch):
    monkeypatch.setattr(cli, "_step_seconds", lambda run, seconds: run.config.batch_size / 50.0)

    class Two(Ranks):
        def sum(self, values):
            return values * 2

    images = CIFAR10.sample("train").subset(torch.arange(16))
    config = Config(model_options={"width": 0.125}, batch_size=8, dtype="float32")
    assert cli.images_per_second(config, images, Two(0, 2, torch.device("cpu"))) == 100.0


FLAGS = ["--preset", "sample", "--data", "sample", "--device", "cpu", "--no-tensorboard", "--batch-size", "20"]
FLAGS += ["--val-images", "20"]


def test_a_run_says_its_scale_and_keeps_it_and_is_the_same_as_one_that_names_it(few_images, tmp_path, capsys):
    found, named = tmp_path / "found", tmp_path / "named"
    assert cli.main([*FLAGS, "--out", str(found)]) == 0  # 60 images, measured in earnest
    said = capsys.readouterr()
    assert "scale: full (2 epochs, width 0.125), about 0:0" in said.out
    assert "the largest that ends within 10 minutes here" in said.out
    assert "(auto: " in said.out  # the dtype
    assert cli.main([*FLAGS, "--scale", "full", "--out", str(named), "--quiet"]) == 0
    one, other = (json.loads((out / "result.json").read_text()) for out in (found, named))
    assert one["asked"] == {"dtype": "auto", "scale": "auto"}
    assert (one["scale"], other["scale"], other["asked"]["scale"]) == ("full", "full", "full")
    losses = [[(row["train_loss"], row["val_loss"]) for row in result["epochs"]] for result in (one, other)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert (one["config"], one["test"]["loss"]) == (other["config"], other["test"]["loss"])

    run = json.loads((found / "run.json").read_text())
    assert (run["scale"], run["asked"], run["config"]) == ("full", one["asked"], one["config"])
    resumed = parse(["--resume", "--out", str(found)])
    assert (resumed.config.to_dict(), resumed.scale, resumed.asked) == (run["config"], "full", run["asked"])
    assert parse(["--resume", "--out", str(found), "--dtype", "auto"]).config.dtype == run["config"]["dtype"]


def test_a_slow_machine_gets_the_small_run_and_hears_of_the_full_one(few_images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "images_per_second", lambda config, *rest: 0.1 / config.model_options["width"])
    monkeypatch.setitem(SCALES, "full", dataclasses.replace(SCALES["full"], width=0.5))
    monkeypatch.setitem(SCALES, "short", dataclasses.replace(SCALES["short"], epochs=2, width=0.5))
    assert cli.main([*FLAGS, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "scale: small (1 epochs, width 0.0625), about 0:44: the largest that ends within 10 minutes" in said
    assert "scale full (2 epochs, half width) would take about 11:40: ask for it by --scale full" in said
    assert json.loads((tmp_path / "result.json").read_text())["config"]["model_options"] == {"width": 0.0625}


def test_what_is_given_by_hand_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse([]).scale == "auto"
    assert parse(["--lr", "0.1"]).scale == "auto"
    for flags in (["--epochs", "3"], ["--model", "ran_base"], ["--model-option", "width=0.25"]):
        assert parse(flags).scale == ""
    small = parse(["--scale", "small", "--epochs", "3", "--model-option", "conv_bias=false"]).config
    assert (small.epochs, small.model_options) == (3, {"width": 0.5, "conv_bias": False})
    assert parse(["--scale", "short", "--data", "sample"]).config.epochs == 8
    assert parse(["--data", "sample", "--preset", "report"]).scale == ""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/last.pt").touch()
    assert parse(["--data", "sample", "--resume", "--out", "folder"]).scale == ""  # where nothing says what it was


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scale", "full", "--data", "images"], "--scale is for the embedded images and their preset"),
        (["--scale", "full", "--preset", "report"], "--scale is for the embedded images and their preset"),
        (["--scale", "auto", "--epochs", "3"], "--scale auto chooses the number of epochs: leave --epochs out"),
    ],
)
def test_a_scale_that_means_nothing_is_refused(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingError, match=message):
        parse(flags)


def test_resume_takes_no_scale(few_images, tmp_path):
    assert cli.main([*FLAGS, "--scale", "short", "--out", str(tmp_path), "--quiet"]) == 0
    with pytest.raises(TrainingError, match="takes the run's own settings: leave --scale out"):
        parse(["--resume", "--out", str(tmp_path), "--scale", "full"])


def test_the_accuracy_promised_is_that_of_the_runs_in_the_results():
    runs = json.loads(RESULTS.read_text())["rows"]
    for name, scale in SCALES.items():
        for dtype in ("bfloat16", "float32"):
            measured = [run for run in runs if (run["scale"], run["dtype"]) == (name, dtype)]
            assert scale.accuracy.get(dtype, ()) == tuple(run["test_accuracy"] for run in measured), (name, dtype)
            assert {(run["epochs"], run["width"]) for run in measured} <= {(scale.epochs, scale.width)}
            assert len({run["seed"] for run in measured}) == len(measured)
        assert scale.accuracy, name
    values = SCALES["full"].accuracy["bfloat16"]
    promised = expected_accuracy("full", dataclasses.replace(SAMPLE, seed=7))
    assert promised.startswith(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f} on the 512 test images")


def test_what_was_measured_in_the_other_dtype_alone_is_said_with_that_dtype(monkeypatch):
    monkeypatch.setitem(SCALES, "short", dataclasses.replace(SCALES["short"], accuracy={"float32": (0.25,)}))
    config = SCALES["short"].apply(SAMPLE)
    assert expected_accuracy("short", config) == "0.250 on the 512 test images (n = 1, float32)"


def test_the_accuracies_are_measured_run_by_run(few_images, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "sample", dataclasses.replace(SAMPLE, val_images=20, batch_size=20))
    flags = ["--scale", "small", "--dtype", "float32", "--seeds", "1", "--out", str(tmp_path / "runs.json")]
    assert sample_scales.main(flags) == 0
    (row,) = json.loads((tmp_path / "runs.json").read_text())["rows"]
    assert (row["scale"], row["dtype"], row["seed"], row["width"]) == ("small", "float32", 0, 0.0625)
    monkeypatch.setattr(sample_scales, "measure", None)
    assert sample_scales.main(flags) == 0  # none again
    assert f"small {{'float32': ({row['test_accuracy']},)}}" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"lr": 0.1}, {"epochs": 9}, {"model_options": {"width": 0.5}}])
def test_nothing_is_promised_of_another_recipe(change):
    assert expected_accuracy("full", SAMPLE)
    assert expected_accuracy("full", dataclasses.replace(SAMPLE, **change)) == ""


def test_the_limit_is_ten_minutes():
    assert cli.LIMIT == 600
