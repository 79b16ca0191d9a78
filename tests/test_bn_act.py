"""Batch normalisation + any activation in compiled passes on the CPU, against plain PyTorch; ``convert`` uses them."""

from functools import partial

import pytest
import torch
from accuracy import DTYPES, LAYOUTS, assert_accurate
from torch import nn
from torch.nn import functional as F

import ran_ext
from ran_ext._recipe import Recipe, identity
from ran_ext._recomputed import activated, convolved

pytestmark = pytest.mark.usefixtures("native")

ops = torch.ops.ran_ext
NAN, INF = float("nan"), float("inf")
#: torch's function, and the compiled op's name and numbers.
ACTIVATIONS = {
    "none": (identity, ("none", 0.0, 0.0)),
    "relu": (F.relu, ("relu", 0.0, 0.0)),
    "relu6": (F.relu6, ("hardtanh", 0.0, 6.0)),
    "leaky_relu": (partial(F.leaky_relu, negative_slope=0.2), ("leaky_relu", 0.2, 0.0)),
    "hardtanh": (partial(F.hardtanh, min_val=-0.5, max_val=0.75), ("hardtanh", -0.5, 0.75)),
    "hardswish": (F.hardswish, ("hardswish", 0.0, 0.0)),
    "silu": (F.silu, ("silu", 0.0, 0.0)),
    "gelu": (F.gelu, ("gelu", 0.0, 0.0)),
    "gelu, tanh": (partial(F.gelu, approximate="tanh"), ("gelu_tanh", 0.0, 0.0)),
}


def drawn(shape, dtype, layout, mean):
    x = ((torch.randn(shape, dtype=torch.float64) + mean) * 2).to(dtype).contiguous(memory_format=layout)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return x, torch.rand(shape[1], dtype=wide) + 0.5, torch.randn(shape[1], dtype=wide), torch.randn(shape).to(dtype)


def fixed_mean(x):
    """The same in every precision."""
    return x.detach().double().mean((0, 2, 3)).float()


def reference(x, weight, bias, dout, training, act):
    """Value and gradients in PyTorch's ops, with the batch's statistics or those of a fixed normalisation."""
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    mean, var = (None, None) if training else (fixed_mean(x).to(weight.dtype), torch.ones_like(weight))
    out = act(F.batch_norm(x, mean, var, weight, bias, training, 0.0, 1e-5))
    out.backward(dout.to(x.dtype))
    return out.detach(), x.grad, weight.grad, bias.grad


def compiled(x, weight, bias, dout, training, name):
    if training:
        mean, var = ops.batch_norm_stats(x, [], None)
    else:
        mean, var = fixed_mean(x).to(weight.dtype), torch.ones_like(weight)
    norm = (x, weight, bias, mean, var, 1e-5)
    return ops.bn_act(*norm, *name), *ops.bn_act_backward(dout, *norm, training, *name)


def check(act, shape, dtype, layout, training, mean=0.5):
    torch_act, name = ACTIVATIONS[act]
    x, weight, bias, dout = drawn(shape, dtype, layout, mean)
    exact = reference(*(t.double() for t in (x, weight, bias, dout)), training, torch_act)
    eager, ours = reference(x, weight, bias, dout, training, torch_act), compiled(x, weight, bias, dout, training, name)
    assert ours[0].stride() == ours[1].stride() == x.stride()
    times = 10 if dtype == torch.float64 else 2  # float64 is held to PyTorch's own roundings, not to what is exact
    for what, a, b, e in zip(("out", "dx", "dweight", "dbias"), ours, eager, exact, strict=True):
        assert_accurate(f"{act} {what}", a, b, e, times=times, mean=mean)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(act, dtype):
    for shape in ((2, 16, 8, 8), (3, 5, 7, 9), (2, 1, 3, 5), (1, 130, 9, 7)):
        for layout in LAYOUTS.values():
            for training in (True, False):
                check(act, shape, dtype, layout, training)


@pytest.mark.parametrize("layout", LAYOUTS.values())
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_large_means_do_not_cancel(act, layout):
    for mean in (30.0, -3000.0, 1e4):
        check(act, (4, 8, 16, 16), torch.float32, layout, True, mean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_ends_and_kinks_are_torchs(act, dtype):
    """Of a normalisation that changes nothing.

    Not compared: the gradient of a NaN, where torch's vectors and scalars differ, and from -89 to -87, where the
    sigmoid is a subnormal number and ours is 0.
    """
    torch_act, name = ACTIVATIONS[act]
    points = [-INF, INF, NAN, -3.0, 3.0, 0.0, -0.0, 6.0, -0.5, 0.75, 1e3, -1e3, 6e4, -6e4, 85.0, -85.0, 90.0, -90.0]
    x = torch.tensor(points * 3, dtype=dtype).view(1, 1, 6, -1)
    mean, var = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for dout in (2.0, NAN, INF):
        d = torch.full_like(x, dout)
        leaf = x.clone().requires_grad_()
        theirs = torch_act(leaf)
        theirs.backward(d)
        ours = ops.bn_act(x, None, None, mean, var, 0.0, *name)
        dx = ops.bn_act_backward(d, x, None, None, mean, var, 0.0, False, *name)[0]
        torch.testing.assert_close(ours, theirs.detach(), equal_nan=True)
        known = ~x.isnan()
        torch.testing.assert_close(dx[known], leaf.grad[known], equal_nan=True)


def test_only_what_is_wanted():
    x, weight, bias, dout = drawn((2, 5, 4, 3), torch.float32, torch.contiguous_format, 0.0)
    mean, var = ops.batch_norm_stats(x, [], None)
    norm = (dout, x, weight, bias, mean, var, 1e-5)
    for training in (True, False):
        whole = ops.bn_act_backward(*norm, training, "silu")
        for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
            found = ops.bn_act_backward(*norm, training, "silu", 0.0, 0.0, wanted)
            for part, all_of, want in zip(found, whole, wanted, strict=True):
                assert torch.equal(part, all_of) if want else part.numel() == 0


def test_empty_batch_and_threads():
    x, weight, bias, dout = drawn((0, 3, 4, 4), torch.float32, torch.contiguous_format, 0.0)
    found = compiled(x, weight, bias, dout, True, ("silu",))
    assert found[0].shape == found[1].shape == x.shape
    assert not any(t.any() for t in found)
    before = torch.get_num_threads()
    try:
        for layout in LAYOUTS.values():
            given = drawn((8, 24, 30, 30), torch.float32, layout, 0.0)
            results = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(compiled(*given, True, ("silu",)))
            assert all(map(torch.equal, *results))
    finally:
        torch.set_num_threads(before)


def test_wrong_arguments():
    x, ones = torch.zeros(2, 3, 4, 4), torch.ones(3)
    for call, kind, text in [
        (lambda: ops.bn_act(x, None, None, ones, ones, 1e-5, "mish"), ValueError, "there is no activation 'mish'"),
        (lambda: ops.bn_act(x[0], None, None, ones, ones, 1e-5, "silu"), ValueError, r"must be \(N, C, H, W\)"),
        (lambda: ops.bn_act(x, ones[:2], None, ones, ones, 1e-5, "silu"), ValueError, r"weight must be \[3\]"),
        (lambda: ops.bn_act(x.int(), None, None, ones, ones, 1e-5, "silu"), TypeError, "float32"),
        (
            lambda: ops.bn_act_backward(x[:1], x, None, None, ones, ones, 1e-5, True, "silu"),
            ValueError,
            "dout must be",
        ),
    ]:
        with pytest.raises(kind, match=f"bn_act: .*{text}"):
            call()


def test_opcheck():
    x, weight, bias, dout = drawn((2, 5, 4, 3), torch.float32, torch.channels_last, 0.0)
    mean, var = ops.batch_norm_stats(x, [], None)
    torch.library.opcheck(ops.bn_act, (x, weight, None, mean, var, 1e-5, "hardtanh", 0.0, 6.0))
    torch.library.opcheck(ops.bn_act_backward, (dout, x, weight, bias, mean, var, 1e-5, True, "silu"))


GEOMETRIES = {
    "value": None,
    "3x3": ((1, 1), (1, 1), (1, 1), 1),
    "strided": ((2, 1), (0, 1), (1, 1), 1),
    "grouped": ((1, 1), (1, 1), (1, 1), 2),
    "dilated": ((1, 1), (2, 2), (2, 2), 1),
}


@pytest.mark.parametrize(
    ("act", "geometry"),
    [*((act, "value") for act in ACTIVATIONS), *(("silu", place) for place in GEOMETRIES if place != "value")],
)
def test_a_recipe_runs_them(act, geometry):
    """Of one piece or several, with the batch's statistics or given ones, twice differentiable."""
    torch.manual_seed(0)
    torch_act, place = ACTIVATIONS[act][0], GEOMETRIES[geometry]
    x, weight, bias = (t.double().requires_grad_() for t in (torch.randn(3, 6, 5, 4), torch.rand(6), torch.randn(6)))
    kernel, shift = torch.randn(4, 6 // (place[3] if place else 1), 3, 3).double(), torch.randn(4).double()
    leaves = [x, weight, bias, *(t.requires_grad_() for t in (kernel, shift) if place)]
    given = torch.randn(6).double(), torch.rand(6).double() + 0.5
    for pieces in ((x,), x.split([2, 4], 1)):
        for batch_stats in (True, False):
            mean, var = ops.batch_norm_stats(x.detach(), [], None) if batch_stats else given
            recipe = Recipe(pieces, weight, bias, mean, var, batch_stats, 1e-5, True)
            want = torch_act(recipe.value())
            if place is None:
                out = activated(recipe, torch_act)
            else:
                want = F.conv2d(want, kernel, shift, *place)
                out = convolved(recipe, torch_act, place, kernel, shift)
            assert ("BnAct" in out.grad_fn.name()) == (len(pieces) == 1)
            torch.testing.assert_close(out, want)
            once, twice, wanted = (
                torch.autograd.grad(of.square().sum(), leaves, retain_graph=True, create_graph=create)
                for of, create in ((out, False), (out, True), (want, True))
            )
            torch.testing.assert_close(once, wanted)
            torch.testing.assert_close(twice, wanted)
            if geometry in ("strided", "grouped", "dilated"):
                continue
            again = [torch.autograd.grad(found[0].square().sum(), leaves) for found in (twice, wanted)]
            torch.testing.assert_close(*again)


def test_only_what_needs_a_gradient_has_one():
    x, weight, kernel = torch.randn(2, 4, 5, 5), torch.rand(4), torch.randn(4, 4, 3, 3)
    mean, var = ops.batch_norm_stats(x, [], None)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        leaves = [t.detach().requires_grad_(want) for t, want in zip((x, weight, kernel), wanted, strict=True)]
        recipe = Recipe((leaves[0],), leaves[1], None, mean, var, True, 1e-5, True)
        convolved(recipe, F.silu, GEOMETRIES["3x3"], leaves[2], None).sum().backward()
        assert [t.grad is not None for t in leaves] == list(wanted)


def test_bounds_that_are_none_raise_torchs_error():
    network = ran_ext.convert(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Hardtanh(0, 1), nn.Conv2d(4, 4, 1))
    )
    network[2].max_val = -1.0
    with pytest.raises(ValueError, match="min_val cannot be greater"):
        network(torch.randn(2, 3, 4, 4))
