"""Runs the stages of a long suite, each a process group with a time limit, a log and a JSON file."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ran_ext._files import write_json

#: Seconds between two lines of progress, and those that a process has between being asked to stop and being killed.
SAY_EVERY, GRACE = 15.0, 10.0
#: The share of its own limit below which a stage is not begun: it would be cut short with nothing to show.
LEAST_SHARE = 0.25
#: Characters of the log's end that go into the JSON.
TAIL = 4000


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of the suite.

    Args:
        name: of its files. ``--only a`` takes ``a``, ``a-b`` and so on.
        minutes: its time limit.
        commands: run one after the other; ``{minutes}`` in an argument becomes nine tenths of the limit it is given.
        results: JSON that the commands write; its content becomes the stage's figures, also where it was cut short.
        read: figures from the log. ValueError: the log shows that the commands did not do their work.
        environment: variables added to those of the suite.
        skip: why the stage cannot run here; its commands then only rehearse it.
    """

    name: str
    minutes: float
    commands: Sequence[Sequence[str]]
    results: Path | None = None
    read: Callable[[str], dict[str, Any]] | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    skip: str = ""


def limit(pending: Sequence[Stage], left: float) -> float:
    """Seconds of the ``left`` that the first of ``pending`` gets: its own limit, or more where all limits leave some.

    A budget that is too small goes to the first stages in full: they are in order of value. 0 where too little is left.

    >>> stages = [Stage("a", 1, []), Stage("b", 3, [])]
    >>> limit(stages, 600.0), limit(stages, 120.0), limit(stages[1:], 60.0), limit(stages[1:], 30.0)
    (150.0, 60.0, 60.0, 0.0)
    """
    wanted = 60.0 * pending[0].minutes
    scale = max(1.0, left / (60.0 * sum(stage.minutes for stage in pending)))
    given = min(wanted * scale, left)
    return given if given >= LEAST_SHARE * wanted else 0.0


class Runner:
    """Runs stages in one folder: ``<stage>.log`` and ``<stage>.json`` each.

    Args:
        out: the folder.
        root: where the commands run.
        settings: a stage that passed is not run again, unless these have changed.
        say: takes a line of progress.
    """

    def __init__(self, out: Path, root: Path, settings: Mapping[str, Any], say: Callable[[str], None] = print):
        self.out, self.root, self.settings, self.say = out, root, dict(settings), say
        out.mkdir(parents=True, exist_ok=True)

    def passed(self, stage: Stage) -> bool:
        """Whether an earlier run with the same settings passed it."""
        outcome = self.outcome(stage.name)
        return outcome is not None and outcome["status"] == "passed" and outcome["settings"] == self.settings

    def outcome(self, name: str) -> dict[str, Any] | None:
        """What a stage's JSON says, if it has one."""
        path = self.out / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def run(self, stage: Stage, seconds: float, where: str) -> dict[str, Any]:
        """Run one stage for at most ``seconds``, write its JSON and return that.

        Its status is "passed", "failed", "timed out" or "skipped"; its reason says why where it has not passed.
        """
        began = time.monotonic()
        path, fault, figures = self.out / f"{stage.name}.log", "", {}
        status = "skipped" if stage.skip else "passed"
        if stage.results is not None:
            stage.results.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as log:
            for command in stage.commands:
                left = seconds - (time.monotonic() - began)
                full = [part.replace("{minutes}", f"{0.9 * seconds / 60:.2f}") for part in command]
                code = self._execute(full, stage, log, left, f"{where} {stage.name}")
                if code != 0:
                    status = "timed out" if code is None else "failed"
                    fault = f"stopped after {seconds:.0f} s" if code is None else f"exit status {code}"
                    fault += f": {shlex.join(full)}"
                    break
        text = path.read_text(errors="replace")
        try:
            figures = self._figures(stage, text) if not stage.skip else {}
        except ValueError as error:
            status, fault = ("failed", str(error)) if status == "passed" else (status, fault)
        return self.write(stage, status, fault or stage.skip, time.monotonic() - began, seconds, text[-TAIL:], figures)

    def _figures(self, stage: Stage, log: str) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if stage.results is not None and stage.results.exists():
            figures |= json.loads(stage.results.read_text())
        return figures | (stage.read(log) if stage.read else {})

    def write(
        self,
        stage: Stage,
        status: str,
        reason: str = "",
        seconds: float = 0.0,
        given: float = 0.0,
        tail: str = "",
        figures: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Keep the outcome of a stage as its JSON; written to the side and renamed."""
        outcome = {
            "stage": stage.name,
            "status": status,
            "reason": reason,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "limit_seconds": round(given, 1),
            "commands": [shlex.join(command) for command in stage.commands],
            "settings": self.settings,
            "figures": dict(figures or {}),
            "tail": tail,
        }
        write_json(self.out / f"{stage.name}.json", outcome)
        return outcome

    def _execute(self, command: Sequence[str], stage: Stage, log: IO[str], seconds: float, what: str) -> int | None:
        """The exit status; None where the time limit ended it. All its processes are ended."""
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        path = os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")]))  # nothing is installed
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **stage.environment}
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.root, env=variables, start_new_session=True
            )
        except OSError as error:  # the shell's exit status for a command that cannot be run
            log.write(f"{error}\n")
            return 127
        began = time.monotonic()
        try:
            while True:
                left = seconds - (time.monotonic() - began)
                try:
                    return process.wait(max(0.0, min(SAY_EVERY, left)))
                except subprocess.TimeoutExpired:
                    if left <= SAY_EVERY:
                        return None
                self.say(f"{what}: {time.monotonic() - began:.0f} s, {last_line(Path(log.name))}")
        finally:
            end_group(process)


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ask all processes of the group to stop; kill those that have not after ``GRACE`` seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        until = time.monotonic() + GRACE
        while time.monotonic() < until:
            process.poll()  # a leader that is not waited for would keep the group
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def last_line(path: Path) -> str:
    """The last line of a log that is not empty, for a line of progress."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:100] for line in reversed(lines) if line.strip()), "")
