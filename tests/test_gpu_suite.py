"""The GPU suite: budgets, going on after an interruption, failures, time limits; and what its stages would run."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from _build import native
from benchmarks import compare
from scripts import gpu_suite, prebuilt, stages
from scripts.gpu_stages import pytest_counts, sanitizer_errors
from scripts.gpu_suite import parse, run, summarize
from scripts.stages import Runner, Stage, limit

ROOT = Path(__file__).resolve().parent.parent


def python(code):
    return [sys.executable, "-c", code]


def a_stage(name, *codes, minutes=0.5, **options):
    return Stage(name, minutes, [python(code) for code in codes], **options)


def a_runner(out, **settings):
    return Runner(out, ROOT, settings, lambda text: None)


def test_a_small_budget_goes_to_the_first_and_a_large_one_to_all():
    pending = [a_stage("a", minutes=1), a_stage("b", minutes=4)]
    assert limit(pending, 600.0) == 120  # 10 minutes for 5
    assert limit(pending, 90.0) == 60
    assert limit(pending[1:], 90.0) == 90
    assert limit(pending[1:], 59.0) == 0  # under a quarter of what it needs


def test_a_failing_stage_is_told_and_the_others_run(tmp_path):
    ran = tmp_path / "ran"
    chosen = [
        a_stage("one", "print('fine')"),
        a_stage("two", "print('before'); raise SystemExit(3)", f"open({str(ran)!r}, 'w')"),
        a_stage("three", "print('last')"),
        a_stage("four", "print('collected')", skip="no GPU"),
        a_stage("five", minutes=400),
    ]
    run(chosen, a_runner(tmp_path / "out"), minutes=1, again=False)
    text, outcomes = summarize(a_runner(tmp_path / "out"))
    status = {outcome["stage"]: (outcome["status"], outcome["reason"]) for outcome in outcomes}
    assert status["one"] == status["three"] == ("passed", "")
    assert status["two"][0] == "failed"
    assert status["two"][1].startswith("exit status 3: ")
    assert status["four"] == ("skipped", "no GPU")
    assert status["five"][0] == "not begun"
    assert "of the budget left" in status["five"][1]
    assert not ran.exists()
    assert "before" in next(outcome["tail"] for outcome in outcomes if outcome["stage"] == "two")
    assert "| two | failed |" in text
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["stages"] == outcomes


def test_what_passed_is_not_repeated_unless_asked_or_changed(tmp_path):
    count = tmp_path / "count"
    append = f"open({str(count)!r}, 'a').write('x')"
    good, bad = a_stage("good", append), a_stage("bad", append, "raise SystemExit(1)")
    for settings, again, total in [
        ({"quick": True}, False, 2),
        ({"quick": True}, False, 3),  # only the one that failed
        ({"quick": True}, True, 5),
        ({"quick": False}, False, 7),
    ]:
        run([good, bad], a_runner(tmp_path / "out", **settings), minutes=1, again=again)
        assert len(count.read_text()) == total


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return state != "Z"


def test_a_time_limit_ends_the_whole_group_and_keeps_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 0.5)
    pids, results = tmp_path / "pids", tmp_path / "results.json"
    results.write_text('{"rows": [1]}')
    child = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    child += f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); {child}"
    stage = a_stage("slow", parent, results=results)
    began = time.monotonic()
    outcome = a_runner(tmp_path / "out").run(stage, 3.0, "")
    assert time.monotonic() - began < 15
    assert (outcome["status"], outcome["figures"]) == ("timed out", {"rows": [1]})
    assert outcome["reason"].startswith("stopped after 3 s")
    group = [int(pid) for pid in pids.read_text().split()]
    assert len(group) == 2
    assert not any(alive(pid) for pid in group)


def test_a_command_that_is_missing_fails(tmp_path):
    outcome = a_runner(tmp_path).run(Stage("none", 1, [["no-such-command-here"]]), 10.0, "")
    assert outcome["status"] == "failed"
    assert "no-such-command-here" in outcome["tail"]


def test_a_log_without_passed_tests_fails_the_stage(tmp_path):
    skipped = a_stage("tests", "print('== 611 skipped in 3.21s ==')", read=pytest_counts)
    outcome = a_runner(tmp_path).run(skipped, 10.0, "")
    assert outcome["status"] == "failed"
    assert "at least one must pass, got {'skipped': 611}" in outcome["reason"]
    assert pytest_counts("= 2 failed, 5 passed in 1.2s =\n1 passed, 3 deselected in 0.1s") == {"failed": 2, "passed": 6}
    with pytest.raises(ValueError, match="printed no summary"):
        sanitizer_errors("5 passed in 3s")


def options_of(tmp_path, *arguments):
    return parse(["--out", str(tmp_path), *arguments])


def test_every_stage_names_files_that_are_there_and_a_rehearsal_goes_through_all(tmp_path):
    rehearsal = options_of(tmp_path, "--device", "cpu", "--quick").stages
    for data in ([], ["--data", str(tmp_path)]):
        full = options_of(tmp_path, *data).stages
        names = [stage.name for stage in full]
        assert names[:4] == ["environment", "constants", "build", "tests"]
        assert len(set(names)) == len(names)
        assert {name.split("-")[0] for name in names} == {stage.name.split("-")[0] for stage in rehearsal}
    commands = [command for stage in [*full, *rehearsal] for command in stage.commands]
    modules = {command[command.index("-m") + 1] for command in commands if "-m" in command}
    assert {"benchmarks.compare", "scripts.record"} <= modules
    assert not {name for name in modules if importlib.util.find_spec(name) is None}
    files = {part for command in commands for part in command if part.endswith(".py") and "/" in part}
    assert "tests/test_cuda.py" in files
    assert not {name for name in files if not (ROOT / name).exists()}


def test_compare_takes_the_options_that_the_stages_give(tmp_path):
    rehearsal = options_of(tmp_path, "--device", "cpu", "--quick").stages
    commands = [command for stage in rehearsal for command in stage.commands if "benchmarks.compare" in command]
    assert len(commands) >= 5
    for command in commands:
        assert compare.parse(command[3:]).quick


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--device", "cpu"], "--device cpu goes with --quick"),
        (["--data", "nowhere"], "--data: there is no nowhere"),
        (["--only", "operations"], "--only: no stage is called operations; there are environment, constants,"),
    ],
)
def test_options_that_make_no_sense(tmp_path, arguments, text, capsys):
    with pytest.raises(SystemExit):
        options_of(tmp_path, *arguments)
    assert text in capsys.readouterr().err


def test_only_takes_a_group_and_the_exit_status_tells(tmp_path, monkeypatch, capsys):
    made = [a_stage("ops-1", "print('fine')"), a_stage("ops-2", "raise SystemExit(1)"), a_stage("opsx", minutes=1)]
    monkeypatch.setattr(gpu_suite, "stages", lambda options: made)
    common = ["--out", str(tmp_path), "--device", "cpu", "--quick"]
    assert gpu_suite.main([*common, "--only", "ops"]) == 1
    out = capsys.readouterr().out
    assert "| ops-1 | passed |" in out
    assert out.endswith("\nops-2: failed\n")
    assert not (tmp_path / "opsx.json").exists()
    assert gpu_suite.main([*common, "--only", "ops-1", "opsx"]) == 0
    assert "no stage failed" in capsys.readouterr().out
    # Of its minute a quarter is the least.
    assert gpu_suite.main([*common, "--only", "opsx", "--again", "--minutes", "0.1"]) == 1
    assert capsys.readouterr().out.endswith("\nopsx: not begun\n")


def prebuilt_folder(tmp_path, monkeypatch, **other):
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    (folder / "prebuilt.json").write_text(json.dumps({**prebuilt.state(torch.__version__), "archs": "9.0", **other}))
    return folder


def test_with_a_prebuilt_folder_nothing_is_compiled(tmp_path, monkeypatch):
    folder = prebuilt_folder(tmp_path, monkeypatch)
    (folder / "_C.so").write_text("extension")
    (folder / "_built_for.py").write_text("TORCH = None")
    full = {stage.name: stage for stage in options_of(tmp_path, "--prebuilt", str(folder)).stages}
    assert full["build"].commands[0][1:] == ["-m", "scripts.prebuilt", "--install", str(folder)]
    assert full["emulation"].commands[0][-2:] == ["--prebuilt", str(folder)]
    monkeypatch.setattr(prebuilt, "PACKAGE", tmp_path)
    prebuilt.install(folder)
    assert (tmp_path / "_C.so").read_text() == "extension"


@pytest.mark.parametrize(("name", "value"), [("python", "2.7"), ("torch", "1.0"), ("csrc", "of another commit")])
def test_a_prebuilt_folder_of_something_else_is_refused(tmp_path, monkeypatch, capsys, name, value):
    folder = prebuilt_folder(tmp_path, monkeypatch, **{name: value})
    with pytest.raises(SystemExit):
        options_of(tmp_path, "--prebuilt", str(folder))
    assert f"was made for {name} {value}, here it is" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        options_of(tmp_path, "--prebuilt", str(tmp_path))
    assert "holds no prebuilt.json" in capsys.readouterr().err


def test_a_full_run_compiles_for_one_chip_and_links_what_it_compiled(tmp_path):
    full = {stage.name: stage for stage in options_of(tmp_path).stages}
    archs = full["build"].environment["TORCH_CUDA_ARCH_LIST"]
    compare = full["emulation"].commands[0]
    assert ";" not in archs
    assert compare[compare.index("--archs") + 1] == archs
    assert Path(compare[compare.index("--objects") + 1]) == native.OBJECTS
