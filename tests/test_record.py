"""scripts/record.py: the rules of the record, seeds that are not repeated, the rehearsal; benchmarks/ledger.py."""

import dataclasses
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ran_ext
from ran_ext.data import sample
from ran_ext.train import Callback, load_checkpoint, load_model
from scripts import record

ROOT = Path(__file__).resolve().parent.parent

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(record.rehearsal(record.RECIPES["0.893"]), batch_size=32, dtype="float32")


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(record, "REHEARSAL_IMAGES", 128)


def quick(out, *flags):
    return record.main(["--quick", "--device", "cpu", "--out", str(out), *flags])


@pytest.mark.parametrize("name", record.RECIPES)
def test_recipes_keep_the_rules(name):
    config = record.RECIPES[name]
    assert (config.select, config.patience, config.val_images) == ("last", 0, 0)
    assert sum(p.numel() for p in config.create_model().parameters()) == 6_810_570


@pytest.mark.parametrize("target", record.RECIPES)
def test_the_rehearsal_runs_whole_and_says_so(few_images, tmp_path, capsys, target):
    assert quick(tmp_path, "--target", target, "--seeds", "1") == 0
    said = capsys.readouterr().out
    assert said.startswith(record.REHEARSAL)
    assert said.endswith(f"{record.REHEARSAL}\n")
    content = json.loads((tmp_path / f"{target}.json").read_text())
    assert content["settings"]["rehearsal"] == record.REHEARSAL
    assert content["environment"]["torch"] == torch.__version__
    (row,) = content["rows"]
    assert [epoch["epoch"] for epoch in row["epochs"]] == [1, 2]
    assert row["seconds"] > row["epochs"][-1]["seconds"]  # which has neither the weights' set-up nor the test
    assert [path.name for path in (tmp_path / target / "seed0").iterdir()] == ["model.pt"]


def test_finished_seeds_are_not_repeated_and_other_recipes_not_mixed(tmp_path, capsys, monkeypatch):
    seeds = []

    def measure(config, train_set, test_set, device, folder, step, curve):
        seeds.append(config.seed)
        folder.mkdir(parents=True)
        (folder / "last.pt").touch()
        return {"seed": config.seed, "accuracy": 0.5, "seconds": 1.0, "epoch_seconds": 0.5, "resumed": False}

    monkeypatch.setattr(record, "measure", measure)
    monkeypatch.setattr(record, "warm_up", lambda *arguments: None)
    flags = ["--target", "0.893", "--seeds"]
    assert [quick(tmp_path, *flags, count) for count in ("1", "3", "2")] == [0, 0, 0]
    assert seeds == [0, 1, 2]
    assert "| mean ± std, n = 2 |" in capsys.readouterr().out.rpartition("part 3 of 3")[2]
    assert quick(tmp_path, *flags, "3", "--epochs", "1") == 1
    assert "differs in recipe: give the same options again" in capsys.readouterr().err


def test_the_figure_is_the_final_epochs_with_the_mirror(tmp_path):
    train_set, test_set = sample("train").subset(torch.arange(96)), sample("test").subset(torch.arange(50))
    row = record.measure(CONFIG, train_set, test_set, CPU, tmp_path)
    model, normalize = load_model(tmp_path / "model.pt"), load_checkpoint(tmp_path / "model.pt")["normalize"]
    x = test_set.images * normalize["scale"] + normalize["offset"]
    with torch.no_grad():
        predicted = (model(x) + model(x.flip(3))).argmax(1)
    assert row["accuracy"] == pytest.approx((predicted == test_set.labels).double().mean().item())
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == CONFIG.epochs == len(row["epochs"])
    assert all(epoch["val_accuracy"] is None for epoch in row["epochs"])


def test_a_seed_cut_short_goes_on_and_its_clock_with_it(tmp_path, monkeypatch):
    train_set, test_set = sample("train").subset(torch.arange(96)), sample("test").subset(torch.arange(50))
    whole = record.measure(CONFIG, train_set, test_set, CPU, tmp_path / "whole")
    fit = record.fit

    class Stop(Callback):
        def on_epoch(self, figures, state):
            signal.raise_signal(signal.SIGINT)

    def cut_short(*arguments, callbacks, **options):
        return fit(*arguments, callbacks=[*callbacks, Stop()], **options)

    monkeypatch.setattr(record, "fit", cut_short)
    with pytest.raises(KeyboardInterrupt):
        record.measure(CONFIG, train_set, test_set, CPU, tmp_path / "cut")
    monkeypatch.setattr(record, "fit", fit)
    earlier = load_checkpoint(tmp_path / "cut" / "last.pt")["seconds"]
    row = record.measure(CONFIG, train_set, test_set, CPU, tmp_path / "cut")
    assert row["resumed"]
    assert not whole["resumed"]
    assert row["accuracy"] == whole["accuracy"]
    assert row["seconds"] > earlier + row["epochs"][1]["seconds"] - row["epochs"][0]["seconds"]


def test_the_warm_up_sees_other_labels_and_leaves_the_data_alone(monkeypatch):
    train_set, test_set = sample("train").subset(torch.arange(96)), sample("test").subset(torch.arange(50))
    labels = train_set.labels.clone()
    seen = []

    def fit(model, few, *rest, **options):
        seen.append((few, options["test_set"]))
        return SimpleNamespace(test=0.1)

    monkeypatch.setattr(record, "fit", fit)
    record.warm_up(CONFIG, train_set, test_set, CPU)
    ((few, tested),) = seen
    assert torch.equal(train_set.labels, labels)
    assert torch.equal(few.images, train_set.images)
    assert (few.labels == labels).double().mean() < 0.3
    assert tested is test_set


def test_ctrl_c_in_the_warm_up_ends_the_command(monkeypatch):
    monkeypatch.setattr(record, "fit", lambda *arguments, **options: SimpleNamespace(test=None))
    data = sample("test").subset(torch.arange(50))
    with pytest.raises(KeyboardInterrupt):
        record.warm_up(CONFIG, data, data, CPU)


def test_the_table_has_mean_deviation_and_the_references_ratio():
    rows = [
        {"seed": seed, "accuracy": 0.89 + seed / 100, "seconds": 10.0, "epoch_seconds": 1.0, "resumed": seed == 1}
        for seed in range(3)
    ]
    reference = {"seed": 0, "accuracy": 0.8, "seconds": 55.0, "epoch_seconds": 5.5}
    text = record.table({"ran_ext": rows, "reference": [reference]})
    assert "| ran_ext | mean ± std, n = 3 | 0.9000 ± 0.0100 | 10.00 ± 0.00 | 1.000 ± 0.000 |" in text
    assert "| ran_ext | 1 | 0.9000 | 10.00 (resumed) | 1.000 |" in text
    assert "| reference | 0 | 0.8000 | 55.00 | 5.500 |" in text
    assert "An epoch of reference takes 5.50 times as long as one of ran_ext." in text


def test_contenders_have_the_same_batches_and_their_own_backend(few_images, tmp_path, capsys, monkeypatch):
    said, fit = [], record.fit

    def watched(*arguments, **options):
        if not options.get("quiet"):
            said.append((ran_ext.get_backend(), options["step"]))
        return fit(*arguments, **options)

    monkeypatch.setattr(record, "fit", watched)
    flags = ["--target", "0.893", "--seeds", "1", "--curve", "--contender"]
    assert quick(tmp_path, *flags, "ran_ext", "eager", "reference") == 0
    assert said == [("auto", "auto"), ("reference", "eager")]
    rows = {
        name: json.loads((tmp_path / f"0.893{name}.json").read_text())["rows"][0]
        for name in ("", "_eager", "_reference")
    }
    first, second = (rows[name]["epochs"][0]["train_loss"] for name in ("", "_eager"))
    assert first == pytest.approx(second, rel=0.05)  # the same weights and batches, up to rounding
    assert all(epoch["val_accuracy"] > 0 for row in rows.values() for epoch in row["epochs"])
    for name in ("", "_eager"):  # the last epoch's weights are those of the result
        assert rows[name]["accuracy"] == rows[name]["epochs"][-1]["val_accuracy"] > 0
        assert [path.name for path in (tmp_path / f"0.893{name}" / "seed0").iterdir()] == ["model.pt"]
    text = capsys.readouterr().out
    assert "An epoch of eager takes" in text
    assert (tmp_path / "0.893.png").stat().st_size > 10_000
    assert quick(tmp_path, *flags, "eager") == 0  # all is there
    assert len(said) == 2


def test_the_reference_trains_as_many_epochs_in_its_own_way(capsys):
    train_set, test_set = sample("train").subset(torch.arange(96)), sample("test").subset(torch.arange(50))
    row = record.measure_reference(CONFIG, train_set, test_set, CPU)
    assert [figures["epoch"] for figures in row["epochs"]] == [1, 2]
    assert row["accuracy"] == row["epochs"][1]["val_accuracy"]
    assert row["epoch_seconds"] == row["seconds"] / 2 == row["epochs"][1]["seconds"] / 2
    assert "reference, epoch 2/2: accuracy " in capsys.readouterr().out


def test_misuse_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        quick(tmp_path, "--target", "best", "--contender", "reference")
    assert "--contender reference goes with --target 0.893" in capsys.readouterr().err
    assert record.main(["--target", "best", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("record: error: ")


def test_a_damaged_ledger_is_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"rows\.json is damaged .*delete it and measure anew"):
        record.Ledger(path, {}, {})
