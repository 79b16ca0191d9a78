"""Every instruction set's kernels, on the processor at hand: torch's own switch chooses torch's kernels and ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
CAPABILITIES = ["default", "avx2", "avx512"]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_values_and_gradients(capability):
    here = torch.backends.cpu.get_cpu_capability().lower()
    if here in CAPABILITIES and CAPABILITIES.index(capability) >= CAPABILITIES.index(here):
        pytest.skip(f"{here} is the most that runs here, and the suite itself runs with it")
    names = ("attention_gate", "bn_relu", "bn_relu_conv", "conv2d", "conv3x3", "max_pool", "upsample_add", "statistics")
    files = [str(TESTS / f"test_{name}.py") for name in names]
    chosen = "values_gradients or values_and_gradients or nan or large_mean or costs_no_digit or whole_numbers"
    chosen += " or any_channels or without_a_floor"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *files],
        cwd=TESTS.parent,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "RAN_EXT_BACKEND": "native", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_switch_chooses(capability):
    code = "import ran_ext._C as c; print(c.build_info()['cpu_kernels'])"
    done = subprocess.run(
        [sys.executable, "-c", "import torch; " + code],
        cwd=TESTS.parent,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() in {"default": ("baseline",), "avx2": ("avx2", "baseline")}[capability], done.stderr
