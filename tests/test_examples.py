"""The examples run, at a tiny size; those that need a tool of the field do so in CI's second environment."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


#: What the other environment alone has; the rest that an example imports, the tests need as well.
ELSEWHERE = {"accelerate", "lightning", "timm", "torchvision"}


def needs(path: Path) -> set[str]:
    return set(re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.M)) & ELSEWHERE


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.elsewhere] if needs(path) else []) for path in EXAMPLES],
)
def test_runs_at_a_tiny_size(path, tmp_path):
    if missing := sorted(name for name in needs(path) if not importlib.util.find_spec(name)):
        pytest.skip(f"{', '.join(missing)} not installed; .ci/ecosystem runs this example")
    done = subprocess.run(
        [sys.executable, path, "--tiny"], capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def test_converting_is_one_added_line():
    for name in ("lightning_cnn", "timm_train", "torchvision_train"):
        text = (ROOT / "examples" / f"{name}.py").read_text()
        assert text.count("# the added line") == text.count("ran_ext.convert(") == 1
