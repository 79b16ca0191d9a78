"""The plain 3x3 convolutions of a converted network."""

import copy

import pytest
import torch
from small_networks import assert_same, build, images, step
from torch import nn
from torch.nn.utils import prune

from ran_ext import _converted, convert, revert, set_conv3x3
from ran_ext._converted import Converted, Convolving
from ran_ext._explain import layers


def calls_of_conv2d(monkeypatch):
    """The inputs of the fast convolutions to come."""
    seen, inner = [], _converted.conv2d
    monkeypatch.setattr(_converted, "conv2d", lambda x, *args: seen.append(x) or inner(x, *args))
    return seen


@pytest.mark.parametrize(
    ("conv", "fast"),
    [
        (nn.Conv2d(16, 24, 3, padding=1), True),
        (nn.Conv2d(16, 16, 3, padding="same"), False),
        (nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), False),
        (nn.Conv2d(16, 16, 3, padding=1, groups=2), False),
        (nn.Conv2d(16, 16, 3, padding=2, dilation=2), False),
        (nn.Conv2d(16, 16, 3, 2, 1), False),
        (nn.Conv2d(16, 8, 3, padding=1), False),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1)), False),
    ],
)
def test_plain_convolutions(conv, fast, monkeypatch):
    seen = calls_of_conv2d(monkeypatch)
    plain = nn.Sequential(nn.Conv2d(3, 16, 1), copy.deepcopy(conv), nn.BatchNorm2d(conv.out_channels)).double()
    ours = convert(copy.deepcopy(plain))
    for images_ in (images(), images().to(memory_format=torch.channels_last)):
        assert_same(step(plain, images_), step(ours, images_))
    assert isinstance(ours[1], Convolving) is fast
    assert len(seen) == 2 * fast
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert type(revert(ours)[1]) is type(plain[1])


def test_a_plain_convolution_is_as_accurate_as_the_rule_says(native):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))
    ours = convert(copy.deepcopy(plain))
    x = torch.randn(4, 3, 24, 24)
    truth = step(copy.deepcopy(plain).double(), x.double())
    [path] = {row.paths["forward"][0] for row in layers(ours, x) if row.name == "1"}
    assert path == "fast"
    for mine, theirs, true in zip(step(ours, x), step(plain, x), truth, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + 1e-6 * true.norm()
    with set_conv3x3("library"):
        torch.testing.assert_close(ours(x), plain.to(memory_format=torch.channels_last)(x), rtol=1e-6, atol=1e-6)


def test_hooks_and_pruning_act_on_a_converted_convolution():
    plain = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)).double()
    ours = convert(copy.deepcopy(plain), channels_last=False)  # torch's pruning takes views of weights
    seen = []
    for network in (plain, ours):
        torch.manual_seed(0)
        prune.random_unstructured(network[0], "weight", 0.5)
        network[0].register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    assert_same(step(plain, x), step(ours, x))
    torch.testing.assert_close(*seen)


def test_a_parametrisation_made_later_outlives_the_conversion():
    plain = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)).double()
    ours = convert(copy.deepcopy(plain))
    for network in (plain, ours):
        nn.utils.parametrizations.weight_norm(network[0])
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    assert_same(step(plain, x), step(ours, x))
    revert(ours)
    assert not any(isinstance(module, Converted) for module in ours.modules())
    assert_same(step(plain, x), step(ours, x))
    nn.utils.parametrize.remove_parametrizations(ours[0], "weight")
    assert type(ours[0]) is nn.Conv2d


def test_torch_has_the_errors():
    plain = build("preact", torch.float32)
    ours = convert(copy.deepcopy(plain))
    for x in (torch.randn(2, 4, 9, 9), torch.randn(2, 3, 9, 9, dtype=torch.float64), torch.randn(9)):
        with pytest.raises(RuntimeError) as theirs:
            plain(x)
        with pytest.raises(RuntimeError) as mine:
            ours(x)
        assert str(mine.value) == str(theirs.value)


def test_the_weights_layout_is_the_callers_choice():
    assert convert(build("preact"))[1].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert convert(build("preact"), channels_last=False)[1].conv1.weight.is_contiguous()


def test_a_convolution_whose_derivative_is_faulty_is_led_around_the_fault(monkeypatch):
    """docs/upstream.md: in float32 PyTorch's own may end the process; in float64 it is right."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 16, 1, 2), nn.BatchNorm2d(16)).double()
    ours = convert(copy.deepcopy(plain).float())
    seen = calls_of_conv2d(monkeypatch)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    dout = torch.randn(2, 16, 8, 8)
    for network, dtype in ((ours, torch.float32), (plain, torch.float64)):
        network(x.to(dtype)).backward(dout.to(dtype))
    for mine, exact in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1
    assert type(revert(ours)[0]) is nn.Conv2d
