"""Weights cast together give autocast's bits: steps, parts of a batch, shared and frozen weights, a penalty."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ran_ext._lower_weights import LowerWeights
from ran_ext.data import CIFAR10
from ran_ext.models import create_model
from ran_ext.train import Config, Ranks, TrainStep, fit


def network() -> nn.Module:
    torch.manual_seed(0)
    model = create_model("ran_compact", width=0.125, dropout=0.0)
    return model.to(memory_format=torch.channels_last).train()


class Shared(nn.Module):
    """A layer that runs twice, and another with the same weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.second.weight = self.first.weight
        self.norm, self.last = nn.BatchNorm1d(12), nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.second(self.first(self.first(x.flatten(1))))))


def trained(model: nn.Module, together: bool, steps: int = 2, **options) -> list[torch.Tensor]:
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    penalty = (lambda: sum(p.square().sum() for p in model.parameters())) if options.get("l2") else None
    called = LowerWeights(model, torch.bfloat16) if together else model
    step = TrainStep(called, optimizer, dtype=torch.bfloat16, penalty=penalty, **options)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        images = torch.randn((4, 12) if isinstance(model, Shared) else (4, 3, 32, 32), generator=generator)
        losses.append(step(images, torch.arange(4))[0])
    return [*losses, *model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"l2": 1e-3}], ids=str)
def test_a_step_of_the_network_has_autocasts_bits(options):
    model = network()
    found, expected = trained(model, True, **options), trained(model, False, **options)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    assert expected[0] != expected[1]  # it learns


def test_shared_weights_are_one_copy():
    model = Shared()
    assert len(LowerWeights(model, torch.bfloat16).weights) == 4
    assert all(map(torch.equal, trained(model, True), trained(model, False)))


def test_frozen_weights_get_no_gradient():
    model = network()
    for parameter in list(model.parameters())[:12]:
        parameter.requires_grad_(False)
    found, expected = trained(model, True), trained(model, False)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_other_dtypes_and_normalisations_are_left_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1).double(), nn.Conv2d(8, 8, 1).bfloat16()
    )
    lower = LowerWeights(model, torch.bfloat16)
    assert list(lower.copies) == ["0.weight", "0.bias"]
    assert LowerWeights(nn.ReLU(), torch.bfloat16)(torch.ones(1)) == 1  # none to cast


def test_a_weight_that_changed_in_place_is_seen():
    model = nn.Linear(2, 1, bias=False)
    lower, x = LowerWeights(model, torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)
    before = lower(x).item()
    with torch.no_grad():
        model.weight.add_(1)
    assert lower(x).item() == pytest.approx(before + 2, abs=0.02)
    F.mse_loss(lower(x), x[:, :1]).backward()
    lower.add_gradients()
    assert all(copy_.grad is None for copy_ in lower.copies.values())
    assert model.weight.grad is not None


class Standardised(nn.Conv2d):
    """Computes with its weight in float32, and is cast by autocast only then."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, padding=1)


class WithoutAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.linear(x.float().mean((2, 3)))


def others() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Standardised(3, 8, 3), WithoutAutocast())


def test_networks_that_compute_with_their_weights_are_left_to_autocast(tmp_path):
    assert not LowerWeights.serves(others())
    assert not LowerWeights.serves(nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)))
    assert LowerWeights.serves(network())
    assert LowerWeights(Standardised(3, 8, 3), torch.bfloat16).copies == {}
    images, config = (
        CIFAR10.sample("train").subset(torch.arange(32)),
        Config(epochs=1, batch_size=8, dtype="bfloat16", patience=0, select="last", val_images=0, weight_decay=0.0),
    )
    states = []
    for step in ("eager", "graph"):
        model = others()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no GPU for a graph
            fit(model, images, None, config, tmp_path / step, step=step, ranks=Ranks(0, 1, torch.device("cpu")))
        states.append(model.state_dict().values())
    assert all(map(torch.equal, *states))
