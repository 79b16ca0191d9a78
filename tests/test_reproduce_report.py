"""The report's experiment: its plan, its verdicts, how it is stopped and continued, and its page."""

import csv
import dataclasses
import doctest
import fcntl
import importlib
import json
import os
import re
from pathlib import Path

import pytest
import torch

from benchmarks.experiments import figures, runs
from benchmarks.experiments.claims import CLAIMS, Claim, Sample, claim_rows, joint_verdict
from benchmarks.experiments.outcomes import Outcome, Study
from benchmarks.experiments.page import Picture, Table
from benchmarks.experiments.plan import RAN_EXT, SCALES, VARIANTS, Run, plan
from benchmarks.experiments.runs import Deadline, Runner, Stopped, load_images
from benchmarks.experiments.sections import build
from scripts import reproduce_report

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    scale = dataclasses.replace(SCALES["smoke"], seeds=1, train_images=40, batch_size=20, val_images=20, test_images=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCALES, "smoke", scale)
        yield scale


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A folder in which the whole experiment ran, at its tiniest; once for all workers."""
    place = tmp_path_factory.getbasetemp()
    place = place.parent if "PYTEST_XDIST_WORKER" in os.environ else place
    out = place / "report"
    with open(place / "report.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "report.md").exists():
            assert reproduce_report.main(["--out", str(out), "--scale", "smoke", "--device", "cpu"]) == 0
    return out


@pytest.mark.parametrize("name", ["claims", "outcomes", "page", "plan", "tables"])
def test_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(f"benchmarks.experiments.{name}"))
    assert (failed, tried > 0) == (0, True)


@pytest.mark.parametrize("name", [name for name in SCALES if name != "short"])
def test_both_implementations_train_by_the_same_recipe(name):
    scale = SCALES[name]
    runs = plan(scale)
    assert len({run.name for run in runs}) == len(runs) == 2 * len(VARIANTS) * scale.seeds
    assert scale.seeds >= (2 if name == "smoke" else 3)
    assert {variant for claim in CLAIMS for variant in claim.needs} <= set(VARIANTS)
    for run in runs:
        ours, theirs = run.config(scale), run.recipe(scale)
        assert (ours.model, ours.model_options["width"], ours.weight_decay) == (theirs.network, theirs.width, theirs.l2)
        for field in ("optimizer", "lr", "epochs", "batch_size", "patience", "lr_step_epochs", "seed", "dropout"):
            assert getattr(ours, field) == getattr(theirs, field)
        assert (ours.augment == "report") == theirs.augment
        assert (ours.select, ours.dtype) == ("last", "float32")  # as the reference
        json.dumps(run.settings(scale))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.02, 0.03, 0.025), "reproduced"),
        ((-0.02, -0.03, -0.025), "refuted"),
        ((0.02, 0.03, -0.01), "not decided"),
        ((0.5,), "not decided"),
        (None, "not tested"),
    ],
)
def test_verdict_follows_from_the_interval(values, verdict):
    claim = Claim("5", "gain", "+0.024", ("compact", "base-adam"), max, low=0)
    assert claim.judge(Sample(values) if values else None) == verdict
    mirrored = dataclasses.replace(claim, low=-float("inf"), high=0)
    opposite = {"reproduced": "refuted", "refuted": "reproduced"}
    assert mirrored.judge(Sample(values) if values else None) == opposite.get(verdict, verdict)


def test_implementations_must_agree_on_a_verdict():
    assert joint_verdict(["refuted", "refuted"]) == "refuted"
    assert joint_verdict(["reproduced", "refuted"]) == "not decided"
    assert joint_verdict(["reproduced", "not decided"]) == "not decided"


def test_claims_are_measured_seed_by_seed(tiny, tmp_path):
    study = Study("subset", dataclasses.replace(tiny, sample=False), tmp_path, "cpu")
    for seed in range(3):
        for variant, right in (("base-adam", 50 + seed), ("base-nesterov", 20), ("compact", 53), ("paper", 54)):
            epochs = [{"seconds": 9.0, "val_accuracy": 0.1, "train_accuracy": right / 100}]
            confusion = [[right, 100 - right], [0, 0]]
            for implementation in ("ran_ext", "reference"):
                study.outcomes[Run(implementation, variant, seed)] = Outcome(5, "", epochs, confusion)
    del study.outcomes[Run("reference", "base-nesterov", 2)]
    verdicts = {row[1]: row[3:] for row in claim_rows(study)}
    row = verdicts["validation accuracy: Adam minus Nesterov SGD, base network"]
    assert [cell.replace("\u00a0", " ") for cell in row[:2]] == ["+0.305 ± 0.007 (n = 2)", "+0.310 ± 0.010 (n = 3)"]
    assert row[2] == "reproduced"
    assert verdicts["validation accuracy: compact (regularised) minus base"][2] == "not decided"  # +0.03, +0.02, +0.01
    assert verdicts["training time saved until convergence, compact against paper network"][2] == "refuted"
    assert verdicts["validation accuracy of the compact network"][2] == "not tested"
    assert len(verdicts) == len(CLAIMS) + 1


def test_page_needs_nothing_else(finished):
    page = (finished / "report.html").read_text()
    text = re.sub(r"data:image/png;base64,[\w+/=]+", "", page)
    assert not re.search(r"https?:|//\w|url\(|@import|<script|<link", text)
    sources = re.findall(r'(?:src|srcset)="([^"]*)"', page)
    drawn = sorted(path.stem for path in (finished / "figures").iterdir())
    assert {"figure4", "figure5", "figure6", "figure7", "confusion", "masks", "accuracy"} < set(drawn)
    assert len(sources) == 2 * len(drawn)  # on light and on dark ground
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert sorted(re.findall(r'alt="(\w+)"', page)) == drawn


def test_markdown_says_the_same(finished):
    text, page = (finished / "report.md").read_text(), (finished / "report.html").read_text()
    for path in re.findall(r"\]\(([^)]*)\)", text):
        assert (finished / path).read_bytes().startswith(b"\x89PNG")
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert titles == [re.sub("&#x27;", "'", title) for title in re.findall(r"<h[12]>(.*)</h[12]>", page)]
    assert "smaller runs than the report's" in text
    assert "| not tested |" in text
    assert "| reproduced |" in text  # the parameters


def test_tables_hold_a_row_a_run_and_a_row_an_epoch(finished):
    rows = list(csv.DictReader((finished / "runs.csv").open()))
    epochs = list(csv.DictReader((finished / "epochs.csv").open()))
    trained = [row for row in rows if not row["diverged"]]
    assert (len(rows), len(epochs)) == (10, 2 * len(trained))
    assert all(0 <= float(row["test_accuracy"]) <= 1 for row in trained)
    name = ("implementation", "variant", "seed")
    last = {tuple(row[key] for key in name): float(row["seconds"]) for row in epochs}
    assert last == {tuple(row[key] for key in name): float(row["seconds"]) for row in trained}


def test_ran_ext_alone_leaves_no_empty_panels(finished, tiny, monkeypatch):
    monkeypatch.setattr(
        figures, "render", lambda draw, dark: json.dumps([axis.get_title() for axis in draw().axes]).encode()
    )
    study = Study("short", dataclasses.replace(tiny, implementations=(RAN_EXT,)), finished, "cpu")
    assert {run.implementation for run in study.plan} == {RAN_EXT}
    assert not study.missing
    sections = {section.title: section.blocks for section in build(study, load_images(tiny, None))}
    assert "each trained by ran_ext alone" in sections["The report's experiment"][0]
    pictures = {part.name: part for blocks in sections.values() for part in blocks if isinstance(part, Picture)}
    assert "curves_reference" not in pictures
    assert all(
        json.loads(pictures[name].light) == ["ran_ext"] for name in ("figure4", "figure5", "figure7", "confusion")
    )
    assert [row[1] for row in next(part for part in sections["Figure 6: compact against paper network"]
            if isinstance(part, Table)).rows] == ["ran_ext", "ran_ext"]  # fmt: skip


def test_finished_runs_are_not_repeated(finished, tiny, monkeypatch):
    monkeypatch.setattr(runs, "fit", None)
    monkeypatch.setattr(runs.training, "train", None)
    study = Study("smoke", tiny, finished, "cpu")
    assert len(study.outcomes) == 10
    runs.Runner(study, None, CPU, runs.Deadline(None)).run_all()


def test_results_of_other_settings_are_refused(finished, tiny, monkeypatch, capsys):
    monkeypatch.setitem(SCALES, "smoke", dataclasses.replace(tiny, epochs=5))
    assert reproduce_report.main(["--out", str(finished), "--scale", "smoke", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "was computed with other settings" in error
    assert "recipe.epochs is 5 here and 2 there" in error
    assert "choose another --out, or delete" in error


def test_interrupted_run_continues(finished, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "render", lambda draw, dark: repr(draw()).encode())  # built, not painted
    command = ["--out", str(tmp_path), "--scale", "smoke", "--device", "cpu", "--minutes", "0"]
    first = tmp_path / "runs" / "ran_ext-base-adam-seed0"
    assert reproduce_report.main(command) == 0
    assert "10 of 10 runs remain; to continue: the same command" in capsys.readouterr().err
    assert [path.name for path in first.iterdir()] == ["last.pt"]
    assert reproduce_report.main(command) == 0  # its second and last epoch; then the next run begins
    assert "9 of 10 runs remain" in capsys.readouterr().err
    whole, parts = (Outcome.load(folder) for folder in (finished / "runs" / first.name, first))
    without_clock = [[row | {"seconds": 0} for row in outcome.epochs] for outcome in (whole, parts)]
    assert without_clock[0] == without_clock[1]
    assert whole.last_layer == parts.last_layer
    assert "Not finished: 1 of 10 runs are there." in (tmp_path / "report.md").read_text()


def test_a_run_of_the_reference_that_would_be_lost_is_not_begun(finished, tiny, monkeypatch):
    study = Study("smoke", tiny, finished, "cpu")
    run = next(run for run in study.plan if run.implementation == "reference")
    runner = Runner(study, None, CPU, Deadline(0))
    with pytest.raises(Stopped, match="must end within one call"):
        runner.train_reference(run)


@pytest.mark.parametrize("implementation", ["ran_ext", "reference"])
def test_a_diverging_run_is_recorded(implementation, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "base-adam", dataclasses.replace(VARIANTS["base-adam"], lr=1e30))
    study, run = Study("smoke", tiny, tmp_path, "cpu"), Run(implementation, "base-adam", 0)
    monkeypatch.setattr(study, "plan", [run])
    Runner(study, load_images(tiny, None), CPU, Deadline(None)).run_all()
    assert "loss" in study.outcomes[run].diverged
    assert study.of(implementation, "base-adam") == {}
    assert Study("smoke", tiny, tmp_path, "cpu").outcomes[run].diverged == study.outcomes[run].diverged


def test_ctrl_c_says_how_to_continue(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Runner, "run_all", interrupted)
    assert reproduce_report.main(["--out", str(tmp_path), "--scale", "smoke"]) == 130
    assert "interrupted; to continue: the same command again" in capsys.readouterr().err


def test_missing_images_are_named(tmp_path, capsys):
    missing = str(tmp_path / "nothing")
    assert reproduce_report.main(["--out", str(tmp_path / "out"), "--data", missing]) == 1
    assert f"to get it: python -m ran_ext.data.get_cifar10 --out {missing}" in capsys.readouterr().err
