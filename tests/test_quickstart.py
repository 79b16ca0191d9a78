"""scripts/quickstart.py, as far as it goes without setting anything up; and suites started as scripts."""

import contextlib
import runpy
import sys
import time

import pytest

from scripts import quickstart


def test_the_bare_command_says_what_the_two_tasks_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])
    monkeypatch.setattr(quickstart, "check_machine", None)  # nothing is begun
    assert quickstart.main() == 2
    said = capsys.readouterr().out
    assert "quickstart.py train     # trains on the CIFAR-10 sample in the package" in said
    assert "quickstart.py test      # runs the tests" in said


def test_flags_after_the_task_go_to_it(monkeypatch):
    calls = []
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--system", "train", "--scale", "full", "--epochs", "2"])
    monkeypatch.setattr(quickstart, "check_machine", lambda: None)
    monkeypatch.setattr(quickstart, "runs", lambda python, code: True)
    monkeypatch.setattr(quickstart, "install_torch", lambda python: None)
    monkeypatch.setattr(quickstart, "install_package", lambda python, extra, keep: None)

    class Done:
        returncode = 0

    def run(command, **options):
        calls.append([str(word) for word in command[1:]])
        return Done

    monkeypatch.setattr(quickstart.subprocess, "run", run)
    assert quickstart.main() == 0
    assert calls[-1] == ["scripts/train_cifar10.py", "--scale", "full", "--epochs", "2"]


@pytest.mark.parametrize("name", ["bench_ops", "bench_model"])
def test_a_pytest_suite_run_by_python_says_how_to_run_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)  # as where it is not installed
    with pytest.raises(SystemExit, match=f"pytest benchmarks/{name}.py --benchmark-only"):
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")


@pytest.mark.parametrize("interrupted", [False, True])
def test_kernels_are_compiled_while_torch_is_fetched(interrupted, tmp_path, monkeypatch):
    build = tmp_path / "_build"
    build.mkdir()
    (build / "__init__.py").touch()
    (build / "native.py").write_text(
        "import pathlib, time\n"
        "def cpu_tasks(): return ['kernel']\n"
        "def compile_all(tasks):\n"
        f"    time.sleep({60 if interrupted else 0.2}); pathlib.Path('made').write_text(str(tasks))\n"
    )
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "runs", lambda python, code: False)
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.delenv("RAN_EXT_NO_NATIVE", raising=False)
    began = time.monotonic()
    with contextlib.suppress(quickstart.Problem), quickstart.kernels_meanwhile(tmp_path) as wait:
        if interrupted:
            raise quickstart.Problem("no network")
        wait()
    assert (tmp_path / "made").exists() is not interrupted
    assert time.monotonic() - began < 30
    monkeypatch.setenv("CXX", "no-such-compiler")
    with quickstart.kernels_meanwhile(tmp_path) as wait:
        wait()
