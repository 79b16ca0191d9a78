"""What may stand between a converted normalisation and a convolution: GELU, dropout and pooling."""

import copy

import pytest
import torch
from small_networks import assert_same, build, images, pair, step
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ran_ext import convert
from ran_ext._explain import layers

NAN, INF = float("nan"), float("inf")


def around(*between, channels=16, dtype=torch.float32):
    """A normalisation and a convolution, as written and converted."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 16, 3, padding=1)
    plain = nn.Sequential(nn.BatchNorm2d(channels), *between, conv).to(dtype).to(memory_format=torch.channels_last)
    return plain, convert(copy.deepcopy(plain))


@pytest.mark.parametrize("dropout", [nn.Dropout(0.3), nn.Dropout2d(0.5), nn.Dropout(0.3, inplace=True)], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_dropout_draws_the_numbers_that_torch_draws(dropout, layout):
    """The same values are dropped, and the state of the generator is the same behind it."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        plain, ours = around(nn.ReLU(), dropout, dtype=dtype)
        x = torch.randn(4, 16, 5, 7).to(dtype).contiguous(memory_format=layout)
        found = []
        for network in (plain, ours):
            torch.manual_seed(5)
            taken = []
            network[-1].register_forward_pre_hook(lambda module, args, to=taken: to.append(args[0] + 0))
            network(x)
            found.append((taken[0].detach(), torch.random.get_rng_state()))
        assert torch.equal(found[0][0] == 0, found[1][0] == 0)
        rounding = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(found[0][0], found[1][0], **rounding)
        assert torch.equal(found[0][1], found[1][1])


def test_dropout_that_a_convolution_takes_is_recomputed(native):
    ours = around(nn.ReLU(), nn.Dropout(0.3))[1].train()
    [row] = layers(ours, torch.randn(2, 16, 8, 8))
    assert row.paths["forward"][0] == "recomputed"
    assert row.paths["forward"][1].startswith("relu dropout before a convolution")


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_none_and_of_all(p):
    plain, ours = around(nn.ReLU(), nn.Dropout(p), dtype=torch.float64)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    assert_same(step(plain, x), step(ours, x))
    ours[2].p = 1.5
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        ours(x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["dropout", "dropout in place", "pooled"])
def test_a_checkpoint_draws_them_again(name, reentrant):
    plain, ours = pair(name)
    for network in (plain, ours):
        inner = network.forward
        network.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=reentrant)
    assert_same(step(plain, images()), step(ours, images()))


@pytest.mark.parametrize("name", ["dropout in place", "dropout used twice", "pooled", "gelu"])
def test_under_autocast(name):
    """Rounded where torch rounds: within twice its error."""
    plain, ours = pair(name, torch.float32)
    x = images(torch.float32)
    truth = step(copy.deepcopy(plain).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = step(plain, x), step(ours, x)
    scale = max(t.abs().max() for t in truth)
    for a, b, true in zip(mine, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        assert (a - true).norm() <= 2 * (b - true).norm() + 1e-3 * scale


POOLS = {
    "by two": lambda x: F.max_pool2d(x, 2),
    "by two, rounded up": lambda x: F.max_pool2d(x, (2, 2), 2, ceil_mode=True),
    "three": lambda x: F.max_pool2d(x, 3, 2, 1),
    "dilated": lambda x: F.max_pool2d(x, [3, 2], [1], [1, 0], dilation=(2, 1)),
    "average": lambda x: F.avg_pool2d(x, 2),
    "average, padded": lambda x: F.avg_pool2d(x, (3, 2), (2, 1), (1, 0), True, False, 5),
}


@pytest.mark.parametrize("special", [None, NAN, INF, -INF])
@pytest.mark.parametrize("name", POOLS)
def test_pooling_is_torchs(name, special):
    """Of ties the same one gets the gradient; NaN and infinities stand where torch has them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return POOLS[name](F.relu(self.bn(x)))

    plain = Net().double()
    ours = convert(copy.deepcopy(plain))
    x = torch.randn(2, 3, 8, 10, dtype=torch.float64).round()  # many are equal
    if special is not None:
        x[0, 0, 3, 4] = special
    for format_ in (torch.contiguous_format, torch.channels_last):
        one, other = (step(network, x.contiguous(memory_format=format_)) for network in (plain, ours))
        for mine, theirs in zip(other, one, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10, equal_nan=True)


def test_torch_has_the_errors():
    for between, text in [
        (nn.GELU("tan"), "approximate argument must be either none or tanh"),
        (nn.MaxPool2d(2, padding=3), "pad should be at most half"),
        (nn.MaxPool2d(20), "Output size is too small"),
        (nn.AvgPool2d(2, stride=0), "stride should not be zero"),
        (nn.MaxPool2d((2, 2, 2)), "kernel_size must either be"),
    ]:
        for network in around(between):
            with pytest.raises(RuntimeError, match=text):
                network(torch.randn(2, 16, 5, 5))


def test_pooling_that_returns_indices_is_as_written():
    plain = build("pooled")
    plain[3] = nn.MaxPool2d(2, return_indices=True)
    ours = convert(copy.deepcopy(plain))
    for one, other in zip(plain[:4](images()), ours[:4](images()), strict=True):
        torch.testing.assert_close(one, other)
