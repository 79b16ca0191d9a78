"""Every module and network under every tool: equal to the plain twin, or an error that says what to do."""

from __future__ import annotations

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

from benchmarks.reference import networks  # noqa: E402

CELLS = [
    (tool, subject)
    for tool in TOOLS.values()
    for subject in SUBJECTS.values()
    if tool.acts_on(subject) and subject.name not in tool.slow
]


@pytest.mark.parametrize(("tool", "subject"), CELLS, ids=[f"{t.act.__name__}-{s.name}" for t, s in CELLS])
def test_cell(tool, subject, tmp_path, record_property):
    record_property("cell", [tool.name, subject.name, run(tool, subject, tmp_path)])


@pytest.mark.parametrize("name", ["ran_compact", "ran_base", "ran_paper"])
def test_the_twins_are_the_networks_that_the_package_is_measured_against(name):
    """Which up-sample before the mask's convolutions, and know even sizes only."""
    twin, reference = getattr(twins, name)(0.125).eval(), getattr(networks, name)(width=0.125).eval()
    subjects.randomise(twin)
    reference.load_state_dict(
        {key.replace("bn1.bn", "bn1").replace("bn2.bn", "bn2"): value for key, value in twin.state_dict().items()}
    )
    x = torch.randn(2, 3, 32, 32)
    agree(twin(x), reference(x), 1e-4)
