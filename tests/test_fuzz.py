"""A bounded run of fuzz_ops.py, whose docstring says what is held to what."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz_cases import MAKERS, Case, make
from fuzz_ops import spreads

import ran_ext

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


def test_every_op_is_drawn():
    named = {name.removesuffix("_ref") for name in ran_ext.ops.__all__ if name.endswith("_ref")}
    assert named <= set(MAKERS)


def test_means_of_exactly_0_are_drawn():
    means = [make(str(seed), "bn_relu")[0].arguments["x"].double().mean((0, 2, 3)) for seed in range(300)]
    assert any(mean.numel() and not mean.any() for mean in means)


@pytest.mark.usefixtures("native")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs the 3x3 kernels")
def test_a_convolution_whose_tiles_spread_a_nan_is_known():
    x = torch.randn(8, 64, 16, 16).to(memory_format=torch.channels_last)
    for kernel, spread in ((3, True), (1, False)):
        weight = torch.randn(64, 64, kernel, kernel)
        arguments = {"x": x, "weight": weight, "stride": 1, "padding": kernel // 2}
        assert spreads(Case("bn_relu_conv2d", arguments, ("x",))) is spread
