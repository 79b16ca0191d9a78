"""The command: what it writes and says, how it is interrupted, continued and misused."""

import ast
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import ran_ext
from ran_ext.data import CIFAR10, Batches
from ran_ext.train import PRESETS, Config, Ranks, cli, load_checkpoint
from ran_ext.train import arguments as train_arguments
from ran_ext.train.arguments import parse

SMALL = ["--data", "sample", "--preset", "sample", "--model-option", "width=0.125", "--device", "cpu"]


@pytest.fixture
def few_images(monkeypatch):
    """The embedded sample, cut down to 80 training and 30 test images."""
    whole = CIFAR10.sample

    def few(split="train"):
        return whole(split).subset(torch.arange(80 if split == "train" else 30))

    monkeypatch.setattr(CIFAR10, "sample", staticmethod(few))


def test_a_run_leaves_its_figures_its_curves_and_tensorboard(few_images, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main([*SMALL, "--epochs", "2", "--batch-size", "20", "--val-images", "20", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "data: embedded sample: 60 training, 20 validation, 30 test images, 10 classes, 3x32x32" in said.out
    for row in (
        "112,858 parameters",
        "epochs     2 of 2 (all); figures of epoch 2 (last)",
        "test       loss",
        "curves.png",
    ):
        assert row in said.out
    assert "epoch 2/2: training loss" in said.err

    result = json.loads((out / "result.json").read_text())
    assert Config.from_dict(result["config"]).model_options == {"width": 0.125}
    assert [row["epoch"] for row in result["epochs"]] == [1, 2]
    assert result["environment"]["torch"] == torch.__version__
    assert result["step"] == "eager"
    assert sum(map(sum, result["test"]["confusion"])) == 30
    assert 0 < result["epochs"][0]["seconds"] < result["wall_seconds"]
    assert Image.open(out / "curves.png").size[0] > 1000
    check_tensorboard(out / "tensorboard", result)


def check_tensorboard(folder, result):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(run):
        events = EventAccumulator(str(folder / run))
        events.Reload()
        return events

    def points(run, tag):
        return [(event.step, event.value) for event in read(run).Scalars(tag)]

    steps = points("steps", "by step/loss")
    assert [step for step, _ in steps] == list(range(6))
    mean = sum(value for _, value in steps[:3]) / 3
    assert mean == pytest.approx(result["epochs"][0]["train_loss"], rel=1e-5)
    for run, part, column in (
        ("training", "loss", "train_loss"),
        ("training", "accuracy", "train_accuracy"),
        ("training", "learning rate", "lr"),
        ("training", "images per second", "images_per_second"),
        ("training", "wall seconds", "seconds"),
        ("validation", "loss", "val_loss"),
        ("validation", "accuracy", "val_accuracy"),
    ):
        wanted = [(row["epoch"], pytest.approx(row[column], rel=1e-5)) for row in result["epochs"]]
        assert points(run, f"by epoch/{part}") == wanted
    assert points("test", "by epoch/accuracy") == [(2, pytest.approx(result["test"]["accuracy"], rel=1e-5))]
    assert read("training").Tags()["histograms"] == ["last layer/weight"]
    test = read("test")
    assert test.Tags()["images"] == ["attention/stage1.1.gate", "attention/stage2.1.gate"]
    settings = test.SummaryMetadata("_hparams_/session_start_info")
    assert b"label_smoothing" in settings.plugin_data.content


#: The command in a process of its own, on the same few images as `few_images`.
PROGRAM = """
import sys, torch
from ran_ext.data import CIFAR10, Batches
from ran_ext.train.cli import main
whole = CIFAR10.sample
CIFAR10.sample = staticmethod(lambda split="train": whole(split).subset(torch.arange(80 if split == "train" else 30)))
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_stops_with_a_checkpoint_and_resume_goes_on(few_images, tmp_path):
    out = tmp_path / "run"
    flags = [
        *SMALL,
        "--epochs",
        "15",
        "--batch-size",
        "20",
        "--val-images",
        "20",
        "--no-tensorboard",
        "--dtype",
        "float32",
        "--out",
        str(out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", PROGRAM, *flags]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while not (out / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "stopping after this step" in errors
    assert f"--resume --out {out}" in errors
    assert "Traceback" not in errors
    assert json.loads((out / "result.json").read_text())["interrupted"]
    done = load_checkpoint(out / "last.pt")["epoch"]
    assert 1 <= done < 15

    assert cli.main(["--resume", "--out", str(out), "--device", "cpu", "--no-tensorboard", "--quiet"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert [row["epoch"] for row in result["epochs"]] == list(range(1, 16))
    assert not result["interrupted"]


def test_resume_keeps_the_runs_settings_and_refuses_others(few_images, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--epochs", "1", "--batch-size", "20", "--val-images", "20", "--out", str(out), "--quiet"]
    assert cli.main([*SMALL, *flags]) == 0
    capsys.readouterr()
    assert parse(["--resume", "--out", str(out)]).config == parse([*SMALL, *flags[:-1], "--resume"][4:]).config
    assert cli.main(["--resume", "--out", str(out), "--lr", "0.5", "--quiet"]) == 1
    said = capsys.readouterr().err
    assert "error: the checkpoint belongs to another run: lr is 0.5 here and 0.002 there" in said
    assert said.count("\n") == 1
    assert cli.main([*SMALL, *flags]) == 1
    assert "holds a run already: add --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume"], "--resume needs --out"),
        (["--data", "sample", "--epochs", "0"], "epochs must be a whole number >= 1"),
        (["--data", "sample", "--val-images", "5000"], "count must be 0, or from 10, one of each class, to 2038"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--data", "sample", "--device", "abacus"], "no device named 'abacus'"),
        (["--data", "sample", "--device", "meta"], "device meta cannot be used here"),
        (["--data", "sample", "--device", "xpu"], "device xpu cannot be used here"),
        (["--data", "sample", "--device", "vulkan"], "device vulkan cannot be used here"),
        (["--data", "sample", "--model-option", "num_classes=3"], "num_classes must be 10, the classes of sample"),
        (["--data", "sample", "--model-option", "attention=no"], "attention must be true or false, got 'no'"),
        (["--data", "sample", "--model-option", "width=1e6"], " parameters, which take "),
        (["--data", "sample", "--model-option", "width=1e300"], "model_options do not fit ran_compact"),
        (["--data", "sample", "--model-option", "width=wide"], "model_options do not fit ran_compact"),
        (["--data", "sample", "--model-option", "in_channels=1"], "in_channels must be 3, the channels of the"),
        (["--data", "sample", "--out", 300 * "x"], "File name too long"),
        (["--data", "sample", "--out", "/dev/null"], "/dev/null"),
        (["--data", "sample", "--out", "/proc/none"], "/proc/none"),
        (["--data", "sample", "--seed", str(2**70)], "seed must be a whole number >= 0"),
        (["--data", "sample", "--lr", "1e999"], "lr must be positive"),
        (["--data", "sample", "--momentum", "0.5"], "--momentum has no effect where optimizer is 'adam'"),
        (["--data", "sample", "--warmup", "0.5", "--schedule", "step"], "--warmup has no effect where schedule is"),
        (["--data", "sample", "--protocol", "report", "--val-images", "9"], "--val-images has no effect where"),
        (["--data", "sample", "--checkpoint-every", "0"], "--checkpoint-every must be at least 1"),
        (["--data", "sample", "--val-images", "0", "--select", "best"], "without val_set"),
        (["--data", "sample", "--model-option", "depth=3"], "model_options do not fit ran_compact"),
    ],
)
def test_a_misuse_is_one_line_and_status_1(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*flags, "--quiet"]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("ran-ext-train: error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--epoch", "2"], "unrecognized arguments: --epoch 2; did you mean --epochs?"),
        (["--num-classes", "5"], "--num-classes: it is an option of the network, --model-option num_classes=VALUE"),
        (["--width=0.5"], "it is an option of the network, --model-option width=VALUE"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--epochs", "two"], "argument --epochs: invalid int value: 'two'"),
    ],
)
def test_a_flag_that_there_is_not_is_one_line_and_status_2(flags, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(flags)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("ran-ext-train: error: ")
    assert hint in said
    assert said.count("\n") == 1


def test_no_command_takes_an_abbreviation():
    """Every parser in the package is our own, or says so itself."""
    root, parsers = Path(__file__).resolve().parent.parent, 0
    for path in sorted(path for path in root.glob("[!.]*/**/*.py") if not path.is_relative_to(root / "build")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "ArgumentParser":
                parsers += 1
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("allow_abbrev") == "False", path
    assert parsers


def test_a_run_interrupted_in_its_first_epoch_warns_of_nothing(few_images, tmp_path, capsys, recwarn, monkeypatch):
    load = Batches.load

    def load_and_interrupt(self, *plan):
        signal.raise_signal(signal.SIGINT)
        return load(self, *plan)

    monkeypatch.setattr(Batches, "load", load_and_interrupt)
    out = tmp_path / "run"
    assert cli.main([*SMALL, "--batch-size", "20", "--val-images", "20", "--no-tensorboard", "--out", str(out)]) == 130
    assert "epochs     0 of 20 (interrupted)" in capsys.readouterr().out
    assert not (out / "curves.png").exists()
    assert [str(warning.message) for warning in recwarn] == []


def test_the_data_is_the_folder_where_there_is_one_else_the_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = parse([])
    assert (alone.data, alone.config) == ("sample", PRESETS["sample"])
    assert "there is no folder data" in alone.chose_data
    (tmp_path / "data").mkdir()
    found = parse([])
    assert (found.data, found.config) == ("data", Config())
    assert parse(["--preset", "sample"]).data == "sample"
    assert parse(["--data", "sample", "--preset", "report"]).config == Config()


def test_protocols_split_the_images_as_they_say():
    holdout = cli.load_data("sample", Config(val_images=256))
    assert [len(part) for part in holdout] == [1792, 256, 512]
    train, val, test = cli.load_data("sample", Config(protocol="report"))
    assert (len(train), len(test)) == (2048, 512)
    assert val is test
    assert cli.load_data("sample", Config(val_images=0))[1] is None


def test_every_field_of_the_recipe_has_a_flag_with_its_explanation():
    docs = train_arguments._field_docs()
    assert list(docs) == [field.name for field in dataclasses.fields(Config)]
    assert all(len(text) > 3 for text in docs.values())
    assert "``" not in "".join(docs.values())
    options = parse(
        ["--data", "sample", "--no-channels-last", "--dropout", "0.25", "--model-option", "conv_bias=false"]
    )
    assert options.config.channels_last is False
    assert options.config.dropout == 0.25
    assert options.config.model_options == {"conv_bias": False}


def test_missing_tensorboard_and_matplotlib_cost_one_line_each(few_images, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    flags = ["--epochs", "1", "--batch-size", "40", "--val-images", "20", "--out", str(tmp_path / "run"), "--quiet"]
    assert cli.main([*SMALL, *flags]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "no TensorBoard files: pip install tensorboard",
        "no curves.png: pip install matplotlib",
    ]
    assert (tmp_path / "run" / "result.json").exists()


def test_a_full_disk_at_the_end_is_one_line(few_images, tmp_path, capsys, full_disk, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(cli, "result_dict", lambda *values: full_disk(True) or {})
    flags = ["--epochs", "1", "--batch-size", "40", "--val-images", "20", "--out", str(out), "--quiet"]
    assert cli.main([*SMALL, *flags]) == 1
    assert "cannot write" in (said := capsys.readouterr().err)
    assert "the disk is full" in said


def test_environment_says_which_backend_runs():
    from ran_ext import set_backend
    from ran_ext.train.system import environment

    with set_backend("reference"):
        facts = environment(Ranks(0, 1, torch.device("cpu")))
    assert facts["backend"] == "reference"
    assert facts["device"] == "cpu"
    assert facts["threads"] == torch.get_num_threads()


def test_settings_come_from_a_file_and_flags_come_before_them(few_images, tmp_path):
    (tmp_path / "mine.toml").write_text("epochs = 3\nlr = 0.5\nmodel_options = {width = 0.25, conv_bias = false}\n")
    flags = ["--data", "sample", "--out", str(tmp_path / "run"), "--config", str(tmp_path / "mine.toml")]
    options = parse([*flags, "--lr", "0.25", "--model-option", "width=0.125"])
    assert (options.config.epochs, options.config.lr) == (3, 0.25)
    assert options.config.model_options == {"width": 0.125, "conv_bias": False}
    assert options.config.batch_size == PRESETS["sample"].batch_size
    assert options.scale == ""

    run = {"data": "sample", "config": options.config.to_dict()}
    (tmp_path / "run.json").write_text(json.dumps(run))
    flags[-1] = str(tmp_path / "run.json")
    assert parse(flags).config == options.config


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "epochs = 3", "is no JSON (name it .toml where it is TOML)"),
        ("a.toml", "epochs: 3", "is no TOML"),
        ("a.json", "[3]", "must hold an object of settings, got list"),
        ("a.json", '{"epoch": 3}', "no field named 'epoch'; did you mean 'epochs'?"),
        ("a.json", '{"epochs": 0}', "epochs must be a whole number >= 1, got 0"),
    ],
)
def test_a_file_of_settings_that_will_not_do_is_one_line(name, text, message, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert cli.main(["--config", str(tmp_path / name), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_help_is_one_screen_and_help_all_has_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for flag in ("--help", "--help-all", "--version"):
        with pytest.raises(SystemExit) as stop:
            cli.main([flag])
        assert stop.value.code == 0
        said = capsys.readouterr().out
        flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Config)} - {"--model-options"}
        if flag == "--help":
            assert len(said.splitlines()) <= 50
        elif flag == "--help-all":
            assert all(name in said for name in flags | {"--model-option", "--step"})
        else:
            assert said == f"ran_ext {ran_ext.__version__}, torch {torch.__version__}\n"
