"""Runs that are killed, that share a folder, or that find the disk full: nothing is lost, nothing mixed.

``RAN_EXT_KILLS=100 pytest tests/test_faults_runs.py -k killed`` does it by the hundred.
"""

import io
import json
import os
import shutil
import threading
from multiprocessing.connection import wait

import pytest
import torch
from killed_runs import FLAGS, HANGS, RECIPES, Tally, finish, start, torment
from tiny_run import CONFIG, train

from ran_ext import _files
from ran_ext._lock import FolderInUseError, FolderLock
from ran_ext.data import CIFAR10
from ran_ext.train import Callback, CheckpointError, TrainingError, cli, load_checkpoint

KILLS = int(os.environ.get("RAN_EXT_KILLS", "6"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")
def test_killed_runs_go_on_bit_for_bit(tmp_path):
    tally = torment(tmp_path, KILLS, seed=KILLS)
    print(f"{tally.kills} kills ({tally.at_points} at chosen points) of {tally.runs} runs: {len(tally.faults)} faults")
    assert tally.faults == []
    assert tally.kills >= KILLS


# --- two in one folder ------------------------------------------------------------------------------------------------


def test_of_two_runs_started_together_one_is_refused_in_a_sentence(tmp_path):
    logs = [tmp_path / f"log{number}" for number in range(2)]
    out, seeds = tmp_path / "run", [["--seed", "0"], ["--seed", "1"]]
    processes = [start(out, seed, log, wait_for=tmp_path / "go") for seed, log in zip(seeds, logs, strict=True)]
    wait([process.sentinel for process in processes], HANGS)  # the one that goes on waits for the other's end
    (tmp_path / "go").touch()
    for process in processes:
        process.join(HANGS)
    codes = [process.exitcode for process in processes]
    assert sorted(codes) == [0, 1]
    winner = codes.index(0)
    said = logs[1 - winner].read_text()
    assert "is in use by another process (process " in said
    assert said.count("\n") == 1
    assert logs[winner].read_text() == ""
    for name in ("last.pt", "model.pt"):
        assert load_checkpoint(out / name)["config"]["seed"] == winner
    for name in ("run.json", "result.json"):
        assert json.loads((out / name).read_text())["config"]["seed"] == winner
    alone = tmp_path / "alone"
    assert finish(start(alone, seeds[winner], tmp_path / "log"), Tally(), "alone") == 0
    mine, other = (load_checkpoint(folder / "last.pt")["model"] for folder in (out, alone))
    assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_fit_holds_its_folder_and_gives_it_back(tmp_path):
    class Second(Callback):
        def on_epoch(self, figures, state):
            with pytest.raises(TrainingError, match=f"in use by another process .process {os.getpid()} on "):
                train(tmp_path)

    train(tmp_path, callbacks=[Second()])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "model.pt"]
    train(tmp_path, resume=True)


def test_a_run_whose_folder_was_removed_does_not_write_to_the_next_one_s(tmp_path):
    out = tmp_path / "run"

    class Replace(Callback):
        def on_epoch(self, figures, state):
            shutil.rmtree(out)
            out.mkdir()

    with pytest.raises(CheckpointError, match=r"cannot write .*last\.pt: .* was removed or taken by another process"):
        train(out, callbacks=[Replace()])
    assert list(out.iterdir()) == []


def test_only_one_of_many_gets_the_lock_each_time(tmp_path):
    """Also when the file of the lock is removed under those that wait for it."""
    inside, most, refused = 0, 0, 0
    guard = threading.Lock()

    def work():
        nonlocal inside, most, refused
        for _ in range(200):
            try:
                with FolderLock(tmp_path):
                    with guard:
                        inside += 1
                        most = max(most, inside)
                    with guard:
                        inside -= 1
            except FolderInUseError:
                refused += 1

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == 1
    assert refused
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    def unsupported(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("ran_ext._lock.fcntl.flock", unsupported)
    with pytest.warns(UserWarning, match="is not locked .*Operation not supported.*see that no other run"):
        train(tmp_path)


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    left, mine = tmp_path / ".ran_ext-0123456789abcdef.partial", tmp_path / "notes.partial"
    left.write_bytes(b"half")
    mine.write_bytes(b"mine")
    train(tmp_path)
    assert not left.exists()
    assert mine.read_bytes() == b"mine"


# --- refused before anything is written -------------------------------------------------------------------------------


@pytest.fixture
def few_images(monkeypatch):
    whole = CIFAR10.sample
    few = staticmethod(lambda split="train": whole(split).subset(torch.arange(68 if split == "train" else 20)))
    monkeypatch.setattr(CIFAR10, "sample", few)


def test_a_refused_resume_leaves_the_folder_as_it_was(few_images, tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert cli.main([*FLAGS, *RECIPES[0], *out, "--epochs", "1"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for change in (["--lr", "0.5"], ["--epochs", "2"], ["--model-option", "width=0.25"], ["--device", "meta"]):
        assert cli.main(["--resume", *out, "--quiet", "--no-tensorboard", *change]) == 1
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    capsys.readouterr()
    assert cli.main(["--resume", *out, "--quiet", "--no-tensorboard"]) == 0


@pytest.mark.parametrize("made", [False, True])
def test_resume_of_a_folder_without_a_run_is_refused(tmp_path, capsys, made):
    out = tmp_path / "TYPO"
    if made:
        out.mkdir()
    assert cli.main(["--resume", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert f"--resume: there is no run in {out} (it has neither run.json nor last.pt)" in said
    assert said.count("\n") == 1
    assert out.exists() == made


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", range(1, 6))
def test_a_disk_that_fills_at_any_write_costs_nothing_that_was_written(tmp_path, monkeypatch, write):
    """Of the two epochs' four checkpoints; the fifth write does not come."""
    count = 0

    def open_file(path, mode):
        nonlocal count
        count += 1
        return open("/dev/full" if count >= write else path, "wb")

    monkeypatch.setattr(_files, "open", open_file, raising=False)
    if write < 5:
        with pytest.raises(CheckpointError, match="the disk is full; free some space, then continue with --resume"):
            train(tmp_path / "run")
    else:
        train(tmp_path / "run")
    monkeypatch.undo()
    assert all(path.name in ("last.pt", "model.pt") for path in (tmp_path / "run").iterdir())
    resumed, whole = train(tmp_path / "run", resume=True), train(tmp_path / "whole")
    assert [row.train_loss for row in resumed.figures] == [row.train_loss for row in whole.figures]
    for name in ("last.pt", "model.pt"):
        mine, other = (load_checkpoint(tmp_path / folder / name)["model"] for folder in ("run", "whole"))
        assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stderr", Full())
    result = train(tmp_path, quiet=False)
    assert len(result.figures) == CONFIG.epochs


def test_tensorboard_on_a_full_disk_is_one_line(few_images, tmp_path, capsys, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    flags = [flag for flag in FLAGS if flag not in ("--quiet", "--no-tensorboard")]
    assert cli.main([*flags, "--epochs", "1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert said.count("TensorBoardLogger stopped, the training goes on: [Errno 28] No space left on device") == 1
    assert "Traceback" not in said
