"""The documentation says what is true: its code runs, its commands and options exist, and the reference is complete."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = ROOT / "docs" / "reference"
MODULES = ["ran_ext", *(f"ran_ext.{name}" for name in ("ops", "nn", "models", "data", "train"))]
#: Of the guides; where one is missing, the page runs in CI's second environment.
ELSEWHERE = ("accelerate", "lightning", "timm", "torchvision", "webdataset")
COMMANDS = sorted(
    f"{path.parent.name}.{path.stem}"
    for folder in ("scripts", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if re.search(r"^def main\(|import main$", path.read_text(), re.M)
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


#: Its programs show faults of other libraries: they may corrupt the memory of their process, or end it.
FAULTS = ROOT / "docs" / "upstream.md"
WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and page != FAULTS]
WITH_COMMANDS = [page for page in PAGES if blocks(page, "bash")]


def needs(page: Path) -> list[str]:
    code = "\n".join(blocks(page, "python"))
    return [name for name in ELSEWHERE if re.search(rf"\b{name}\b", code)]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=named(page), marks=[pytest.mark.elsewhere] if needs(page) else []) for page in WITH_PYTHON],
)
def test_python_blocks_run_as_pasted_one_after_the_other(page, tmp_path, monkeypatch):
    if missing := [name for name in needs(page) if not importlib.util.find_spec(name)]:
        pytest.skip(f"{', '.join(missing)} not installed; .ci/ecosystem runs this page")
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__main__"}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of other packages
        for number, block in enumerate(blocks(page, "python")):
            exec(compile(block, f"{named(page)}, block {number + 1}", "exec"), space)


@pytest.mark.parametrize("block", blocks(FAULTS, "python"), ids=lambda block: str(len(block)))
def test_programs_that_show_faults_end_in_no_error_of_python(block, tmp_path):
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode <= 0, done.stderr  # 0 or a signal


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each ``python`` command of this repository on a page: the module, and its options."""
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
        if words[:1] == ["torchrun"]:
            words = ["python", *(word for word in words[1:] if not word.startswith("--nproc"))]
        if words and words[0] in ("ran-ext-train", "ran-ext-predict"):
            module = "scripts/train_cifar10.py" if words[0] == "ran-ext-train" else "ran_ext/predict.py"
            words[:1] = ["python", module]
        if not words or not re.fullmatch(r"python3?", words[0]):
            continue
        module = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
        if module.partition(".")[0] in ("scripts", "benchmarks", "ran_ext"):
            yield module, [word for word in words if word.startswith("--")]


def help_of(module: str, capsys: pytest.CaptureFixture[str]) -> str:
    main = importlib.import_module("ran_ext.__main__" if module == "ran_ext" else module).main
    with pytest.raises(SystemExit) as stop:
        main(["--help-all" if module == "scripts.train_cifar10" else "--help"])
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_commands_on_a_page_exist_with_the_options_that_it_names(page, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for module, options in commands(page):
        if module == "scripts.quickstart":
            continue  # hands its options on, to the trainer and to pytest
        said = help_of(module, capsys)
        for option in options:
            assert re.search(rf"(?<![\w-]){re.escape(option.partition('=')[0])}\b", said), f"{module} has no {option}"


def test_this_checks_commands_at_all():
    assert {module for page in WITH_COMMANDS for module, _ in commands(page)} >= {"scripts.record", "ran_ext"}


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference_and_documented(module):
    page = (REFERENCE / f"{module.rpartition('.')[2]}.md").read_text()
    names = importlib.import_module(module).__all__
    for name in names:
        thing = getattr(importlib.import_module(module), name)
        if inspect.ismodule(thing):
            continue
        # twice where the module has the function's name, for griffe takes the module
        assert re.search(rf"^::: {module}\.{name}(\.{name})?$", page, re.M), f"docs/reference lacks {module}.{name}"
        if inspect.isclass(thing) or inspect.isroutine(thing):
            assert inspect.getdoc(thing), f"{module}.{name} has no docstring"
    listed = re.findall(rf"^::: {re.escape(module)}\.(\w+)", page, re.M)
    assert set(listed) <= set(names), f"docs/reference lists what {module} has not"


def test_every_command_is_in_the_reference():
    listed = re.findall(r"^<!-- help: (\S+)(?: --help-all)? -->$", (REFERENCE / "commands.md").read_text(), re.M)
    assert sorted(listed) == sorted([*COMMANDS, "ran_ext", "ran_ext.predict"])


def test_every_environment_variable_is_in_the_reference():
    folders = [ROOT / name for name in ("ran_ext", "csrc", "_build", "scripts", "benchmarks")]
    kinds = (".py", ".cpp", ".h", ".cu", ".cuh")
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in kinds]
    texts = [path.read_text() for path in [*files, ROOT / "setup.py"]]
    read = {name for text in texts for name in re.findall(r"\"(RAN_EXT_[A-Z0-9_]+)\"", text)}
    page = (REFERENCE / "environment.md").read_text()
    assert len(read) > 3
    assert [name for name in read if f"`{name}" not in page] == []


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_of_the_repository(page):
    for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / link).exists(), f"{named(page)} links to {link}"
