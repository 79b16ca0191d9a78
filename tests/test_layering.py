"""The folder says what a file may include."""

import ast
import os
import re
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
OF_TORCH = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^Python\.h$")
CSRC = ROOT / "csrc"
#: Of csrc/common, what knows no torch.
PLAIN = {"types.h", "formulas.h", "stencil.h", "asked.h", "measured.h", "measured.cpp"}
#: What the kernels may include of csrc/common.
SHARED = {"types.h", "formulas.h", "stencil.h"}
#: The folders of the torch side, from the lowest floor up; the kernels are below them all.
FLOORS = ["common", "batch_norm", "conv", "ops", "."]
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))


def is_torch_free(path: Path) -> bool:
    return path.parent.name in ("cpu", "cuda") or (path.parent.name == "common" and path.name in PLAIN)


def torch_includes(text: str) -> list[str]:
    return [name for name in INCLUDE.findall(text) if OF_TORCH.search(name)]


def upward_includes(path: str, text: str) -> list[str]:
    """What a file of csrc, named from there, includes of a floor above its own; of the kernels: of any other folder."""
    folder = PurePosixPath(path).parent
    found = []
    for name in INCLUDE.findall(text):
        if (CSRC / folder / name).exists():
            target = PurePosixPath(os.path.normpath(folder / name))
            there = str(target.parent)
            if there == str(folder):
                continue
            if str(folder) in ("cpu", "cuda"):
                wrong = there != "common" or target.name not in SHARED
            else:
                wrong = there not in ("cpu", "cuda") and FLOORS.index(there) > FLOORS.index(str(folder))
            if wrong:
                found.append(name)
    return found


def imports(text: str) -> set[str]:
    """Top-level packages that Python code imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", [*filter(is_torch_free, SOURCES)], ids=lambda path: str(path.relative_to(CSRC)))
def test_kernels_do_not_include_torch(path):
    assert torch_includes(path.read_text()) == []


def test_every_plain_file_is_there():
    assert {path.name for path in SOURCES if path.parent.name == "common" and is_torch_free(path)} == PLAIN


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_no_file_includes_a_floor_above_its_own(path):
    assert upward_includes(str(path.relative_to(CSRC)), path.read_text()) == []


def test_the_rule_sees_an_include_upwards():
    assert upward_includes("common/a.h", '#include "../conv/choose.h"\n#include "tensors.h"') == ["../conv/choose.h"]
    assert upward_includes("cpu/a.h", '#include "../common/tensors.h"\n#include "../common/types.h"') == [
        "../common/tensors.h"
    ]
    assert upward_includes("conv/a.cpp", '#include "../batch_norm/bn_relu.h"\n#include "../cpu/kernels.h"') == []


def test_the_rule_sees_an_include_of_torch():
    assert torch_includes("#include <vector>\n  # include <ATen/Parallel.h>\n") == ["ATen/Parallel.h"]
    assert torch_includes('#include <Python.h>\n#include "types.h"') == ["Python.h"]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "reference").glob("*.py")), ids=lambda path: path.name)
def test_reference_does_not_import_the_package(path):
    assert "ran_ext" not in imports(path.read_text())


def test_the_rule_sees_an_import():
    assert imports("def f():\n    import os\n    from ran_ext.nn import x") == {"os", "ran_ext"}


@pytest.mark.parametrize("folder", ["csrc/cpu", "csrc/cuda"])
def test_no_two_sources_share_a_stem(folder):
    """Their objects would be one file."""
    stems = [path.stem for path in (ROOT / folder).iterdir() if path.suffix in (".cpp", ".cu")]
    assert stems
    assert len(stems) == len(set(stems))
