"""ran_ext.train's SGD: the first step may be one that a GradScaler skips."""

import pytest
import torch

from ran_ext.train.config import Config
from ran_ext.train.recipe import build_optimizer


def steps(prefilled: bool, gradients: list[float], found_inf: list[float]) -> torch.Tensor:
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(layer.weight, 0.5)
    sgd = build_optimizer(layer, Config(optimizer="nesterov"), torch.device("cpu"))
    if not prefilled:
        sgd.state.clear()
    for gradient, inf in zip(gradients, found_inf, strict=True):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        sgd.grad_scale, sgd.found_inf = (
            torch.tensor(1.0),
            torch.tensor(float(inf)),
        )  # as GradScaler.step hands them over
        sgd.step()
    return layer.weight.detach()


@pytest.fixture
def garbage(monkeypatch):
    """What memory holds that nobody has written."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: empty_like(*args, **options).fill_(float("nan")))


def test_a_skipped_first_step_leaves_a_momentum_that_is_zero(garbage):
    assert torch.equal(steps(True, [float("inf"), 0.25, 0.5], [1, 0, 0]), steps(True, [0.25, 0.5], [0, 0]))


def test_the_first_step_is_torchs_own(garbage):
    assert torch.equal(steps(True, [0.25, 0.5], [0, 0]), steps(False, [0.25, 0.5], [0, 0]))
