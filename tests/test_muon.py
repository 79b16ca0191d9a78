"""ran_ext.train's Muon against singular value decompositions, torch.optim.SGD and its own formula."""

import copy
import math

import pytest
import torch
from torch import nn

from ran_ext._muon import COEFFICIENTS, ITERATIONS, MOMENTUM, SHARE, Muon, orthogonalize
from ran_ext.train import Config, build_optimizer, set_lr

CPU = torch.device("cpu")


def small_network(layout=torch.contiguous_format):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 1)]
    depthwise = nn.Conv2d(16, 16, 3, groups=16, padding=1)
    return nn.Sequential(*layers, depthwise, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).to(
        memory_format=layout
    )


def train(network, optimizer, steps=3):
    torch.manual_seed(1)
    images, labels = torch.randn(8, 3, 10, 10), torch.arange(8) % 4
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 8, 72), (1, 72, 8), (1, 1, 9)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singular_values_become_about_one_and_the_vectors_stay(shape, scale):
    torch.manual_seed(0)
    # singular values within a factor of ten: smaller ones need more iterations
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = values.clamp(min=values.max() / 10)
    matrices = orthogonalize(scale * (left * values[:, None]) @ right)
    inner = left.mT @ matrices @ right.mT
    diagonal = inner.diagonal(dim1=1, dim2=2)
    assert (diagonal > 0.6).all()
    assert (diagonal < 1.25).all()
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 1e-3


def test_zero_stays_zero_and_nan_spreads_no_further_than_its_matrix():
    matrices = torch.zeros(2, 4, 8)
    matrices[1, 0, 0] = float("nan")
    result = orthogonalize(matrices)
    assert torch.equal(result[0], torch.zeros(4, 8))
    assert result[1].isnan().all()


def polar(matrices):
    """The same polynomial of the singular values, by a decomposition in float64."""
    a, b, c = COEFFICIENTS
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / matrices.double().norm(dim=(1, 2))[:, None]
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    return left @ (values[..., None] * right)


@pytest.mark.parametrize("shape", [(3, 32, 288), (2, 64, 16), (2, 24, 48)])
@pytest.mark.parametrize(("condition", "bounds"), [(1e1, (1e-5, 0.02)), (1e3, (1e-3, 0.15)), (1e5, (1e-3, 0.3))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # whose digits small singular values exceed
def test_the_iteration_is_the_polynomials_whichever_way_it_goes(shape, condition, bounds, dtype):
    torch.manual_seed(0)
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -math.log10(condition), values.shape[1]).expand_as(values)
    matrices = (left @ (values[..., None] * right)).to(dtype)
    difference = orthogonalize(matrices).double() - polar(matrices)
    assert difference.norm() / polar(matrices).norm() < bounds[dtype == torch.bfloat16]


def test_convolutions_alone_are_orthogonalized_but_for_first_and_depthwise_ones():
    network = small_network()
    optimizer = build_optimizer(network, Config(optimizer="muon", dtype="float32", momentum=0.8), CPU)
    assert isinstance(optimizer, Muon)
    matrices, rest, vectors = optimizer.param_groups
    assert [group["orthogonal"] for group in optimizer.param_groups] == [True, False, False]
    assert [id(p) for p in matrices["params"]] == [id(network[i].weight) for i in (2, 3, 4)]
    assert [id(p) for p in rest["params"]] == [id(network[i].weight) for i in (0, 5, 8)]
    assert all(p.dim() == 1 for p in vectors["params"])
    assert [group["momentum"] for group in optimizer.param_groups] == [MOMENTUM, 0.8, 0.8]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))


@pytest.mark.parametrize("scope", ["all", "dense"])
def test_decay_reaches_weights_alone(scope):
    config = Config(optimizer="muon", dtype="float32", weight_decay=0.01, weight_decay_scope=scope)
    decays = [group["weight_decay"] for group in build_optimizer(small_network(), config, CPU).param_groups]
    assert decays == ([0.01, 0.01, 0.0] if scope == "all" else [0.0, 0.0, 0.0])


def test_a_network_without_such_convolutions_trains_as_by_sgd():
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(300, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    settings = {"lr": 0.05, "weight_decay": 0.01, "weight_decay_scope": "all", "dtype": "float32"}
    kinds = ("muon", "nesterov")
    muon, sgd = (
        build_optimizer(network, Config(optimizer=kind, **settings), CPU)
        for network, kind in zip(networks, kinds, strict=True)
    )
    assert train(networks[0], muon) == pytest.approx(train(networks[1], sgd), rel=1e-5)
    for mine, theirs in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_step_follows_its_formula():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(32, 8, 1, 1))
    before, gradients = weight.detach().clone().view(32, 8), torch.randn(2, 32, 8)
    group = {"params": [weight], "weight_decay": 0.1, "orthogonal": True}
    muon = Muon([group], torch.tensor(0.5), momentum=0.9)
    momentum = torch.zeros(32, 8)
    for gradient, lr in zip(gradients, (0.5, 0.25), strict=True):
        set_lr(muon, lr)
        weight.grad = gradient.view(32, 8, 1, 1).clone()
        muon.step()
        momentum = MOMENTUM * momentum + gradient
        direction = orthogonalize((gradient + MOMENTUM * momentum)[None])[0]
        before = (1 - 0.1 * lr) * before - SHARE * lr * 2 * direction  # 2: the root of 32 / 8
        torch.testing.assert_close(weight.detach().view(32, 8), before, rtol=1e-4, atol=1e-5)
        assert torch.equal(weight.grad.view(32, 8), gradient)


def test_both_layouts_train_alike_and_the_loss_falls():
    losses = []
    for layout in (torch.contiguous_format, torch.channels_last):
        network = small_network(layout)
        optimizer = build_optimizer(network, Config(optimizer="muon", dtype="float32", lr=0.05), CPU)
        losses.append(train(network, optimizer, steps=40))
        assert network[2].weight.is_contiguous(memory_format=layout)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_products_in_bfloat16_where_the_run_is():
    network = small_network()
    for dtype, bfloat16 in (("float32", False), ("bfloat16", True), ("float16", False)):
        optimizer = build_optimizer(network, Config(optimizer="muon", dtype=dtype), CPU)
        assert {group["bfloat16"] for group in optimizer.param_groups} == {bfloat16}
    optimizer = build_optimizer(network, Config(optimizer="muon", dtype="bfloat16", lr=0.05), CPU)
    losses = train(network, optimizer, steps=40)
    assert losses[-1] < losses[0] - 0.1
    assert network[2].weight.dtype == torch.float32


def test_parameters_without_gradients_stay():
    network = small_network()
    optimizer = build_optimizer(network, Config(optimizer="muon", dtype="float32"), CPU)
    before = [p.detach().clone() for p in network.parameters()]
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))


def test_a_copy_and_a_closure_step_alike():
    """As tools take them: ``copy.deepcopy`` of an optimizer and its network, ``step(closure)``."""
    network = small_network()
    optimizer = build_optimizer(network, Config(optimizer="muon", dtype="bfloat16", lr=0.05), CPU)
    train(network, optimizer, steps=2)
    network_copy, optimizer_copy = copy.deepcopy((network, optimizer))

    def closure():
        optimizer_copy.zero_grad()
        loss = network_copy(torch.ones(2, 3, 10, 10)).square().sum()
        loss.backward()
        return loss

    optimizer.zero_grad()
    network(torch.ones(2, 3, 10, 10)).square().sum().backward()
    optimizer.step()
    assert optimizer_copy.step(closure).item() > 0
    for mine, theirs in zip(network.parameters(), network_copy.parameters(), strict=True):
        assert torch.equal(mine, theirs)
