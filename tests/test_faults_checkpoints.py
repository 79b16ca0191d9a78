"""A hundred damaged and foreign checkpoints: each is one sentence, and changes nothing."""

import copy
import io
import json
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import zipfile

import pytest
import torch
from tiny_run import network, train

from ran_ext.data import sample
from ran_ext.models import create_model
from ran_ext.train import (
    Callback,
    CheckpointError,
    Config,
    cli,
    fit,
    load_checkpoint,
    load_config,
    load_model,
    load_normalize,
    save_checkpoint,
)


@pytest.fixture(autouse=True)
def no_hang():
    """A test that waits for a pipe or reads an endless device fails instead."""

    def fail(number, frame):
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Keep(Callback):
    """Copies the checkpoint of the first epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_epoch(self, figures, state):
        if figures.epoch == 1:
            shutil.copytree(self.folder, self.folder.with_name("half"))


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The folder of a run that has done one epoch of two."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(out, callbacks=[Keep(out)])
    half = out.with_name("half")
    (half / ".lock").unlink()
    assert sorted(path.name for path in half.iterdir()) == ["last.pt", "model.pt"]
    return half


# --- entries that are missing, or not what they must be ---------------------------------------------------------------


def put(*keys_and_value):
    """A change of a state: the value at a path of keys."""
    *keys, last, value = keys_and_value

    def change(state):
        for key in keys:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return change


def drop(*keys):
    *path, last = keys

    def change(state):
        for key in path:
            state = state[key]
        del state[last]

    return change


def foreign(state):
    """The state of a finished run of another network."""
    state["model"] = create_model("ran_compact", width=0.125).state_dict()


WEIGHT, ADAM = "0.weight", ("optimizer", "state", 0)
ENTRIES = [
    *("config", "model", "optimizer", "scaler", "ema", "stopping", "history", "epoch", "seconds", "figures", "rng"),
    "images",
]
CHANGES = {
    **{f"no {name}": drop(name) for name in [*ENTRIES, "format"]},
    **{f"{name} is text": put(name, "text") for name in ENTRIES},
    **{f"{name} is a list": put(name, [1, 2]) for name in ENTRIES},
    **{f"{name} is None": put(name, None) for name in ENTRIES if name != "scaler"},
    "format 2": put("format", 2),
    "another network": foreign,
    "a weight is missing": drop("model", WEIGHT),
    "a weight too many": lambda state: state["model"].update(x=torch.ones(1)),
    "a weight of another shape": put("model", WEIGHT, torch.ones(4, 3, 5, 5)),
    "a weight of whole numbers": put("model", WEIGHT, lambda t: t.long()),
    "a complex weight": put("model", WEIGHT, lambda t: t.to(torch.complex64)),
    "a sparse weight": put("model", WEIGHT, lambda t: t.to_sparse()),
    "a weight without memory": put("model", WEIGHT, lambda t: t.to("meta")),
    "a weight that is a number": put("model", WEIGHT, 1.0),
    "weights by number": put("model", lambda weights: dict(enumerate(weights.values()))),
    "endless weights": put("model", WEIGHT, torch.ones(1).expand(1 << 40)),
    "optimizer without state": drop("optimizer", "state"),
    "optimizer without groups": drop("optimizer", "param_groups"),
    "optimizer of one group": put("optimizer", "param_groups", lambda groups: groups[:1]),
    "groups of other parameters": put("optimizer", "param_groups", 0, "params", [7]),
    "a group that is a list": put("optimizer", "param_groups", 0, [1]),
    "optimizer state by name": put("optimizer", "state", lambda state: {str(key): state[key] for key in state}),
    "a parameter too many": put("optimizer", "state", lambda state: {**state, 99: state[0]}),
    "no second moment": drop(*ADAM, "exp_avg_sq"),
    "state of another optimizer": put(*ADAM, {"momentum_buffer": torch.zeros(4, 3, 3, 3)}),
    "a moment of another shape": put(*ADAM, "exp_avg", torch.zeros(3)),
    "a moment that is a number": put(*ADAM, "exp_avg", 1.0),
    "steps of whole numbers": put(*ADAM, "step", torch.tensor(3)),
    "several step counts": put(*ADAM, "step", torch.ones(2)),
    "a scaler that nobody has": put("scaler", {"scale": 1.0}),
    "no average": drop("ema", "average"),
    "an average of another network": put("ema", "average", {"weight": torch.ones(2)}),
    "average counted twice": put("ema", "steps", torch.ones(2)),
    "stopping without patience": drop("stopping", "patience"),
    "stopping knows more": lambda state: state["stopping"].update(more=1),
    "stopping with other patience": put("stopping", "patience", 3),
    "the best is NaN": put("stopping", "best", float("nan")),
    "bad epochs below 0": put("stopping", "bad_epochs", -1),
    "half a best epoch": put("stopping", "best_epoch", 0.5),
    "history of three columns": put("history", torch.zeros(2, 3)),
    "flat history": put("history", torch.zeros(4)),
    "history of whole numbers": put("history", torch.zeros(2, 2, dtype=torch.int64)),
    "history longer than an epoch": put("history", torch.zeros(99, 2)),
    "endless history": put("history", torch.zeros(1, 2).expand(1 << 40, 2)),
    "epoch -1": put("epoch", -1),
    "epoch 7 of 2": put("epoch", 7),
    "epoch 2 of 2 without its figures": put("epoch", 2),
    "epoch 10**30": put("epoch", 10**30),
    "epoch 1.0": put("epoch", 1.0),
    "epoch true": put("epoch", True),
    "seconds NaN": put("seconds", float("nan")),
    "seconds below 0": put("seconds", -1.0),
    "no figures": put("figures", []),
    "figures twice": put("figures", lambda rows: rows * 2),
    "figures without a loss": drop("figures", 0, "train_loss"),
    "figures of text": put("figures", 0, "val_loss", "low"),
    "figures of NaN": put("figures", 0, "train_loss", float("nan")),
    "figures of epoch 5": put("figures", 0, "epoch", 5),
    "random numbers of two processes": put("rng", lambda states: states * 2),
    "random numbers of none": put("rng", []),
    "an empty generator": put("rng", [[]]),
    "a short generator": put("rng", [[torch.zeros(5, dtype=torch.uint8)]]),
    "a generator of floats": put("rng", 0, 0, lambda state: state.float()),
    "a generator out of order": put("rng", 0, 0, lambda state: torch.full_like(state, 255)),
    "asked for nothing": put("asked", None),
    "asked for a number": put("asked", "dtype", 16),
    "other images": put("images", 41),
    "images below 0": put("images", -1),
    "another seed": put("config", "seed", 1),
    "an unknown field": lambda state: state["config"].update(colour="red"),
    "batch of half an image": put("config", "batch_size", 0.5),
    "an unknown model": put("config", "model", "resnet"),
    "a recipe by number": put("config", {1: 2}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_foreign_entry_is_named_and_nothing_changes(half, tmp_path, name):
    state = copy.deepcopy(load_checkpoint(half / "last.pt"))
    CHANGES[name](state)
    torch.save(state, tmp_path / "last.pt")
    refused(tmp_path)


def refused(folder):
    """The run in the folder is not continued, and neither its file nor the network have changed."""
    before, model = (folder / "last.pt").read_bytes(), network()
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r"last\.pt|another run") as caught:
        train(folder, model, resume=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert (folder / "last.pt").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["last.pt"]
    assert all(torch.equal(mine, weights[key]) for key, mine in model.state_dict().items())


# --- files that are no checkpoints ------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zipped(size, compression):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", bytes(size))
    return buffer.getvalue()


FILES = {
    "empty": lambda good: b"",
    "text": lambda good: b"no checkpoint",
    "JSON": lambda good: json.dumps({"format": 1}).encode(),
    "an empty zip": lambda good: b"PK\x05\x06" + bytes(18),
    "a zip of zeros": lambda good: zipped(1000, zipfile.ZIP_STORED),
    "a zip that unfolds to a thousand times its size": lambda good: zipped(1 << 26, zipfile.ZIP_DEFLATED),
    "a pickle": lambda good: pickle.dumps({"format": 1}),
    "a pickle that runs code": lambda good: pickle.dumps({"format": 1, "x": Bomb()}),
    "a checkpoint that runs code": lambda good: saved({"format": 1, "x": Bomb()}),
    "torch's old format": lambda good: saved({"format": 1}, _use_new_zipfile_serialization=False),
    "safetensors": lambda good: struct.pack("<Q", 2) + b"{}",
    "a list": lambda good: saved([1, 2]),
    "a tensor": lambda good: saved(torch.ones(3)),
    "a number": lambda good: saved(3),
    "nothing": lambda good: saved(None),
    "weights alone": lambda good: saved({"0.weight": torch.ones(3)}),
    **{f"cut to {share:.0%}": lambda good, s=share: good[: int(s * len(good))] for share in (0.1, 0.3, 0.6, 0.9, 0.99)},
    "its end alone": lambda good: good[len(good) // 2 :],
    "a hole of zeros": lambda good: good[:2000] + bytes(2000) + good[4000:],
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_checkpoint_is_refused(half, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    content = FILES[name]((half / "last.pt").read_bytes())
    (tmp_path / "last.pt").write_bytes(content)
    refused(tmp_path)
    for read in (load_model, load_normalize, load_config):
        with pytest.raises(CheckpointError, match=r"last\.pt"):
            read(tmp_path / "last.pt")
    assert not (tmp_path.parent / "bomb").exists()


@pytest.mark.parametrize("kind", ["pipe", "zero", "full", "socket", "folder", "nowhere", "loop"])
@pytest.mark.parametrize("name", ["last.pt", "run.json"])
def test_what_is_no_file_is_neither_waited_for_nor_read(tmp_path, monkeypatch, capsys, kind, name):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    out = tmp_path / "run"
    out.mkdir()
    path = out / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"run/{name}")
    elif kind == "folder":
        path.mkdir()
    else:
        target = {"zero": "/dev/zero", "full": "/dev/full", "nowhere": "nowhere", "loop": str(path)}[kind]
        path.symlink_to(target)
    flags = ["--data", "sample", "--model-option", "width=0.125", "--no-tensorboard", "--quiet"]
    assert cli.main(["--resume", "--out", "run", *flags]) == 1
    said = capsys.readouterr().err
    assert said.startswith("ran-ext-train: error: ")
    assert name in said
    assert said.count("\n") == 1
    assert os.path.lexists(path)


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_is_noticed_or_means_nothing(half, tmp_path, seed):
    """Some bits of a zip, such as a date, say nothing about the state."""
    data = bytearray((half / "last.pt").read_bytes())
    data[random.Random(seed).randrange(len(data))] ^= 1 << seed % 8
    (tmp_path / "last.pt").write_bytes(data)
    try:
        state = load_checkpoint(tmp_path / "last.pt")
    except CheckpointError:
        return
    good = load_checkpoint(half / "last.pt")
    assert all(torch.equal(state["model"][key], value) for key, value in good["model"].items())
    assert state["config"] == good["config"]


def test_the_same_run_goes_on_without_any_change(half, tmp_path):
    """So the refusals above are due to the changes."""
    shutil.copytree(half, tmp_path / "run")
    assert train(tmp_path / "run", resume=True).selected_epoch


# --- what other readers need ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    config = Config(model_options={"width": 0.125}, epochs=1, batch_size=16, patience=0, select="last", ema=0.5)
    out = tmp_path_factory.mktemp("selected")
    fit(config.create_model(), sample("train").subset(torch.arange(32)), None, config, out, quiet=True)
    return out


@pytest.mark.parametrize(
    "change",
    [
        drop("config"),
        put("config", "model_options", {"width": 1e6}),
        put("config", "model_options", {"width": float("nan")}),
        put("config", "model_options", {"depth": 3}),
        put("config", "model_options", {"num_classes": 10**12}),
        put("config", "model_options", "wide"),
        put("config", "model", "ran_paper"),
        drop("model"),
        drop("model", "fc.weight"),
        put("model", "fc.weight", torch.ones(3, 3)),
        put("model", "fc.weight", "heavy"),
        put("model", [torch.ones(1)]),
    ],
)
def test_load_model_refuses_in_one_sentence(selected, tmp_path, change):
    state = torch.load(selected / "model.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt") as caught:
        load_model(tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        drop("normalize"),
        put("normalize", None),
        put("normalize", torch.ones(3)),
        drop("normalize", "scale"),
        put("normalize", "offset", 3.0),
        put("normalize", "offset", torch.ones(3)),
        put("normalize", "scale", torch.ones(3, 1, 1, dtype=torch.int64)),
    ],
)
def test_load_normalize_refuses_in_one_sentence(selected, tmp_path, change):
    state = torch.load(selected / "model.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt.*normalize") as caught:
        load_normalize(tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ema", [None, 3, {}, {"average": {}, "steps": torch.ones(())}])
def test_load_model_takes_a_good_average_or_none(selected, tmp_path, ema):
    state = torch.load(selected / "last.pt", weights_only=True) | {"ema": ema}
    torch.save(state, tmp_path / "last.pt")
    if ema is None:
        assert torch.equal(load_model(tmp_path / "last.pt").fc.weight, state["model"]["fc.weight"])
        return
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        load_model(tmp_path / "last.pt")


def test_weights_of_another_run_are_not_tested_as_this_ones(half, tmp_path):
    """What was trained elsewhere, or in epochs that this run never had, does not end up as its result."""
    shutil.copytree(half, tmp_path / "run")
    train(tmp_path / "run", resume=True)
    state = load_checkpoint(tmp_path / "run" / "model.pt")
    state["figures"]["train_loss"] += 1
    save_checkpoint(tmp_path / "run" / "model.pt", {key: value for key, value in state.items() if key != "format"})
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    last["stopping"]["best_epoch"] = 0  # the finished run's best is its first epoch, so model.pt is not written again
    save_checkpoint(tmp_path / "run" / "last.pt", {key: value for key, value in last.items() if key != "format"})
    with pytest.raises(CheckpointError, match=r"model\.pt .*it is not of epoch 1 of this run"):
        train(tmp_path / "run", resume=True)
