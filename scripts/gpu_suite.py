#!/usr/bin/env python
"""All that is measured on a GPU, in one command: build, tests, sanitizer, benchmarks, record, the report's experiment.

python -m scripts.gpu_suite --out runs/gpu --minutes 60 --data data       on a machine with a GPU
python -m scripts.gpu_suite --out runs/gpu --minutes 9 --only ops model   some stages
python -m scripts.gpu_suite --out runs/gpu --prebuilt DIR                 compiled before, by scripts.prebuilt
python -m scripts.gpu_suite --out runs/rehearsal --device cpu --quick     each stage rehearsed, without a GPU

Stages run in order of value, each with a time limit. A stage that has passed is not run again: the same command goes
on where the minutes ended. --data takes CIFAR-10 in any layout that get_cifar10.py takes, lossless atlases among them.
Leaves a log and a JSON a stage in --out, and of all stages and targets summary.md and summary.json; the exit status is
1 where a stage failed, was cut short or was not begun for want of minutes.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import targets
from ran_ext._command import Parser
from ran_ext._files import write_atomically, write_json

from . import prebuilt
from .gpu_stages import stages
from .stages import Runner, Stage, limit

ROOT = Path(__file__).resolve().parent.parent


def run(chosen: Sequence[Stage], runner: Runner, minutes: float, again: bool) -> None:
    """Run the stages that have not passed yet until the minutes are over; the rest are recorded as not begun."""
    end = time.monotonic() + 60 * minutes
    pending = [stage for stage in chosen if again or not runner.passed(stage)]
    for number, stage in enumerate(chosen, 1):
        where = f"[{number}/{len(chosen)}]"
        if stage not in pending:
            runner.say(f"{where} {stage.name}: passed before; --again repeats it")
            continue
        left = end - time.monotonic()
        seconds = limit(pending, left)
        pending = pending[1:]
        if not seconds:
            why = f"{max(left, 0):.0f} s of the budget left: run the command again"
            outcome = runner.write(stage, "not begun", why)
        else:
            runner.say(f"{where} {stage.name}: at most {seconds:.0f} s")
            outcome = runner.run(stage, seconds, where)
        runner.say(f"{where} {stage.name}: {outcome['status']} in {outcome['seconds']:.0f} s. {outcome['reason']}")
        summarize(runner)


def summarize(runner: Runner) -> tuple[str, list[dict[str, Any]]]:
    """Write summary.md and summary.json over all stages in the folder; return the text and the outcomes."""
    found = [runner.outcome(path.stem) for path in sorted(runner.out.glob("*.json")) if path.stem != "summary"]
    outcomes = sorted((outcome for outcome in found if outcome), key=lambda outcome: outcome["date"])
    checked = targets.check({outcome["stage"]: outcome["figures"] for outcome in outcomes})
    lines = ["| stage | status | seconds | |", "| --- | --- | ---: | --- |"]
    for outcome in outcomes:
        reason = outcome["reason"].replace("|", "\\|")[:200]
        lines.append(f"| {outcome['stage']} | {outcome['status']} | {outcome['seconds']:.0f} | {reason} |")
    text = "\n".join([*lines, "", targets.table(checked), ""])
    write_atomically(runner.out / "summary.md", text.encode())
    write_json(runner.out / "summary.json", {"stages": outcomes, "targets": checked})
    return text, outcomes


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results; give the same again to go on")
    add("--minutes", type=float, default=None, help="for all stages (default 90; with --quick 10)")
    add("--only", nargs="+", metavar="STAGE", default=[], help="these alone; ops takes ops-128-bfloat16 and so on")
    add("--again", action="store_true", help="also stages that have passed")
    add("--data", type=Path, default=None, help="folder or archive with CIFAR-10")
    add("--prebuilt", type=Path, default=None, metavar="DIR", help="what scripts.prebuilt made for this machine")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--quick", action="store_true", help="rehearse: tiny sizes, whose figures mean nothing")
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu goes with --quick: without a GPU the stages can only be rehearsed")
    if options.data is not None and not options.data.exists():
        parser.error(f"--data: there is no {options.data}")
    if options.prebuilt is not None:
        try:
            prebuilt.check(options.prebuilt)
        except ValueError as error:
            parser.error(str(error))
    options.minutes = options.minutes or (10 if options.quick else 90)
    options.stages = stages(options)
    names = [stage.name for stage in options.stages]
    for only in options.only:
        if not any(name == only or name.startswith(f"{only}-") for name in names):
            parser.error(f"--only: no stage is called {only}; there are {', '.join(names)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; 1 where a stage failed, was cut short or was not begun."""
    options = parse(argv)
    # Of ``timeout`` and the like: as an exception, so that the running stage's processes are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = [
        stage
        for stage in options.stages
        if not options.only or any(stage.name == o or stage.name.startswith(f"{o}-") for o in options.only)
    ]
    settings = {"device": options.device, "quick": options.quick}
    runner = Runner(options.out, ROOT, settings, lambda text: print(text, flush=True))
    run(chosen, runner, options.minutes, options.again)
    text, outcomes = summarize(runner)
    print(f"\n{text}\n{options.out / 'summary.md'}")
    names = {stage.name for stage in chosen}
    bad = [o for o in outcomes if o["stage"] in names and o["status"] not in ("passed", "skipped")]
    print(", ".join(f"{o['stage']}: {o['status']}" for o in bad) or "no stage failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
