"""Whole runs on a few images: selection, stopping, resuming bit for bit, and what goes wrong on the way."""

import dataclasses
import functools
import math
import signal

import pytest
import torch

from ran_ext.data import CIFAR10
from ran_ext.train import (
    Callback,
    CheckpointError,
    Config,
    NonFiniteError,
    OutOfMemoryError,
    evaluate,
    fit,
    load_checkpoint,
    load_model,
    load_normalize,
)

#: Everything that has a state or draws numbers: dropout, augmentation, shuffling, momentum, average, schedule.
CONFIG = Config(
    model_options={"width": 0.125},
    dropout=0.3,
    schedule="onecycle",
    lr=5e-3,
    batch_size=8,
    epochs=3,
    patience=0,
    ema=0.9,
    dtype="float32",
    channels_last=True,
)


@pytest.fixture(scope="module")
def images():
    return CIFAR10.sample("train").subset(torch.arange(40))


@pytest.fixture(scope="module")
def val_images():
    return CIFAR10.sample("test").subset(torch.arange(30))


class InterruptAt(Callback):
    """Sends SIGINT to this process when the run has reached a step."""

    def __init__(self, step):
        self.step = step

    def on_steps(self, first, rows, images_per_second):
        if first <= self.step < first + len(rows):
            signal.raise_signal(signal.SIGINT)


def run(train_set, val_set, config, out, **options):
    torch.manual_seed(config.seed)
    return fit(config.create_model(), train_set, val_set, config, out, quiet=True, **options)


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for key in one:
        if key == "seconds":
            continue
        if key == "figures":
            timeless = [
                [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in state[key]]
                for state in (one, other)
            ]
            assert timeless[0] == timeless[1]
        else:
            assert_equal(one[key], other[key], key)


def assert_equal(one, other, where):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_equal(mine, theirs, f"{where}[{index}]")
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def whole_run(images, val_images, tmp_path_factory):
    """An uninterrupted run with an optimizer, and its folder."""

    @functools.cache
    def trained(optimizer):
        out = tmp_path_factory.mktemp("whole")
        return run(images, val_images, dataclasses.replace(CONFIG, optimizer=optimizer), out, test_set=val_images), out

    return trained


@pytest.fixture(scope="module")
def uninterrupted(whole_run):
    return whole_run(CONFIG.optimizer)


@pytest.mark.parametrize("optimizer", ["adam", "nesterov", "muon"])
@pytest.mark.parametrize("step", [6, 9])  # within the second epoch, and at its end
def test_resume_continues_bit_for_bit(images, val_images, whole_run, tmp_path, monkeypatch, optimizer, step):
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    whole, whole_out = whole_run(optimizer)
    monkeypatch.setattr("ran_ext.train.report.Progress.due", True)  # so that the callback sees every step at once
    out = tmp_path / "cut"
    cut = run(images, val_images, config, out, callbacks=[InterruptAt(step)], test_set=val_images)
    assert cut.interrupted
    assert cut.test is None
    state = load_checkpoint(out / "last.pt")
    assert state["epoch"] * 5 + len(state["history"]) in (step + 1, step + 2)
    torch.manual_seed(99)  # a new process has drawn other numbers
    resumed = run(images, val_images, config, out, resume=True, test_set=val_images)
    assert not resumed.interrupted
    assert_same_state(load_checkpoint(out / "last.pt"), load_checkpoint(whole_out / "last.pt"))
    assert_equal(load_checkpoint(out / "model.pt")["model"], load_checkpoint(whole_out / "model.pt")["model"], "model")
    assert resumed.test.loss == whole.test.loss
    assert resumed.selected_epoch == whole.selected_epoch


def test_same_seed_same_run_other_seed_other_run(images, val_images, uninterrupted, tmp_path):
    again = run(images, val_images, CONFIG, tmp_path / "again")
    assert [row.train_loss for row in again.figures] == [row.train_loss for row in uninterrupted[0].figures]
    other = run(images, val_images, dataclasses.replace(CONFIG, seed=1, epochs=1), tmp_path / "other")
    assert other.figures[0].train_loss != again.figures[0].train_loss


def test_a_finished_run_resumes_to_the_same_result(images, val_images, uninterrupted):
    whole, out = uninterrupted
    again = run(images, val_images, CONFIG, out, resume=True, test_set=val_images)
    assert again.figures == whole.figures
    assert again.test.loss == whole.test.loss
    assert again.seconds == whole.seconds


def test_mixup_cutout_and_the_mirror_reach_the_run_and_resume(images, val_images, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, epochs=2, augment="standard", cutout=8, mixup=True, test_mirror=True)
    whole = run(images, val_images, config, tmp_path / "whole")
    plain = run(images, val_images, dataclasses.replace(config, mixup=False), tmp_path / "plain")
    assert whole.figures[0].train_loss != plain.figures[0].train_loss
    normalize = load_normalize(tmp_path / "whole" / "last.pt", torch.channels_last)
    found = evaluate(load_model(tmp_path / "whole" / "last.pt"), val_images, normalize, mirror=True)
    assert whole.figures[-1].val_loss == pytest.approx(found.loss, rel=1e-6)
    monkeypatch.setattr("ran_ext.train.report.Progress.due", True)
    run(images, val_images, config, tmp_path / "cut", callbacks=[InterruptAt(1)])
    resumed = run(images, val_images, config, tmp_path / "cut", resume=True)
    assert [row.train_loss for row in resumed.figures] == [row.train_loss for row in whole.figures]


def test_model_pt_holds_the_best_epoch_and_loads_by_itself(images, val_images, uninterrupted):
    whole, out = uninterrupted
    accuracies = [row.val_accuracy for row in whole.figures]
    assert whole.selected_epoch == whole.best_epoch == accuracies.index(max(accuracies)) + 1
    normalize = load_normalize(out / "model.pt", torch.channels_last)
    found = evaluate(load_model(out / "model.pt"), val_images, normalize)
    row = whole.figures[whole.selected_epoch - 1]
    assert found.accuracy == row.val_accuracy == whole.test.accuracy
    assert found.loss == pytest.approx(row.val_loss, rel=1e-6)


def test_load_model_takes_the_average_of_last_pt(uninterrupted):
    out = uninterrupted[1]
    state = load_checkpoint(out / "last.pt")
    assert_equal(dict(load_model(out / "last.pt").state_dict()), dict(state["ema"]["average"]), "average")
    assert not torch.equal(state["model"]["fc.weight"], state["ema"]["average"]["fc.weight"])


def test_load_model_names_a_foreign_model(uninterrupted, tmp_path):
    state = torch.load(uninterrupted[1] / "model.pt", weights_only=True)
    state["config"]["model_options"] = {"width": 0.25}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="holds weights of another model"):
        load_model(tmp_path / "model.pt")


def test_training_learns(images, tmp_path):
    config = Config(model_options={"width": 0.125}, dropout=0.0, batch_size=8, epochs=12, augment="none", patience=0)
    result = run(images, images, config, tmp_path)
    assert result.figures[-1].train_loss < 0.6 * result.figures[0].train_loss


def test_early_stopping_counts_on_over_an_interruption(images, val_images, tmp_path):
    # nothing is learnt, so the first epoch stays the best
    config = Config(model_options={"width": 0.125}, batch_size=40, epochs=30, patience=4, lr=1e-12, schedule="constant")
    cut = run(images, val_images, config, tmp_path, callbacks=[InterruptAt(2)])
    assert cut.interrupted
    assert not cut.stopped_early
    result = run(images, val_images, config, tmp_path, resume=True)
    assert result.stopped_early
    assert result.best_epoch + 4 == len(result.figures) < 30


def test_without_validation_the_last_epoch_is_kept(images, tmp_path):
    config = Config(model_options={"width": 0.125}, batch_size=20, epochs=2, patience=0, select="last")
    result = run(images, None, config, tmp_path, test_set=images)
    assert result.figures[0].val_accuracy is None
    assert (result.best_epoch, result.selected_epoch) == (None, 2)
    assert math.isfinite(result.test.loss)
    with pytest.raises(ValueError, match="without val_set"):
        run(images, None, dataclasses.replace(config, patience=3), tmp_path)


def test_a_resumed_run_names_the_field_that_differs(images, val_images, uninterrupted):
    out = uninterrupted[1]
    before = (out / "last.pt").read_bytes()
    with pytest.raises(CheckpointError, match=r"another run: batch_size is 4 here and 8 there; resume with"):
        run(images, val_images, dataclasses.replace(CONFIG, batch_size=4), out, resume=True)
    with pytest.raises(CheckpointError, match="the training set has 32 images here and 40 there"):
        run(images.subset(torch.arange(32)), val_images, CONFIG, out, resume=True)
    assert (out / "last.pt").read_bytes() == before


def test_nan_ends_the_run_and_keeps_the_last_good_checkpoint(images, val_images, tmp_path):
    def poisoned(step):
        calls = 0

        def call(images, labels):
            nonlocal calls
            calls += 1
            return step(images * float("nan") if calls == 8 else images, labels)

        return call

    with pytest.raises(
        NonFiniteError, match=r"the loss is nan at step 3 of epoch 2: train anew with a lower --lr"
    ) as error:
        run(images, val_images, CONFIG, tmp_path, make_step=poisoned)
    assert "last.pt holds the last good state" in str(error.value)
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_learning_rate_far_too_high_is_found_out(images, val_images, tmp_path):
    config = Config(model_options={"width": 0.125}, optimizer="nesterov", lr=1e30, batch_size=20, epochs=3)
    with pytest.raises(NonFiniteError, match="lower --lr"):
        run(images, val_images, config, tmp_path)
    assert not (tmp_path / "last.pt").exists()


def test_out_of_memory_is_one_sentence(images, val_images, tmp_path):
    def greedy(step):
        return lambda images, labels: step(images.repeat(1 << 34, 1, 1, 1), labels)

    with pytest.raises(
        OutOfMemoryError, match="out of memory on cpu with batch size 8; train with a smaller --batch-size"
    ):
        run(images, val_images, CONFIG, tmp_path, make_step=greedy)


def test_a_full_disk_ends_the_run_with_the_checkpoint_before_it(images, val_images, tmp_path, full_disk):
    class FillDisk(Callback):
        def on_epoch(self, figures, state):
            full_disk(True)

    with pytest.raises(CheckpointError, match="the disk is full; free some space, then continue with --resume"):
        run(images, val_images, CONFIG, tmp_path, callbacks=[FillDisk()])
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 1
    full_disk(False)
    result = run(images, val_images, CONFIG, tmp_path, resume=True)
    assert len(result.figures) == 3


def test_a_logger_that_cannot_write_does_not_end_the_run(images, val_images, tmp_path, caplog):
    calls = []

    class Broken(Callback):
        def on_epoch(self, figures, state):
            calls.append(figures.epoch)
            raise OSError(28, "No space left on device")

    result = fit(CONFIG.create_model(), images, val_images, CONFIG, tmp_path, callbacks=[Broken()])
    assert len(result.figures) == 3
    assert calls == [1]
    assert "Broken stopped, the training goes on" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 64}, "train_set must hold at least one batch, got 40 images and batch_size 64"),
        ({"dtype": "float16"}, "float16 needs CUDA"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(images, val_images, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(images, val_images, dataclasses.replace(CONFIG, **change), tmp_path)


def test_a_model_without_penalty_needs_the_other_scope(images, val_images, tmp_path):
    model = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 10))
    config = Config(batch_size=20, epochs=1)
    with pytest.raises(ValueError, match=r"needs a model with a method l2_penalty\(\), got Sequential"):
        fit(model, images, val_images, config, tmp_path, quiet=True)
    fit(model, images, val_images, dataclasses.replace(config, weight_decay_scope="all"), tmp_path, quiet=True)
    assert not model.training
