"""ran_ext.explain: what runs, why, and what the faster path would take."""

import copy
import re

import pytest
import torch
from torch import nn

from ran_ext import explain, models, set_backend
from ran_ext._explain import FUSED, LIBRARY, PLAIN, layers
from ran_ext.nn import AttentionModule, BNReLUConv2d

needs_kernels = pytest.mark.usefixtures("native")


def test_every_fused_call_is_listed_in_order():
    model = models.ran_compact(width=0.25)
    names = [layer.name for layer in layers(model, torch.randn(2, 3, 32, 32))]
    units = [name for name, module in model.named_modules() if isinstance(module, BNReLUConv2d)]
    assert set(units) <= set(names)
    assert names[:4] == ["conv1", "bn1", "stage1.0.conv1", "stage1.0.shortcut"]
    assert names[-1] == "bn2"


def test_leaves_the_network_and_the_random_numbers_alone():
    model = models.ran_compact(width=0.125)
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    explain(model, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in model.modules())


@needs_kernels
def test_says_what_the_faster_way_takes():
    unit = nn.Sequential(BNReLUConv2d(32, 64, 1))
    [row] = layers(unit, torch.randn(2, 32, 4, 4))
    assert row.x == "2x32x4x4 float32"
    assert row.paths["forward"][0] == LIBRARY
    assert "memory_format=torch.channels_last" in row.paths["forward"][1]
    [row] = layers(unit, torch.randn(2, 32, 4, 4).to(memory_format=torch.channels_last))
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert {path for path, _ in row.paths.values()} == {FUSED}
    else:
        assert "AVX2 or NEON" in row.paths["forward"][1]


@needs_kernels
def test_names_autocast_and_unfused_kinds():
    unit, x = nn.Sequential(BNReLUConv2d(32, 32, 1)), torch.randn(2, 32, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        [row] = layers(unit, x)
    assert "wider than autocast's torch.bfloat16" in row.paths["forward"][1]
    unit[0].conv = nn.Conv2d(32, 32, 3, padding=1, groups=2)
    paths = {layer.name: layer.paths["forward"] for layer in layers(unit, x)}
    assert paths["0"][0] == PLAIN
    assert paths["0"][1] == "conv has groups=2, dilation=(1, 1), padding_mode='zeros': runs as written"


@needs_kernels
def test_gate_says_whether_the_convolution_before_it_is_inside():
    module, x = AttentionModule(8, 1).eval(), torch.randn(2, 8, 8, 8)
    gate = {layer.name: layer for layer in layers(module, x)}["gate"].paths["forward"]
    assert gate == (FUSED, "without the convolution before it: the CPU has no kernel for both")
    module.gate.register_forward_hook(lambda *args: None)
    gate = {layer.name: layer for layer in layers(module, x)}["gate"].paths["forward"]
    assert gate == (FUSED, "the convolution before it apart: a forward hook on gate")


def test_prints_a_table_with_numbered_reasons(capsys):
    with set_backend("reference"):
        explain(AttentionModule(8, 1), torch.randn(2, 8, 8, 8))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("21 layers: 19 plain PyTorch, 2 library; kept for backward: ")
    assert lines[1].split() == ["layer", "op", "input", "forward", "dgrad", "wgrad", "kept,", "MB"]
    assert lines[-1].startswith("[1] the reference backend was chosen")
    assert sum("attention_gate" in line for line in lines) == 1


@needs_kernels
def test_the_first_line_counts_layers_and_the_bytes_of_both(capsys):
    unit = nn.Sequential(BNReLUConv2d(32, 64, 3, padding=1), BNReLUConv2d(64, 64, 3, padding=1))
    x = torch.randn(32, 32, 32, 32).to(memory_format=torch.channels_last)
    explain(unit, x.requires_grad_())
    first = capsys.readouterr().out.splitlines()[0]
    # Kept: both inputs and a few vectors a channel; plain PyTorch keeps the value after ReLU as well.
    inputs = 4 * 32 * 32 * 32 * (32 + 64)
    ours, plain = (1e6 * float(number) for number in re.findall(r"([\d.]+) MB", first))
    assert ours == pytest.approx(inputs, abs=1e5)
    assert plain >= 2 * inputs
    assert [row.kept for row in layers(unit, x)] == [
        pytest.approx(4 * 32 * 32 * 32 * 32, abs=5e4),
        pytest.approx(4 * 32 * 32 * 32 * 64, abs=5e4),
    ]
    explain(unit.eval(), x)
    assert "MB" not in capsys.readouterr().out
