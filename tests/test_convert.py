"""Converted networks give what they gave before, whatever is done with them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from ran_ext import _backend, _converted, compare, convert, fused, models, revert, set_backend, set_conv3x3
from ran_ext._compare import bytes_kept
from ran_ext._converted import Converted, Convolving, Deferring
from ran_ext._deferred import Deferred
from ran_ext._explain import layers


@pytest.fixture(autouse=True)
def no_mode_stays_on():
    yield
    assert torch._C._len_torch_function_stack() == 0


class PreAct(nn.Module):
    """He et al. 2016: one activation feeds the convolution and the shortcut."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride) if c_in != c_out else None

    def forward(self, x):
        a = F.relu(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(a)
        return self.conv2(F.relu(self.bn2(self.conv1(a)))) + identity


class PostAct(nn.Module):
    """He et al. 2015: ReLU in place, a normalisation with nothing behind it but the sum."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class Mobile(nn.Sequential):
    """Depthwise, ReLU6, and a normalisation straight into a convolution."""

    def __init__(self, channels, act=nn.ReLU6):
        super().__init__(
            nn.Conv2d(channels, 2 * channels, 1, bias=False),
            nn.BatchNorm2d(2 * channels),
            act(),
            nn.Conv2d(2 * channels, 2 * channels, 3, 1, 1, groups=2 * channels, bias=False),
            nn.BatchNorm2d(2 * channels),
            act(),
            nn.Conv2d(2 * channels, channels, 1),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=2, dilation=2),
        )


class Dense(nn.Module):
    def __init__(self, channels, layers=3, growth=8):
        super().__init__()
        widths = [channels + growth * i for i in range(layers)]
        self.bns = nn.ModuleList(nn.BatchNorm2d(c) for c in widths)
        self.convs = nn.ModuleList(nn.Conv2d(c, growth, 1) for c in widths)

    def forward(self, x):
        pieces = [x]
        for bn, conv in zip(self.bns, self.convs, strict=True):
            pieces.append(conv(F.relu(bn(torch.cat(pieces, 1)))))
        return torch.cat(pieces, 1)


def head(*body):
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))


NETWORKS = {
    "preact": lambda: head(PreAct(16, 16), PreAct(16, 24, 2), nn.BatchNorm2d(24), nn.ReLU()),
    "postact": lambda: head(PostAct(16), nn.MaxPool2d(2), PostAct(16)),
    "mobile": lambda: head(Mobile(16)),
    "silu": lambda: head(Mobile(16, nn.SiLU)),
    "hardswish in place": lambda: head(Mobile(16, lambda: nn.Hardswish(inplace=True))),
    "silu in place": lambda: head(Mobile(16, lambda: nn.SiLU(inplace=True))),
    "leaky": lambda: head(Mobile(16, lambda: nn.LeakyReLU(0.2, inplace=True))),
    "hardtanh": lambda: head(Mobile(16, lambda: nn.Hardtanh(-0.5, 2.0))),
    "gelu": lambda: head(Mobile(16, nn.GELU)),
    "dense": lambda: head(Dense(16)),
    "without affine": lambda: head(nn.BatchNorm2d(16, affine=False), nn.ReLU(), nn.Conv2d(16, 8, 1)),
    "without tracking": lambda: head(nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU(), nn.Conv2d(16, 8, 1)),
    "cumulative": lambda: head(nn.BatchNorm2d(16, momentum=None), nn.ReLU(), nn.Conv2d(16, 8, 1)),
    "normalised twice": lambda: head(nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)),
    "ends in a normalisation": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
    "dropout": lambda: head(nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(16, 8, 1), Mobile(8)),
    "no dropout": lambda: head(nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(0), nn.Conv2d(16, 8, 1)),
    "reflected": lambda: head(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect")),
    "same": lambda: head(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding="same")),
}


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    network = NETWORKS[name]().to(dtype)
    with torch.no_grad():
        network(torch.randn(2, 3, 9, 7, dtype=dtype))
        for bn in network.modules():
            if isinstance(bn, nn.BatchNorm2d) and bn.affine:
                bn.weight.uniform_(0.5, 1.5)
                bn.bias.uniform_(-0.5, 0.5)
    return network


def images(dtype=torch.float64, seed=1):
    return torch.randn(4, 3, 9, 7, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def step(network, x, **options):
    """Output, gradient of the input and of the parameters, after one step's backward pass."""
    network.zero_grad()
    torch.manual_seed(3)  # of dropout, which draws them in the order of the memory
    x = x.clone().requires_grad_()
    out = network(x, **options)
    out.backward(torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2)))
    return [out.detach(), x.grad, *(p.grad for p in network.parameters())]


def assert_same(one, other):
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def pair(name, dtype=torch.float64):
    plain = build(name, dtype).to(memory_format=torch.channels_last)
    return plain, convert(copy.deepcopy(plain))


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
    ("name", "most"), [("preact", 0.62), ("mobile", 0.50), ("silu", 0.5), ("dense", 0.60), ("no dropout", 0.55)]
)
def test_bytes_kept_fall(name, most):
    plain, ours = pair(name, torch.float32)
    x = torch.randn(8, 3, 32, 32)
    step(ours, x)
    assert bytes_kept(ours, [x]) <= most * bytes_kept(plain, [x])


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


def test_hooks_on_a_normalisation_see_its_value():
    plain, ours = pair("preact")
    seen = []
    for network in (plain, ours):
        network[1].bn1.register_forward_hook(lambda module, args, out: seen.append(out))
    x = images()
    assert_same(step(plain, x), step(ours, x))
    assert type(seen[1]) is torch.Tensor
    torch.testing.assert_close(*seen)


class Scale(torch.autograd.Function):
    """Not reached by __torch_function__."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dout):
        return dout * 2


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


@pytest.mark.parametrize("name", ["preact", "postact", "dense"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_as_before(name, reentrant):
    plain, ours = pair(name)

    def through(network):
        return lambda x: checkpoint(network, x, use_reentrant=reentrant)

    for network in (plain, ours):
        network.zero_grad()
    grads = []
    for network in (plain, ours):
        x = images().requires_grad_()
        through(network)(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in network.parameters()), *network.buffers()])
    assert_same(*grads)


def test_double_backward():
    plain, ours = pair("preact")
    found = []
    for network in (plain, ours):
        x = images().requires_grad_()
        (grad,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append([x.grad, *(p.grad for p in network.parameters() if p.grad is not None)])
    assert_same(*found)


def test_function_transforms():
    plain, ours = pair("preact")
    for network in (plain, ours):
        network.eval()
    found = []
    for network in (plain, ours):
        parameters = dict(network.named_parameters())

        def loss(parameters, x, network=network):
            return torch.func.functional_call(network, parameters, (x,)).square().sum()

        grads = torch.func.grad(loss)(parameters, images())
        each = torch.func.vmap(lambda x, loss=loss, p=parameters: loss(p, x[None]))(images())
        found.append([*grads.values(), each])
    assert_same(*found)


def test_autocast():
    plain, ours = pair("preact", torch.float32)
    x = images(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = ours(x), plain(x)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)


def test_copies_pickles_and_files():
    plain, ours = pair("preact")
    x = images()
    step(plain, x)
    expected = step(plain.eval(), x)
    step(ours, x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert isinstance(twin[1].bn1, Deferring)
        assert twin[1].bn1 is not ours[1].bn1
        assert_same(step(twin.eval(), x), expected)


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
    [way] = {row.ways["forward"][0] for row in layers(ours, x) if row.name == "1"}
    assert way == "fast"
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


@pytest.mark.parametrize("name", ["preact", "dense", "silu"])
def test_compiled_it_is_one_graph_and_right(name):
    plain, ours = pair(name, torch.float32)
    torch.compiler.reset()
    graphs = []
    compiled = torch.compile(ours, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    for seed in range(3):
        x = images(torch.float32, seed)
        for mine, theirs in zip(step(compiled, x), step(plain, x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(list(ours.buffers()), list(plain.buffers()))
    assert len(graphs) == 1
    assert_close_after_eager(plain, ours)


def assert_close_after_eager(plain, ours):
    x = images(torch.float32, 9)
    for mine, theirs in zip(step(ours, x), step(plain, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_compiled_part_takes_a_deferred_tensor():
    torch.compiler.reset()
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3))).double()
    ours = convert(copy.deepcopy(plain))
    ours[1].compile(backend="eager")
    assert_same(step(plain, images()), step(ours, images()))


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


def test_a_compiled_block_inside_a_network_whose_joins_are_kept():
    torch.compiler.reset()
    plain, ours = pair("dense", torch.float32)
    ours[1].compile(backend="eager", fullgraph=True)
    assert_close_after_eager(plain, ours)


def test_inference_mode():
    plain, ours = pair("preact")
    x = images()
    for mode in (True, False):
        with torch.inference_mode():
            torch.testing.assert_close(ours.train(mode)(x), plain.train(mode)(x))
    assert_same(list(plain.buffers()), list(ours.buffers()))


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


@pytest.mark.parametrize("name", ["preact", "silu"])
def test_running_statistics_written_to_before_backward_are_noticed(name):
    """Of an evaluation that is differentiated; torch gives a wrong gradient."""
    network = convert(build(name))
    out = network.eval()(images().requires_grad_()).sum()
    network.train()(images())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_synchronised_normalisations_made_later():
    plain, ours = pair("preact")
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in ours.modules())
    assert_same([plain.eval()(images())], [ours.eval()(images())])


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
    assert rows["1.conv2"].ways["forward"][0] == "fused"
    assert rows["1.bn2"].ways["forward"] == ("as written", "neither an activation nor a convolution takes its value")
    rows = {row.name: row for row in layers(convert(build("silu", torch.float32)).train(), images(torch.float32))}
    assert rows["1.3"].ways["forward"][0] == "recomputed"
    assert rows["1.3"].ways["forward"][1].startswith("silu before a grouped convolution")
    rows = {row.name: row for row in layers(convert(build("dense", torch.float32)).train(), images(torch.float32))}
    assert "of 3 pieces" in rows["1.convs.2"].ways["forward"][1]
    network = convert(build("preact", torch.float32)).train()
    network[1].bn1.register_forward_hook(lambda *args: None)
    [way] = [row.ways["forward"] for row in layers(network, images(torch.float32)) if row.name == "1.bn1"]
    assert way == ("as written", "a hook on the module looks at its output")


def test_unused_parameters_stay():
    network = build("preact")
    network.unused, network[1].scale = nn.BatchNorm2d(5), nn.Parameter(torch.ones(3))
    names = [name for name, _ in network.named_parameters()]
    parameters = [id(p) for p in network.parameters()]
    convert(network)
    assert [name for name, _ in network.named_parameters()] == names
    assert [id(p) for p in network.parameters()] == parameters


def test_an_optimizer_made_before_goes_on():
    plain = build("preact")
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    twin = copy.deepcopy(plain)
    other = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    for seed in range(3):
        for network, one in ((plain, optimizer), (twin, other)):
            step(network, images(seed=seed))
            one.step()
        convert(twin)  # after the first step; twice does nothing
    assert_same(list(plain.state_dict().values()), list(twin.state_dict().values()))
    average = torch.optim.swa_utils.AveragedModel(twin)
    average.update_parameters(twin)
    assert_same(step(average, images()), [*step(twin, images())])


def test_symbolic_traces_and_jit_traces_are_plain():
    plain, ours = pair("preact")
    plain.eval(), ours.eval()
    x = images()
    for traced in (torch.fx.symbolic_trace(ours), torch.jit.trace(ours, x), torch.export.export(ours, (x,)).module()):
        torch.testing.assert_close(traced(x), plain(x), rtol=1e-8, atol=1e-10)


def test_forward_mode_differentiation():
    plain, ours = pair("silu")
    found = []
    for network in (plain.eval(), ours.eval()):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(images(), images(seed=4))
            found.append(torch.autograd.forward_ad.unpack_dual(network(dual)).tangent)
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_scripted_parts_stay():
    plain, ours = (  # torch copies no gradients' places of scripted modules
        nn.Sequential(nn.BatchNorm2d(3), torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))).double()
        for _ in range(2)
    )
    convert(ours)
    assert isinstance(ours[0], Deferring)
    assert not any(isinstance(module, Converted) for module in ours[1].modules())
    assert_same(step(plain, images()), step(ours, images()))


def test_a_submodule_may_be_converted_by_itself_and_within():
    plain = build("dense")
    ours = copy.deepcopy(plain)
    convert(ours[1])
    assert_same(step(plain, images()), step(ours, images()))
    convert(ours)
    assert_same(step(plain, images()), step(ours, images()))
    assert_same(list(plain.buffers()), list(ours.buffers()))


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    plain, ours = pair("preact")
    wrapped = nn.parallel.DistributedDataParallel(ours)
    for seed in range(2):
        assert_same(step(plain, images(seed=seed)), step(wrapped, images(seed=seed)))
    assert_same(list(plain.buffers()), list(ours.buffers()))


def test_fully_sharded(one_process):
    from torch.distributed.fsdp import fully_shard

    plain = build("preact")
    ours = convert(copy.deepcopy(plain), channels_last=False)  # torch shards contiguous parameters only
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(ours[1], mesh=mesh)
    fully_shard(ours, mesh=mesh)
    for seed in range(2):
        expected, found = step(plain, images(seed=seed)), step(ours, images(seed=seed))
        assert_same(expected, [t.full_tensor() if hasattr(t, "full_tensor") else t for t in found])
