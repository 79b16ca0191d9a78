"""No Python file imports from a floor above its own: ops, nn, models, train, benchmarks, scripts."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Python's floors, from the lowest: a file imports from its own floor and from those below it.
FLOORS = {
    "base": "_C _backend _built_for _candidates _choice _command _errors _files _hardware _json _kept _lock _measured "
    "_muon _optimizers _paths _tracing _wrappers",
    "ops": "ops",
    "nn": "nn _fusion",
    "models": "models",
    "data": "data",
    "networks as a whole": "inference _attach _attention_maps _compare _compiled _convert _converted _deferred "
    "_explain _explain_converted _folded_conv _folded_graph _folding _info _joins _lower_weights _recipe "
    "_pooling _recomputed _taken _tune",
    "ran_ext": "__init__ __main__ info",
    "train": "train",
    "commands": "predict",
    "benchmarks": "benchmarks",
    "scripts": "scripts",
}
#: And the floors within ``ran_ext.train``, in the order that its docstring gives.
TRAIN = (
    *("system", "config", "recipe", "step", "evaluation", "checkpoint", "state", "report", "loop"),
    *("arguments", "cli", "__init__"),
)
#: Imports that run upwards, and why they may.
UPWARDS = {
    ("ran_ext/__init__.py", "ran_ext.train"): "on first use, so that whoever only calls the ops imports no trainer",
    ("ran_ext/__main__.py", "ran_ext.predict"): "on first use, likewise",
    ("ran_ext/__main__.py", "ran_ext.train.cli"): "on first use, likewise",
    ("ran_ext/_measured.py", "ran_ext"): "the version, when a file is read; the package is imported by then",
    ("ran_ext/_info.py", "ran_ext"): "the version, when it is printed; the package is imported by then",
}
PYTHON = [path for name in ("ran_ext", "benchmarks", "scripts") for path in sorted((ROOT / name).rglob("*.py"))]


def floor(module: str) -> tuple[int, int]:
    """The floor of ``ran_ext.ops.bn_relu`` and the like, and the one within it."""
    first, *rest = module.split(".")
    name = (rest or ["__init__"])[0] if first == "ran_ext" else first
    outer = next(number for number, names in enumerate(FLOORS.values()) if name in names.split())
    return outer, TRAIN.index((rest[1:] or ["__init__"])[0]) if name == "train" else 0


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(text: str, path: Path) -> set[str]:
    """The project's modules that a file imports, at any depth of nesting."""
    folder = list(path.relative_to(ROOT).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else []
            start = start + (node.module.split(".") if node.module else [])
            names |= {".".join([*start, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    ours = {name.split(".")[0] for name in names} & {"ran_ext", "benchmarks", "scripts"}
    return {_module(name) for name in names if name.split(".")[0] in ours}


def _module(name: str) -> str:
    """The module in ``name``, whose last part may be what is imported from it."""
    place = ROOT.joinpath(*name.split("."))
    there = place.with_suffix(".py").exists() or place.is_dir() or place.name == "_C"
    return name if there or "." not in name else _module(name.rpartition(".")[0])


def upward_imports(text: str, path: Path) -> list[str]:
    mine = floor(module_name(path))
    return sorted(
        module
        for module in imported_modules(text, path)
        if floor(module) > mine and (str(path.relative_to(ROOT)), module) not in UPWARDS
    )


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_runs_upwards(path):
    assert upward_imports(path.read_text(), path) == []


@pytest.mark.parametrize(("file", "text", "found"), [
    ("ran_ext/ops/bn_relu.py", "from .. import _backend\nfrom ..nn import BNReLU", ["ran_ext.nn"]),
    ("ran_ext/nn/units.py", "def f():\n    from .. import models, ops", ["ran_ext.models"]),
    ("ran_ext/models/cifar.py", "import ran_ext.train.cli", ["ran_ext.train.cli"]),
    ("ran_ext/_json.py", "from .ops import _checks", ["ran_ext.ops._checks"]),
    ("ran_ext/train/loop.py", "from benchmarks import student", ["benchmarks.student"]),
    ("ran_ext/train/recipe.py", "from .config import Config\nfrom . import loop", ["ran_ext.train.loop"]),
    ("benchmarks/timing.py", "from scripts.record import main", ["scripts.record"]),
    ("ran_ext/_files.py", "import importlib\nimportlib.import_module('ran_ext.data')", ["ran_ext.data"]),
    ("ran_ext/_info.py", "from . import __version__", []),
])  # fmt: skip
def test_the_rule_sees_an_import_that_runs_upwards(file, text, found):
    assert upward_imports(text, ROOT / file) == found


def test_each_exception_is_still_one():
    for file, module in UPWARDS:
        path = ROOT / file
        assert module in imported_modules(path.read_text(), path)
        assert floor(module) > floor(module_name(path))


def test_train_is_a_dozen_files_of_one_sitting():
    files = sorted((ROOT / "ran_ext" / "train").rglob("*.py"))
    assert sorted(path.stem for path in files) == sorted(TRAIN)
    assert {path.name: lines for path in files if (lines := len(path.read_text().splitlines())) >= 400} == {}
