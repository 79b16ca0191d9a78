"""Every module and network under every tool: equal to the plain twin, or an error that says what to do."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest

TOOLS_OF_THE_FIELD = (
    "accelerate captum fvcore lightning onnx onnxruntime onnxscript peft ptflops safetensors thop timm torchao "
    "torchinfo torchvision"
)
if missing := [name for name in TOOLS_OF_THE_FIELD.split() if importlib.util.find_spec(name) is None]:
    pytest.skip(
        f"{', '.join(missing)} not installed here: `.ci/ecosystem` makes the environment that has them",
        allow_module_level=True,
    )

import ecosystem.tools  # noqa: E402, F401  fills the table
import torch  # noqa: E402
from ecosystem import subjects, twins  # noqa: E402
from ecosystem.harness import SUBJECTS, TOOLS, agree, run  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from benchmarks.reference import networks  # noqa: E402

CELLS = [
    pytest.param(
        tool,
        subject,
        id=f"{tool.act.__name__}-{subject.name}",
        marks=[pytest.mark.rare] if tool.is_rare(subject.name) else [],
    )
    for tool in TOOLS.values()
    for subject in SUBJECTS.values()
    if tool.acts_on(subject) and subject.name not in tool.slow
]


@pytest.mark.parametrize(("tool", "subject"), CELLS)
def test_cell(tool, subject, tmp_path, record_property):
    record_property("cell", [tool.name, subject.name, run(tool, subject, tmp_path)])


@pytest.mark.parametrize("name", ["ran_compact", "ran_base", "ran_paper"])
def test_the_twins_are_the_networks_that_the_package_is_measured_against(name):
    """Which up-sample before the mask's convolutions, and know even sizes only."""
    twin, reference = getattr(twins, name)(0.125).eval(), getattr(networks, name)(width=0.125).eval()
    subjects.randomise(twin)
    reference.load_state_dict(twin.state_dict())
    x = torch.randn(2, 3, 32, 32)
    agree(twin(x), reference(x), 1e-4)


class Bypass(twins.BNReLUConv2d):
    """Right for itself, but reads the parameters of ``bn`` and ``conv`` without a call of the two."""

    def forward(self, x):
        bn, conv = self.bn, self.conv
        statistics = bn.running_mean, bn.running_var
        x = F.relu(F.batch_norm(x, *statistics, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps))
        if bn.training:
            bn.num_batches_tracked += 1
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)


ACTS_THROUGH_CALLS = (
    "changing_hook forward_hooks grad_cam group_norm lora offload pruning replaced_forward spectral_norm_hook thop "
    "weight_norm_hook"
)


@pytest.mark.parametrize("name", ["deep", *ACTS_THROUGH_CALLS.split()])
def test_the_table_finds_what_is_passed_over(name, tmp_path):
    tool = next(tool for tool in TOOLS.values() if tool.act.__name__ == name)
    subject = dataclasses.replace(SUBJECTS["BNReLUConv2d"], build=lambda: Bypass(32, 32, 3, padding=1))
    if name == "deep":
        assert run(tool, subject, tmp_path) == "="
    else:
        with pytest.raises(Exception):  # noqa: B017, PT011  a wrong value, or what the tool fails with
            run(tool, subject, tmp_path)
