"""The folder says what a file may include."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
OF_TORCH = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|torch_glue\.h$|^Python\.h$")


def torch_free(root: Path) -> list[Path]:
    """The kernels' files, and the two headers that they share with the torch side."""
    kernels = [path for name in ("cpu", "cuda") for path in (root / name).rglob("*") if path.is_file()]
    return sorted(path for path in [*kernels, root / "types.h", root / "math.h"] if path.suffix not in (".json", ".md"))


def torch_includes(text: str) -> list[str]:
    return [name for name in INCLUDE.findall(text) if OF_TORCH.search(name)]


def imports(text: str) -> set[str]:
    """Top-level packages that Python code imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", torch_free(ROOT / "csrc"), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_do_not_include_torch(path):
    assert torch_includes(path.read_text()) == []


def test_the_rule_sees_an_include_of_torch():
    assert torch_includes("#include <vector>\n  # include <ATen/Parallel.h>\n") == ["ATen/Parallel.h"]
    assert torch_includes('#include "../torch_glue.h"\n#include "types.h"') == ["../torch_glue.h"]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "reference").glob("*.py")), ids=lambda path: path.name)
def test_reference_does_not_import_the_package(path):
    assert "ran_ext" not in imports(path.read_text())


def test_the_rule_sees_an_import():
    assert imports("def f():\n    import os\n    from ran_ext.nn import x") == {"os", "ran_ext"}


@pytest.mark.parametrize("folder", ["csrc", "csrc/cpu", "csrc/cuda"])
def test_no_two_sources_share_a_stem(folder):
    """Their objects would be one file."""
    stems = [path.stem for path in (ROOT / folder).iterdir() if path.suffix in (".cpp", ".cu")]
    assert stems
    assert len(stems) == len(set(stems))
