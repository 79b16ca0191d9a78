"""Runs of the command that are killed at random points and continued, until they end; for test_faults_runs.py.

Half of the kills come after a random time. The others come at a random one of the points at which something could be
lost: before a file of the run's folder is opened, renamed or removed, half-way through a write, between two steps. A
process of its own, with the package imported, forks each run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from ran_ext import _files
from ran_ext.data import CIFAR10, Batches
from ran_ext.train import cli, load_checkpoint
from ran_ext.train.arguments import RUN_FILE
from ran_ext.train.state import LAST, SELECTED

FLAGS = [
    *("--data", "sample", "--preset", "sample", "--model-option", "width=0.125", "--device", "cpu", "--quiet"),
    *("--epochs", "3", "--batch-size", "16", "--val-images", "20", "--dtype", "float32", "--no-tensorboard"),
]
#: Seconds after which a run hangs; one takes one of processor time, on a busy machine a minute.
HANGS = 300
WHAT_A_RUN_IMPORTS = ["torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"]
#: The recipes that the runs take turns in.
RECIPES = [
    [],
    ["--select", "best", "--ema", "0.9"],
    ["--checkpoint-every", "2", "--optimizer", "nesterov", "--select", "best"],
    ["--mixup", "--augment", "report", "--cutout", "8"],
]


def command(out: Path, recipe: list[str], log: Path, kill_at: int | None, wait_for: Path | None) -> None:
    """Run, or continue, the command in this process; dies at point ``kill_at``, waits before its steps for a file."""
    torch.set_num_threads(1)
    with open(log, "ab", buffering=0) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    faulthandler.dump_traceback_later(HANGS - 20, file=2)  # what it was at, where it hangs
    sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115  what the forking process had is not ours
    whole, few = CIFAR10.sample, {"train": 68, "test": 20}
    CIFAR10.sample = staticmethod(lambda split="train": whole(split).subset(torch.arange(few[split])))
    passed = 0

    def point() -> None:
        nonlocal passed
        passed += 1
        if passed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(str(out)):
            point()

    class Halting:
        """A file that is killed half-way, too."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            point()
            self.file.write(data[len(data) // 2 :])

        def __getattr__(self, name):
            return getattr(self.file, name)

    @contextlib.contextmanager
    def open_halting(path, mode):
        with open(path, mode) as file:
            yield Halting(file)

    load = Batches.load

    def load_and_count(self, *arguments):
        point()
        while wait_for and not wait_for.exists():
            time.sleep(0.01)
        return load(self, *arguments)

    sys.addaudithook(audit)
    _files.open = open_halting  # type: ignore[attr-defined]
    Batches.load = load_and_count  # type: ignore[method-assign]
    begun = any((out / name).exists() for name in (RUN_FILE, LAST))
    every = recipe[:2] if recipe[:1] == ["--checkpoint-every"] else []
    flags = ["--resume", "--device", "cpu", "--no-tensorboard", "--quiet", *every] if begun else [*FLAGS, *recipe]
    code = cli.main([*flags, "--out", str(out)])
    sys.stdout.flush()
    os._exit(code)


def start(out: Path, recipe: list[str], log: Path, kill_at: int | None = None, wait_for: Path | None = None):
    """The process, started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_runs", *WHAT_A_RUN_IMPORTS])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # else it imports nothing beforehand
        forkserver.ensure_running()
    process = context.Process(target=command, args=(out, recipe, log, kill_at, wait_for))
    process.start()
    return process


@dataclasses.dataclass
class Tally:
    """What came of it."""

    runs: int = 0
    kills: int = 0
    at_points: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)


def torment(folder: Path, kills: int, seed: int) -> Tally:
    """Start runs, kill them and continue them until there were so many kills; compare each with one that was not."""
    tally, draw, whole, seconds = Tally(), random.Random(seed), {}, 0.0
    while tally.kills < kills:
        number = tally.runs % len(RECIPES)
        recipe = RECIPES[number]
        if number not in whole:
            whole[number], begun = folder / f"whole{number}", time.monotonic()
            finish(start(whole[number], recipe, folder / "log"), tally, "the whole run")
            seconds = time.monotonic() - begun
        out = folder / f"run{tally.runs}"
        tally.runs += 1
        while True:
            spare = tally.kills >= kills
            at_point = draw.random() < 0.5
            process = start(out, recipe, folder / "log", draw.randint(1, 60) if at_point and not spare else None)
            if not at_point and not spare:
                process.join(draw.uniform(0.0, seconds))
                process.kill()
            code = finish(process, tally, f"{out.name} after {tally.kills} kills", killed=not spare)
            if code == 0:
                break
            tally.kills += 1
            tally.at_points += at_point
            readable(out, tally)
            if code not in (0, -signal.SIGKILL):
                return tally
        compare(out, whole[number], tally)
    said = (folder / "log").read_text()
    if said:
        tally.faults.append(f"something was said: {said[:2000]}")
    return tally


def finish(process, tally: Tally, what: str, killed: bool = False) -> int:
    """Wait for the end; its exit status, noted where it is none of those expected."""
    process.join(HANGS)
    if process.exitcode is None:
        process.kill()
        process.join()
        tally.faults.append(f"{what} hangs")
    elif process.exitcode != 0 and not (killed and process.exitcode == -signal.SIGKILL):
        tally.faults.append(f"{what} ended with status {process.exitcode}")
    return process.exitcode


def readable(out: Path, tally: Tally) -> None:
    """Whatever a kill leaves under its name is whole."""
    for name in (LAST, SELECTED):
        if (out / name).exists():
            try:
                load_checkpoint(out / name)
            except Exception as error:
                tally.faults.append(f"{out.name}: {error}")


def compare(out: Path, whole: Path, tally: Tally) -> None:
    """Note where a run that was killed differs from the one that was not."""
    for name in (LAST, SELECTED):
        mine, other = (flat(load_checkpoint(folder / name)) for folder in (out, whole))
        differing = [key for key in mine.keys() | other.keys() if not same(mine.get(key), other.get(key))]
        if differing:
            tally.faults.append(f"{out.name}/{name} differs from the whole run's in {differing[:5]}")
    left = {path.name for path in out.iterdir()} ^ {path.name for path in whole.iterdir()}
    if left:
        tally.faults.append(f"{out.name} and the whole run differ in {left}")


def flat(state, where: str = "") -> dict[str, object]:
    """The state by dotted names, without the times."""
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, list):
        items = enumerate(state)
    else:
        return {where: state}
    parts = [flat(value, f"{where}.{key}") for key, value in items if key not in ("seconds", "images_per_second")]
    return {name: value for part in parts for name, value in part.items()}


def same(one: object, other: object) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
