"""A value that is not written yet is a tensor like any other: functions, changes in place, what autograd keeps."""

import copy
import pickle

import pytest
import torch
from small_networks import Scale, assert_same, build, head, images, pair, step
from torch import nn
from torch.nn import functional as F

from ran_ext import convert, revert
from ran_ext._deferred import Deferred


def test_a_value_asked_for_without_gradients_is_not_kept():
    """A logging hook must not cut the graph."""
    plain, ours = pair("preact")
    for network in (plain, ours):

        def log(module, args, out):
            with torch.no_grad():
                out.abs().mean()

        for module in network.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(log)
    x = images()
    assert_same(step(plain, x), step(ours, x))


@pytest.mark.parametrize("name", ["postact", "hardswish in place", "leaky", "silu in place"])
def test_an_activation_in_place_after_the_value_was_asked_for(name):
    plain, ours = pair(name)
    seen = []
    for network in (plain, ours):
        for module in network.modules():
            if isinstance(module, (nn.ReLU, nn.Hardswish, nn.LeakyReLU, nn.SiLU)):
                module.register_forward_pre_hook(lambda module, args: seen.append(args[0].sum()))
    x = images()
    assert_same(step(plain, x), step(ours, x))
    assert_same(seen[: len(seen) // 2], seen[len(seen) // 2 :])


@pytest.mark.parametrize("act", [nn.Identity(), nn.ReLU(), nn.SiLU()], ids=["none", "relu", "silu"])
def test_a_function_takes_a_deferred_tensor(act):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.act = nn.BatchNorm2d(3), act

        def forward(self, x):
            return Scale.apply(self.act(self.bn(x)))

    plain = Net().double()
    ours = convert(copy.deepcopy(plain))
    assert_same(step(plain, images()), step(ours, images()))


def test_in_place_activation_whose_result_is_not_used():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.relu, self.conv = nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            out = self.bn(x)
            self.relu(out)
            return self.conv(out) + out.sum()

    plain = Net().double()
    ours = convert(copy.deepcopy(plain))
    assert_same(step(plain, images()), step(ours, images()))


def test_an_input_written_to_names_the_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.bn, self.conv = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = self.first(x)
            out = F.relu(self.bn(x))
            x.add_(1)
            return self.conv(out)

    with pytest.raises(RuntimeError, match=r"ran_ext.convert: the input of BatchNorm2d\(3, .*modified in place"):
        convert(Net())(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("act", "grad"),  # torch's ReLU keeps its output, which may not be changed then
    [(nn.Identity(), True), (nn.SiLU(), True), (nn.Identity(), False), (nn.SiLU(), False), (nn.ReLU(), False)],
)
@pytest.mark.parametrize("change", ["whole", "view", "activation", "without gradients"])
def test_in_place_changes_are_seen_by_all_who_hold_the_tensor(grad, act, change):
    def run(bn):
        out = act(bn(images()))
        other = out[...] if type(out) is torch.Tensor else out
        if change == "whole":
            out += 1
        elif change == "view":
            out[:, 0].mul_(2)
        elif change == "activation":
            F.relu_(out)
        else:
            with torch.no_grad():
                F.relu_(out)
        out = other * 2
        if not grad:
            return [out]
        out.sum().backward()
        return [out.detach(), bn.weight.grad, bn.bias.grad]

    plain = nn.BatchNorm2d(3).double()
    ours = alone(copy.deepcopy(plain))
    with torch.set_grad_enabled(grad):
        assert_same(run(plain), run(ours))


def test_a_function_that_changes_a_deferred_tensor_is_refused():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            x.mul_(2)
            return x

        @staticmethod
        def backward(ctx, dout):
            return dout * 2

    with pytest.raises(RuntimeError, match=r"an autograd.Function changes the output .* by mark_dirty"):
        Double.apply(alone(nn.BatchNorm2d(3).double())(images())).sum()


def test_parameters_written_to_before_a_stored_value_is_used_are_noticed():
    ours, stored = convert(build("postact")), []
    ours[1].relu.register_forward_hook(lambda module, args, out: stored.append(out))
    step(ours, images())
    assert isinstance(stored[0], Deferred)
    with torch.no_grad():
        ours[1].bn1.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"BatchNorm2d\(16.*, or one of its parameters, was modified in place"):
        stored[0].sum()


def alone(bn):
    """Converted, but not as the outermost module, which writes its output out."""
    convert(nn.Sequential(bn))
    return bn


def test_a_deferred_tensor_is_one_in_every_respect():
    bn = alone(nn.BatchNorm2d(3).double())
    plain = revert(copy.deepcopy(bn))
    x = images()
    expected = plain(x)

    def fresh():
        bn.train()  # forgets that its output was written out
        found = bn(x)
        assert isinstance(found, Deferred)
        return found

    assert fresh().shape == expected.shape
    assert fresh().requires_grad
    assert fresh().stride() == expected.stride()
    torch.testing.assert_close(fresh()[:, :1], expected[:, :1])
    torch.testing.assert_close(torch.stack([fresh(), fresh()]), torch.stack([expected, expected]))
    torch.testing.assert_close(fresh().detach().numpy(), expected.detach().numpy())
    assert "BatchNorm" in repr(fresh())
    assert copy.deepcopy(fresh().detach()).equal(expected.detach())
    assert pickle.loads(pickle.dumps(fresh().detach())).equal(expected.detach())
    assert fresh().sum().item() == pytest.approx(expected.sum().item())


class Interrupted(nn.Module):
    def forward(self, x):
        if self.training:
            raise KeyboardInterrupt
        return x


def test_an_interrupted_pass_leaves_nothing_behind():
    ours = convert(nn.Sequential(nn.BatchNorm2d(3), Interrupted()))
    with pytest.raises(KeyboardInterrupt):
        ours(torch.randn(2, 3, 4, 4))
    ours.eval()(torch.randn(2, 3, 4, 4))
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("name", ["preact", "silu"])
def test_running_statistics_written_to_before_backward_are_noticed(name):
    """Of an evaluation that is differentiated; torch gives a wrong gradient."""
    network = convert(build(name))
    out = network.eval()(images().requires_grad_()).sum()
    network.train()(images())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_saved_tensor_hooks_see_what_is_kept():
    """Offloading must be able to take everything away."""
    plain, ours = pair("dense")
    x = images()
    with torch.autograd.graph.save_on_cpu():
        found = step(ours, x)
    assert_same(step(plain, x), found)


def test_a_second_backward_pass_needs_the_graph():
    for network in pair("preact"):
        out = network(images()).sum()
        out.backward(retain_graph=True)
        out.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            out.backward()


class Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return dout


def test_the_history_of_an_unwritten_tensor_lasts_as_long_as_the_graph():
    bn = alone(nn.BatchNorm2d(3).double())
    out = Keep.apply(bn(images()))
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


class Frozen(nn.Module):
    """A normalisation and its activation where no gradients are taken, before a convolution where they are."""

    def __init__(self, act, inside):
        super().__init__()
        self.bn, self.conv, self.act, self.inside = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1), act, inside

    def forward(self, x):
        with torch.no_grad():
            a = self.act(self.bn(x)) if self.inside else self.bn(x)
        a = a if self.inside else self.act(a)
        return self.conv(a) + a.mean()


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("act", [F.relu, F.silu, F.gelu])
def test_what_is_normalised_without_gradients_gets_none_later(act, inside, pieces):
    class Joined(Frozen):
        def forward(self, x):
            return super().forward(torch.cat((x[:, :8], x[:, 8:]), 1) if pieces == 2 else x)

    plain = head(Joined(act, inside)).double()
    step(plain, images())
    ours = convert(copy.deepcopy(plain))
    for seed in range(2):
        for one, other in zip(step(plain, images(seed=seed)), step(ours, images(seed=seed)), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


class Shares(nn.Module):
    """A value that two convolutions and a sum take, and one of them again, before and after the sum."""

    def __init__(self, act):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(16), act
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        a = self.act(self.bn(x))
        return self.one(a) * self.two(a) + a + self.two(a + 1) + self.one(a)


def nodes(out):
    """All of the graph behind ``out``."""
    found, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [one for one, _ in node.next_functions]
    return found


@pytest.mark.parametrize("act", [nn.SiLU(), nn.SiLU(inplace=True), nn.Hardswish(), nn.LeakyReLU()], ids=str)
def test_a_value_that_several_take_is_made_and_differentiated_once(native, act):
    plain = head(Shares(act)).double()
    step(plain, images())
    ours, x = convert(copy.deepcopy(plain)), images()
    assert_same(step(plain, x), step(ours, x))
    names = [node.name() for node in nodes(ours(x))]
    assert sum("BnActFunction" in name for name in names) == 1
    assert sum("BnActConvFunction" in name for name in names) == 2
    with torch.no_grad():
        torch.testing.assert_close(plain(x), ours(x), rtol=1e-8, atol=1e-10)
    inputs = [list(network.parameters()) for network in (plain, ours)]
    twice = []
    for network, wanted in zip((plain, ours), inputs, strict=True):
        first = torch.autograd.grad(network(x).square().sum(), wanted, create_graph=True)
        twice.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))
    for one, other in zip(*twice, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


class JoinsOfJoins(nn.Module):
    """A dense block in which each join is of the last one; two layers and a pooling look at one of them."""

    def __init__(self):
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm2d(c) for c in (16, 20, 24, 24))
        self.convs = nn.ModuleList(nn.Conv2d(c, 4, 1) for c in (16, 20, 24, 24))

    def forward(self, x):
        pairs = zip(self.bns, self.convs, strict=True)
        first, second, third, fourth = (lambda t, b=b, c=c: c(F.relu(b(t))) for b, c in pairs)
        x = torch.cat([x, first(x)], 1)
        x = torch.cat([x, second(x)], 1)
        both = third(x) + fourth(x)
        return torch.cat([x.detach(), x, both], 1) + F.adaptive_avg_pool2d(x, 1).mean()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("frozen", [False, True])
def test_joins_of_joins_hand_their_gradients_on(frozen):
    """Of pieces that several layers and a pooling take, and of which some take none; twice differentiated, too."""
    plain = head(JoinsOfJoins(), nn.BatchNorm2d(52), nn.ReLU(), nn.Conv2d(52, 8, 1)).double()
    step(plain, images())
    if frozen:
        plain[0].requires_grad_(False)
    ours, x = convert(copy.deepcopy(plain)), images()
    assert_same(step(plain, x), step(ours, x))
    inputs = [[p for p in network.parameters() if p.requires_grad] for network in (plain, ours)]
    twice = []
    for network, wanted in zip((plain, ours), inputs, strict=True):
        first = torch.autograd.grad(network(x).square().sum(), wanted, create_graph=True)
        twice.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True))
    for one, other in zip(*twice, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1)])
@pytest.mark.parametrize("channels", [(12, 12, 24), (5, 30, 1), (16, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_pieces_are_normalised_and_convolved_as_if_joined(native, dtype, channels, kernel, stride, layout):
    torch.manual_seed(0)
    pieces = [torch.randn(3, c, 6, 7).to(dtype) for c in channels]
    x = torch.cat(pieces, 1)
    if layout == "channels_last":
        x, *pieces = (t.contiguous(memory_format=torch.channels_last) for t in (x, *pieces))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    mean, weight_of_norm, bias_of_norm = torch.randn(3, x.shape[1], dtype=acc)
    var = torch.rand(x.shape[1], dtype=acc) + 0.5
    weight = torch.randn(20, x.shape[1], kernel, kernel).to(dtype).to(memory_format=torch.channels_last)
    norm, geometry = (weight_of_norm, bias_of_norm, mean, var), ([stride] * 2, [kernel // 2] * 2)
    ops = torch.ops.ran_ext
    out = ops._joined_bn_relu_conv2d(pieces, weight, None, *norm, 1e-5, *geometry, 0)
    whole = ops._chained_bn_relu_conv2d(
        x, *norm, True, [], None, 1e-5, weight, None, None, *geometry, False, [], None, False
    )
    assert torch.equal(out, whole[0])
    dout = torch.randn_like(out)
    for wanted in ([True, True, True], [True, False, False], [False, True, False]):
        found = ops._joined_bn_relu_conv2d_backward(dout, pieces, *norm, weight, *geometry, 1e-5, True, wanted, 0)
        expected = ops.bn_relu_conv2d_backward(dout, x, *norm, weight, *geometry, 1e-5, True, wanted, None)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_pieces_that_do_not_fit_are_refused(native):
    ops, one = torch.ops.ran_ext, torch.ones(2)
    rest = torch.ones(4, 2, 1, 1), None, one, one, one, one, 1e-5, [1, 1], [0, 0], 0
    with pytest.raises(ValueError, match="pieces must not be empty"):
        ops._joined_bn_relu_conv2d([], *rest)
    with pytest.raises(ValueError, match=r"pieces must be alike but for .*\[1, 1, 3, 3\] and \[1, 1, 4, 3\]"):
        ops._joined_bn_relu_conv2d([torch.ones(1, 1, 3, 3), torch.ones(1, 1, 4, 3)], *rest)
    nothing = [torch.ones(0, 1, 3, 3)] * 2
    assert ops._joined_bn_relu_conv2d(nothing, *rest).shape == (0, 4, 3, 3)
