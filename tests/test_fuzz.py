"""A bounded run of fuzz_ops.py, whose docstring says what is held to what."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.usefixtures("native")
def test_a_thousand_random_calls():
    done = subprocess.run(
        [sys.executable, str(TESTS / "fuzz_ops.py"), "--cases", "1000", "--seed", "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1000 cases, 0 faults" in done.stdout
