"""What the user asks for of paths: setters, the older environment variables, and what the ops are told."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import ran_ext
from ran_ext import _paths

SETTERS = {
    "conv1x1": (ran_ext.set_conv1x1, ran_ext.get_conv1x1, _paths.CONV1X1_PATHS),
    "bn_relu": (ran_ext.set_bn_relu, ran_ext.get_bn_relu, _paths.BN_RELU_PATHS),
}


@pytest.mark.parametrize("name", SETTERS)
def test_a_block_holds_inside_and_in_its_thread(name):
    choose, get, (auto, ours, other) = SETTERS[name]
    assert get() == auto
    with choose(ours), ThreadPoolExecutor(1) as pool:
        assert get() == ours
        assert pool.submit(get).result() == auto
        with choose(other):
            assert get() == other
        assert get() == ours
    assert get() == auto
    choose(other)
    assert get() == other
    choose(auto)
    with pytest.raises(ValueError, match=f"set_{name}: path must be one of {auto}, {ours}, {other}, got 'fast'"):
        choose("fast")


@pytest.mark.parametrize("conv3x3", _paths.CONV3X3_MODES)
@pytest.mark.parametrize("conv1x1", _paths.CONV1X1_PATHS)
@pytest.mark.parametrize("bn_relu", _paths.BN_RELU_PATHS)
def test_what_the_ops_are_told(conv3x3, conv1x1, bn_relu):
    """On the CPU the 3x3 mode alone; elsewhere all three, as csrc/common/asked.h takes them apart."""
    with ran_ext.set_conv3x3(conv3x3), ran_ext.set_conv1x1(conv1x1), ran_ext.set_bn_relu(bn_relu):
        mode = _paths.CONV3X3_MODES.index(conv3x3)
        others = 4 * _paths.CONV1X1_PATHS.index(conv1x1) + 12 * _paths.BN_RELU_PATHS.index(bn_relu)
        assert _paths.paths(torch.empty(1)) == mode
        assert _paths.gpu_paths(torch.empty(1)) == 0
        assert _paths.paths(torch.empty(1, device="meta")) == mode + others
        assert _paths.gpu_paths(torch.empty(1, device="meta")) == others


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("paths", [-1, 36, 2**40])
def test_the_ops_take_no_other_number(paths):
    x, weight = torch.randn(2, 4, 3, 3), torch.randn(4, 4, 1, 1)
    ops = torch.ops.ran_ext
    for call in (
        lambda: ops.conv2d(x, weight, None, [1, 1], [0, 0], paths),
        lambda: ops.bn_relu(x, None, None, None, None, True, [], None, 1e-5, paths),
        lambda: ops.bn_relu_conv2d(x, weight, running=[], paths=paths),
        lambda: ops.conv_attention_gate(x, x, weight, None, 1, paths),
    ):
        with pytest.raises(ValueError, match=f"paths must be from 0 to 35, got {paths}"):
            call()


@pytest.mark.usefixtures("native")
def test_every_number_gives_the_same_result_on_the_cpu():
    x, weight = torch.randn(2, 4, 3, 3), torch.randn(4, 4, 1, 1)
    ops = torch.ops.ran_ext
    norm = ops.bn_relu(x, None, None, None, None, True, [], None, 1e-5)[0]
    for paths in range(3, 27, 3):
        assert torch.equal(ops.bn_relu(x, None, None, None, None, True, [], None, 1e-5, paths)[0], norm)
        assert torch.equal(
            ops.conv2d(x, weight, None, [1, 1], [0, 0], paths), ops.conv2d(x, weight, None, [1, 1], [0, 0])
        )


def imported(variable: str, value: str) -> subprocess.CompletedProcess[str]:
    code = "import ran_ext; print(ran_ext.get_conv1x1(), ran_ext.get_bn_relu())"
    command = [sys.executable, "-W", "always::DeprecationWarning", "-c", code]
    return subprocess.run(command, env={**os.environ, variable: value}, capture_output=True, text=True)


@pytest.mark.parametrize(("variable", "value", "said", "setter"), [
    ("RAN_EXT_CONV1X1", "fused", "fused auto", "set_conv1x1('fused')"),
    ("RAN_EXT_BN_RELU", "streaming", "auto streaming", "set_bn_relu('streaming')"),
])  # fmt: skip
def test_the_variables_still_work_and_say_once_what_replaces_them(variable, value, said, setter):
    ran = imported(variable, value)
    assert ran.stdout.strip() == said
    assert ran.stderr.count(f"{variable} is deprecated: call ran_ext.{setter}") == 1
    wrong = imported(variable, "sideways")
    assert wrong.returncode == 1
    assert f"ValueError: the environment variable {variable} must be one of auto, " in wrong.stderr
    assert "deprecated" not in imported(variable, "").stderr
