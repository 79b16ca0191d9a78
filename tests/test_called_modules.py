"""What acts through a call of ``bn`` or ``conv`` acts in the fused modules too, and explain says why they part."""

import types
import warnings

import pytest
import torch
from plain_twin import assert_same_training, plain_twin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from ran_ext import models
from ran_ext._explain import layers
from ran_ext.nn import AttentionModule, BNReLU, BNReLUConv2d, ResidualUnit

MODULES = {
    "bn_relu": lambda: BNReLU(8),
    "conv": lambda: BNReLUConv2d(8, 12, 3, padding=1),
    "unit": lambda: ResidualUnit(8, 12, 4, stride=2),
    "attention": lambda: AttentionModule(8, 1),
    "network": lambda: models.ResidualAttentionNetwork((0, 1), True, False, in_channels=8, width=0.125),
}


class Adapted(nn.Conv2d):
    """As adapters are: the convolution, and beside it a small one that is trained."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        self.weight, self.bias = conv.weight, conv.bias
        self.side = nn.Conv2d(conv.in_channels, conv.out_channels, 1, conv.stride, bias=False).to(conv.weight)
        nn.init.constant_(self.side.weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.side(x)


class Shifted(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5


class FrozenBatchNorm2d(nn.Module):
    """As detection toolkits freeze one: no child of BatchNorm2d, everything a buffer."""

    def __init__(self, bn: nn.BatchNorm2d):
        super().__init__()
        self.eps = bn.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(bn, name).detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class Typed(torch.Tensor):
    """A subclass whose convolutions are doubled: what sees every function must see these."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return out * 2 if function is F.conv2d else out

    def new_empty(self, *args, **kwargs):
        return super().new_empty(*args, **kwargs).as_subclass(Typed)  # which a deep copy asks for


def swap(make):
    """The way of tools that exchange modules by type: ``make(module)`` in the place of each."""

    def act(network: nn.Module, kind: type) -> None:
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is kind:
                    setattr(parent, name, make(child))

    return act


def each(change):
    def act(network: nn.Module, kind: type) -> None:
        for module in list(network.modules()):
            if type(module) is kind:
                change(module)

    return act


def shifted(bn: nn.BatchNorm2d) -> nn.Module:
    new = Shifted(bn.num_features).to(bn.weight)
    new.load_state_dict(bn.state_dict())
    return new


def doubled_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: forward(x) * 2


def tiling(conv: nn.Conv2d) -> None:
    """As image generators make seamless tiles."""

    def wrap(self, x, weight, bias):
        padding = [p for p in reversed(self.padding) for _ in (0, 1)]
        return F.conv2d(F.pad(x, padding, mode="circular"), weight, bias, self.stride)

    conv._conv_forward = types.MethodType(wrap, conv)


def plain_attribute(conv: nn.Conv2d) -> None:
    """As wrappers that gather sharded weights leave it."""
    weight = conv.weight.detach()
    del conv.weight
    conv.weight = weight


def subclassed_parameter(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Typed))


def pruned(conv: nn.Conv2d) -> None:
    prune.l1_unstructured(conv, "weight", 0.5)


def quietly(function):
    def act(conv: nn.Conv2d) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(conv)

    return act


CONV, NORM = nn.Conv2d, nn.BatchNorm2d
#: Each way to act through a call: on which modules, how, and what explain says ("" where the op still runs).
WAYS = {
    "nothing": (CONV, each(lambda conv: None), ""),
    "prune": (CONV, each(pruned), "a forward pre-hook on conv"),
    "weight_norm hook": (CONV, each(quietly(nn.utils.weight_norm)), "a forward pre-hook on conv"),
    "spectral_norm hook": (CONV, each(quietly(nn.utils.spectral_norm)), "a forward pre-hook on conv"),
    "weight_norm": (CONV, each(parametrizations.weight_norm), ""),
    "spectral_norm": (CONV, each(parametrizations.spectral_norm), ""),
    "adapter": (CONV, swap(Adapted), "conv is a Adapted, not exactly a Conv2d"),
    "output": (CONV, each(lambda c: c.register_forward_hook(lambda m, x, out: out * 2)), "a forward hook on conv"),
    "input": (CONV, each(lambda c: c.register_forward_pre_hook(lambda m, x: x[0] * 2)), "a forward pre-hook on conv"),
    "gradient": (
        CONV,
        each(lambda c: c.register_full_backward_hook(lambda m, dx, dout: tuple(d * 2 for d in dx))),
        "a backward hook on conv",
    ),
    "output gradient": (
        CONV,
        each(lambda c: c.register_full_backward_pre_hook(lambda m, dout: (dout[0] * 2,))),
        "a backward hook on conv",
    ),
    "forward": (CONV, each(doubled_forward), "forward was replaced on conv"),
    "_conv_forward": (CONV, each(tiling), "forward was replaced on conv"),
    "parameter's class": (CONV, each(subclassed_parameter), "conv has a Typed for a parameter"),
    "plain attribute": (CONV, each(plain_attribute), "weight or bias of conv is not a parameter of its own"),
    "padding": (CONV, each(lambda c: setattr(c, "padding_mode", "circular")), "conv has groups=1"),
    "geometry": (CONV, each(lambda c: setattr(c, "stride", c.stride[0])), "conv has stride="),
    "no bias": (CONV, each(lambda c: setattr(c, "bias", None)), ""),
    "bn subclass": (NORM, swap(shifted), "bn is a Shifted, not exactly a BatchNorm2d or SyncBatchNorm"),
    "bn frozen": (NORM, swap(FrozenBatchNorm2d), "bn is a FrozenBatchNorm2d, not exactly a BatchNorm2d"),
    "bn grouped": (NORM, swap(lambda bn: nn.GroupNorm(2, bn.num_features).to(bn.weight)), "bn is a GroupNorm"),
    "bn sync": (NORM, swap(nn.SyncBatchNorm.convert_sync_batchnorm), ""),
    "bn output": (NORM, each(lambda b: b.register_forward_hook(lambda m, x, out: out + 0.5)), "a forward hook on bn"),
    "bn forward": (NORM, each(doubled_forward), "forward was replaced on bn"),
    "bn weight_norm": (NORM, each(parametrizations.weight_norm), ""),
    "bn untracked": (NORM, each(lambda b: setattr(b, "track_running_stats", False)), "running statistics and track_ru"),
    "bn evaluation": (NORM, each(lambda b: b.eval()), ""),
    "bn cumulative": (NORM, each(lambda b: setattr(b, "momentum", None)), ""),
    "bn uncounted": (
        NORM,
        each(lambda b: (setattr(b, "momentum", None), setattr(b, "num_batches_tracked", None))),
        "bn averages over all batches but does not count them",
    ),
    "bn without scale": (NORM, each(lambda b: setattr(b, "weight", None)), ""),
}


CASES = [(name, way) for name in MODULES for way, (kind, *_) in WAYS.items() if name != "bn_relu" or kind is NORM]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_trains_as_the_plain_twin_does(name, way):
    ours, (kind, act, why) = MODULES[name]().double(), WAYS[way]
    plain = plain_twin(ours)
    for network in (ours, plain):
        torch.manual_seed(1)
        act(network, kind)
    assert_same_training(ours, plain, torch.randn(3, 8, 10, 9, dtype=torch.float64))
    op = "bn_relu_conv2d" if kind is CONV else "bn_relu"  # in the latter's name too
    said = {row.paths["forward"][1] for row in layers(ours, torch.randn(3, 8, 10, 9).double()) if op in row.op}
    unfused = {text for text in said if text.endswith(": runs as written")}
    assert unfused == (said if why else set())
    assert all(text.startswith(why) for text in unfused)
