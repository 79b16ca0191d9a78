"""``convert``: the same values, gradients, buffers and keys, in less memory; what it leaves, and what it says."""

import copy

import pytest
import torch
from small_networks import NETWORKS, Scale, assert_same, build, images, pair, step
from torch import nn

from ran_ext import _backend, compare, convert, fused, models, revert, set_backend
from ran_ext._compare import bytes_kept
from ran_ext._converted import Deferring
from ran_ext._explain import layers


@pytest.mark.parametrize("name", NETWORKS)
def test_training_and_evaluation_are_the_same(name):
    plain, ours = pair(name)
    for seed in range(3):  # what a normalisation learns of its surroundings changes the later calls
        x = images(seed=seed)
        assert_same(step(plain, x), step(ours, x))
        assert_same(list(plain.buffers()), list(ours.buffers()))
    assert_same([plain.eval()(x)], [ours.eval()(x)])
    assert type(ours(x)) is torch.Tensor
    assert_same(step(plain.train(), x), step(ours.train(), x))


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_as_accurate_as_before(name):
    plain, ours = pair(name, torch.float32)
    x = images(torch.float32)
    truth = step(copy.deepcopy(plain).double(), x.double())
    scale = max(t.abs().max() for t in truth)
    for mine, theirs, true in zip(step(ours, x), step(plain, x), truth, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + 1e-6 * scale


def test_keys_order_and_types_stay():
    plain, ours = pair("preact")
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [type(m).__name__ for m in ours.modules()] == [type(m).__name__ for m in plain.modules()]
    assert all(isinstance(mine, type(theirs)) for mine, theirs in zip(ours.modules(), plain.modules(), strict=True))
    ours.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *(("preact", 0.62), ("mobile", 0.50), ("silu", 0.5), ("gelu", 0.5), ("dense", 0.60), ("no dropout", 0.55)),
        *(("dropout in place", 0.45), ("pooled", 0.65), ("pooled by two", 0.65)),
    ],
)
def test_bytes_kept_fall(name, most):
    plain, ours = pair(name, torch.float32)
    x = torch.randn(8, 3, 32, 32)
    step(ours, x)
    assert bytes_kept(ours, [x]) <= most * bytes_kept(plain, [x])


@pytest.fixture
def without_kernels(monkeypatch):
    """As where nothing was compiled."""
    monkeypatch.setattr(_backend, "_C", None)


@pytest.mark.parametrize("name", ["preact", "postact", "dense", "silu", "silu in place"])
def test_pure_python_is_the_same(name, without_kernels):
    plain, ours = pair(name)
    for _ in range(2):
        assert_same(step(plain, images()), step(ours, images()))
        assert_same(list(plain.buffers()), list(ours.buffers()))
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    assert bytes_kept(ours, [x]) <= 0.95 * bytes_kept(plain, [x])
    ours[1].register_forward_pre_hook(lambda module, args: (Scale.apply(args[0]) / 2,))
    assert_same(step(plain, images()), step(ours, images()))


def test_revert_and_the_block():
    plain = build("preact")
    kinds, hooks = [type(m) for m in plain.modules()], len(plain._forward_hooks)
    with fused(plain) as ours:
        assert ours is plain
        assert isinstance(plain[1].bn1, Deferring)
    assert [type(m) for m in plain.modules()] == kinds
    assert len(plain._forward_hooks) == hooks
    assert convert(convert(plain)) is plain
    assert len(plain._forward_hooks) == hooks + 1
    revert(plain)
    assert [type(m) for m in plain.modules()] == kinds


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))), "not scripted"),
        (torch.compile(nn.Sequential(nn.BatchNorm2d(3))), "is compiled"),
        ("resnet18", "must be an nn.Module"),
    ],
)
def test_what_cannot_be_converted(model, text):
    with pytest.raises(TypeError, match=text):
        convert(model)


def test_a_network_without_the_pattern_is_left():
    plain = nn.Sequential(nn.Linear(3, 3))
    with pytest.warns(UserWarning, match=r"a Sequential, has no nn.BatchNorm2d and no 3x3"):
        assert convert(plain) is plain
    assert not plain._forward_hooks


def test_networks_of_this_package_are_left_as_they_are(recwarn):
    model = models.ran_compact(width=0.125)
    kinds = [type(module) for module in model.modules()]
    assert convert(model) is model
    assert [type(module) for module in model.modules()] == kinds
    assert not recwarn
    assert not model._forward_hooks
    # Inside a network of others they are left, and the others' modules are not.
    mixed = convert(nn.Sequential(model.stage1, nn.BatchNorm2d(8)))
    assert [type(module) for module in mixed[0].modules()] == [type(module) for module in model.stage1.modules()]
    assert isinstance(mixed[1], Deferring)


@pytest.mark.parametrize("name", ["preact", "silu", "dense"])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_reference_backend_keeps_as_little(name, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(_backend, "_C", None)
    plain, ours = pair(name, torch.float32)
    x = torch.randn(8, 3, 32, 32)
    with set_backend("reference"):
        step(ours, x)
        assert bytes_kept(ours, [x]) <= 0.65 * bytes_kept(plain, [x])


def test_compare_leaves_the_network_alone(capsys):
    plain = build("preact", torch.float32)
    before, kinds = copy.deepcopy(plain.state_dict()), [type(module) for module in plain.modules()]
    random = torch.random.get_rng_state()
    found = compare(plain, torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), rounds=2)
    assert found.outcomes == {"fused": 5, "written out": 1}
    assert found.converted_bytes < 0.65 * found.plain_bytes
    assert capsys.readouterr().out == f"{found}\n"
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in before.items())
    assert [type(module) for module in plain.modules()] == kinds
    assert torch.equal(torch.random.get_rng_state(), random)


def test_explain_says_what_became_of_each_layer(native):
    rows = {row.name: row for row in layers(convert(build("postact", torch.float32)).train(), images(torch.float32))}
    assert rows["1.conv2"].op == "bn_relu_conv2d"
    assert rows["1.conv2"].paths["forward"][0] == "fused"
    assert rows["1.bn2"].paths["forward"] == ("as written", "neither an activation nor a convolution takes its value")
    ours = convert(build("silu", torch.float32)).train()
    rows = {row.name: row for row in layers(ours, images(torch.float32))}
    ours(images(torch.float32))
    assert sum(row.kept for row in rows.values()) == bytes_kept(ours, [images(torch.float32)])
    assert rows["1.3"].paths["forward"][0] == "recomputed"
    assert rows["1.3"].paths["forward"][1].startswith("silu before a grouped convolution")
    rows = {row.name: row for row in layers(convert(build("dense", torch.float32)).train(), images(torch.float32))}
    assert "of 3 pieces" in rows["1.convs.2"].paths["forward"][1]
    network = convert(build("preact", torch.float32)).train()
    network[1].bn1.register_forward_hook(lambda *args: None)
    [way] = [row.paths["forward"] for row in layers(network, images(torch.float32)) if row.name == "1.bn1"]
    assert way == ("as written", "a hook on the module looks at its output")


def test_a_submodule_may_be_converted_by_itself_and_within():
    plain = build("dense")
    ours = copy.deepcopy(plain)
    convert(ours[1])
    assert_same(step(plain, images()), step(ours, images()))
    convert(ours)
    assert_same(step(plain, images()), step(ours, images()))
    assert_same(list(plain.buffers()), list(ours.buffers()))
