"""3x3 convolutions by Winograd's method: the rule of accuracy without a floor, the choice, special numbers, modes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ran_ext
from ran_ext import _backend, get_conv3x3, ops, set_conv3x3
from ran_ext._explain import FUSED, LIBRARY, layers
from ran_ext.inference import FoldedConv2d
from ran_ext.nn import BNReLUConv2d

pytestmark = pytest.mark.usefixtures("native")

has_kernels = pytest.mark.skipif(
    _backend._C is None or _backend._C.build_info()["cpu_kernels"] == "baseline", reason="the kernels need AVX2"
)
PASSES = ("forward", "dgrad", "wgrad")

# n, c_in, height, width, c_out
DENSE = [
    (4, 64, 16, 16, 64),
    (4, 128, 8, 8, 128),
    (32, 256, 4, 4, 128),
    (8, 96, 14, 14, 40),
    (6, 40, 15, 7, 100),
    (2, 48, 57, 9, 24),
    (8, 32, 12, 12, 32),
    (16, 16, 11, 13, 16),
    (32, 64, 2, 2, 64),
]


def paths(case, mode: str = "fast") -> dict[str, str]:
    """What each pass of a convolution of this size runs on, in words."""
    n, ci, h, w, co = case
    x = torch.empty(n, ci, h, w).to(memory_format=torch.channels_last)
    with set_conv3x3(mode):
        [row] = layers(BNReLUConv2d(ci, co, 3, padding=1, bias=False), x)
    kernels = {name: why.removesuffix("by rule").removesuffix("; ") for name, (_, why) in row.paths.items()}
    return {name: kernels[name] if path == FUSED else LIBRARY for name, (path, _) in row.paths.items()}


def gradients(x: Tensor, weight: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out, dx, dweight of a convolution of relu(x) by the op, the normalisation changing nothing."""
    channels = x.shape[1]
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    mean, var = torch.zeros(channels, dtype=x.dtype), torch.ones(channels, dtype=x.dtype)
    out = ops.bn_relu_conv2d(x, None, None, mean, var, weight, padding=1, training=False, eps=0.0)
    out.backward(dout)
    return out.detach(), x.grad, weight.grad


def rms(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


def error_ratios(case, mode: str, kind: str, seeds: int) -> dict[str, float]:
    """Our error against float64 over PyTorch's own, for each pass; both the root of the mean square over all seeds."""
    n, ci, h, w, co = case
    squares = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(seeds):
        torch.manual_seed(seed)
        x = torch.randn(n, ci, h, w)
        if kind == "large mean":
            x = x + 5
        if kind == "smooth":
            x = F.avg_pool2d(x, 5, 1, 2) * 5 + 1
        weight, dout = torch.randn(co, ci, 3, 3) / (9 * ci) ** 0.5, torch.randn(n, co, h, w)
        x, weight, dout = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, dout))
        with set_conv3x3("library"):
            exact = gradients(x.double(), weight.double(), dout.double())
            theirs = gradients(x, weight, dout)
        with set_conv3x3(mode):
            ours = gradients(x, weight, dout)
        for row, results in enumerate((ours, theirs)):
            squares[row] += torch.tensor([rms(a, e) ** 2 for a, e in zip(results, exact, strict=True)])
    return dict(zip(PASSES, (squares[0] / squares[1]).sqrt().tolist(), strict=True))


@has_kernels
@pytest.mark.parametrize("kind", ["dense", "large mean", "smooth"])
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_error_within_the_rule_without_a_floor(case, kind):
    for mode, most in (("fast", 2.0), ("strict", 1.2)):
        ratios = error_ratios(case, mode, kind, seeds=3)
        assert max(ratios.values()) <= most, (mode, ratios, paths(case, mode))


@has_kernels
@pytest.mark.parametrize("threads", [2, 4, 8])
def test_weight_gradients_stay_within_the_rule_with_more_threads(threads):
    """The library splits a sum among the threads where channels are few, and so rounds less."""
    torch.set_num_threads(threads)
    for case in ((16, 16, 11, 13, 16), (48, 32, 8, 8, 32), (32, 32, 16, 16, 32), (32, 64, 8, 8, 64)):
        for mode, most in (("fast", 2.0), ("strict", 1.2)):
            ratios = error_ratios(case, mode, "dense", seeds=2)
            assert max(ratios.values()) <= most, (case, mode, ratios, paths(case, mode))


@has_kernels
@pytest.mark.parametrize("case", [(36, 64, 32, 29, 48), (3, 200, 57, 31, 130), (130, 33, 16, 16, 64)], ids=str)
def test_weight_gradients_of_many_tiles_do_not_depend_on_the_threads(case):
    """Their tiles are summed in shares, and blocks of channels are smaller where there are more threads."""
    n, ci, h, w, co = case
    torch.manual_seed(0)
    x = torch.randn(n, ci, h, w).to(memory_format=torch.channels_last)
    weight = torch.randn(co, ci, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    bias = torch.randn(co, requires_grad=True)
    dout = torch.randn(n, co, h, w).to(memory_format=torch.channels_last)
    found = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        assert paths(case)["wgrad"] == "Winograd F(4x4, 3x3)"
        found.append(torch.autograd.grad(ops.conv2d(x, weight, bias, padding=1), (weight, bias), dout))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    exact = torch.nn.grad.conv2d_weight(x.double(), weight.shape, dout.double(), padding=1)
    plain = torch.nn.grad.conv2d_weight(x, weight.shape, dout, padding=1)
    ours, eager = ((d.double() - exact).square().mean().sqrt() for d in (found[0][0], plain))
    assert ours <= 2 * eager
    torch.testing.assert_close(found[0][1].double(), dout.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-3)


@has_kernels
def test_what_each_pass_takes():
    small, large, none = "Winograd F(2x2, 3x3)", "Winograd F(4x4, 3x3)", LIBRARY
    assert paths((32, 128, 16, 16, 128)) == dict.fromkeys(PASSES, large)
    assert paths((32, 128, 16, 16, 128), "strict") == dict.fromkeys(PASSES, small)
    assert paths((32, 128, 16, 16, 128), "library")["forward"] == none
    # Few channels to sum over: the library's error is too small for the larger tile.
    assert paths((32, 32, 16, 16, 64)) == {"forward": small, "dgrad": large, "wgrad": large}
    assert paths((32, 64, 4, 4, 64))["forward"] == small
    # The larger tile has no fewer products here.
    assert paths((32, 128, 6, 6, 128))["forward"] == small
    assert paths((32, 3, 32, 32, 64))["forward"] == none


@has_kernels
def test_the_mode_holds_inside_and_is_named():
    assert get_conv3x3() == "fast"
    with set_conv3x3("strict"):
        assert get_conv3x3() == "strict"
        assert "strict" in ran_ext._info.report()
        with set_conv3x3("library"):
            assert get_conv3x3() == "library"
        assert paths((32, 128, 16, 16, 128), "strict")["forward"] == "Winograd F(2x2, 3x3)"
    assert get_conv3x3() == "fast"
    with pytest.raises(ValueError, match="set_conv3x3: mode must be one of fast, strict, library, fused, got 'exact'"):
        set_conv3x3("exact")
    assert get_conv3x3() == "fast"


def test_a_block_is_of_its_thread():
    with set_conv3x3("library"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(get_conv3x3).result() == "fast"
    entered, left = threading.Barrier(2), threading.Barrier(2)

    def block(mode: str) -> str:
        with set_conv3x3(mode):
            entered.wait(10)
            here = get_conv3x3()
            left.wait(10)
        return here

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(block, ("strict", "library"))) == ["strict", "library"]
    assert get_conv3x3() == "fast"


@has_kernels
@pytest.mark.parametrize("op", ["bn_relu_conv2d", "conv2d"])
def test_backward_runs_in_the_mode_of_its_forward_call(op):
    torch.manual_seed(0)
    x = torch.randn(8, 64, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(64, 64, 3, 3).to(memory_format=torch.channels_last)

    def call() -> Tensor:
        if op == "conv2d":
            return ops.conv2d(x, weight, padding=1)
        return ops.bn_relu_conv2d(x, None, None, None, None, weight, padding=1, training=True)

    def gradient(forward: str, backward: str) -> Tensor:
        with set_conv3x3(forward):
            out = call()
        with set_conv3x3(backward):
            return torch.autograd.grad(out.square().sum(), x)[0]

    assert torch.equal(gradient("library", "fast"), gradient("library", "library"))
    assert torch.equal(gradient("fast", "library"), gradient("fast", "fast"))
    assert not torch.equal(gradient("fast", "fast"), gradient("library", "library"))


@has_kernels
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_special_numbers_reach_what_they_touch_and_no_further_than_a_tile(special):
    """Forward: the whole of each 4x4 tile that a neighbour of the special number lies in, and no other."""
    case = (2, 64, 16, 18, 64)
    assert paths(case)["forward"] == "Winograd F(4x4, 3x3)"
    module = BNReLUConv2d(64, 64, 3, padding=1).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 16, 18).to(memory_format=torch.channels_last)
    x[1, 3, 4, 9] = special  # its neighbours are in rows 3 to 5 and columns 8 to 10
    wrong = ~module(x).isfinite()
    assert wrong[1, :, 3:6, 8:11].all()
    wrong[1, :, 0:8, 8:12] = False
    assert not wrong.any()


@has_kernels
def test_a_nan_reaches_the_gradients_that_it_touches():
    torch.manual_seed(0)
    x, dout = (torch.randn(8, 64, 16, 16).to(memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(64, 64, 3, 3).to(memory_format=torch.channels_last)
    dout[2, 5, 7, 7] = float("nan")
    _, dx, dweight = gradients(x, weight, dout)
    bad = dx.isnan()
    assert bad[2, :, 6:9, 6:9][x[2, :, 6:9, 6:9] > 0].all()
    assert not bad[x <= 0].any()
    bad[2, :, 4:12, 4:12] = False
    assert not bad.any()
    assert dweight[5].isnan().all()
    assert not dweight[[k for k in range(64) if k != 5]].isnan().any()


@has_kernels
@pytest.mark.parametrize("case", [(2, 100, 57, 5, 40), (33, 24, 7, 7, 100), (5, 36, 3, 3, 20), (1, 16, 1, 40, 17)])
@pytest.mark.parametrize("mode", ["fast", "strict"])
def test_any_channels_and_sizes(case, mode):
    n, ci, h, w, co = case
    torch.manual_seed(0)
    x, dout = torch.randn(n, ci, h, w), torch.randn(n, co, h, w)
    weight = torch.randn(co, ci, 3, 3)
    x, weight, dout = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, dout))
    exact = gradients(x.double(), weight.double(), dout.double())
    with set_conv3x3(mode):
        for ours, e in zip(gradients(x, weight, dout), exact, strict=True):
            assert rms(ours, e) < 2e-6


@has_kernels
@pytest.mark.parametrize("case", [(9, 64, 15, 16, 48), (40, 192, 8, 8, 256)])
def test_next_statistics_are_those_of_the_output(case):
    n, ci, h, w, co = case
    assert paths(case)["forward"] != LIBRARY
    module = BNReLUConv2d(ci, co, 3, padding=1).to(memory_format=torch.channels_last)
    with torch.no_grad():
        module.conv.bias.fill_(1000.0)  # a mean beside which sums of squares would cancel
    x = torch.randn(n, ci, h, w).to(memory_format=torch.channels_last)
    args = (x, module.bn.weight, module.bn.bias, None, None, False, [], None, 1e-5, module.conv.weight)
    with torch.no_grad():
        out, _, _, mean, var, _ = torch.ops.ran_ext._chained_bn_relu_conv2d(
            *args, module.conv.bias, None, [1, 1], [1, 1], True, [], None, False
        )
    wide = out.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


@has_kernels
def test_a_folded_convolution_serves_batches_of_any_size():
    conv = nn.Conv2d(128, 64, 3, padding=1)
    folded = FoldedConv2d(conv, conv.weight.double(), conv.bias.double(), False, torch.float32)
    with torch.no_grad():
        for n, size in ((8, 8), (1, 2), (4, 4), (2, 31)):
            x = torch.randn(n, 128, size, size).to(memory_format=torch.channels_last)
            exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
            assert rms(folded(x), exact) < 1e-6
    assert sorted(folded._panels) == [2, 4]
