"""Gradients that can be differentiated again are those that are not."""

import pytest
import torch
from torch import nn

from ran_ext import convert, ops, set_backend


def shared(name):
    """A layer that is called on its own output, and its parameters."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(4, 4, 3, padding=1).double(), nn.BatchNorm2d(4).double()
    mask = nn.Conv2d(4, 4, 1).double()
    between = {"silu": nn.SiLU(), "join": nn.ReLU(), "gelu": nn.GELU(), "dropout": nn.Dropout(0.4)}
    between |= {"max": nn.MaxPool2d(3, 1, 1), "avg": nn.AvgPool2d(3, 1, 1)}
    if name in between:
        block = nn.Sequential(bn, between[name], conv)
        joins = name == "join"
        network = convert(Twice(block, joins))
        return network, list(network.parameters())
    norm, stats = (bn.weight, bn.bias), (None, None)
    layer = {
        "conv2d": lambda x: ops.conv2d(x, conv.weight, conv.bias, padding=1),
        "bn_relu": lambda x: ops.bn_relu(x, *norm, *stats, training=True),
        "bn_relu_conv2d": lambda x: ops.bn_relu_conv2d(
            x, *norm, *stats, conv.weight, conv.bias, padding=1, training=True
        ),
        "gate": lambda x: ops.attention_gate(x, mask(x)),
        "conv gate": lambda x: ops.conv_attention_gate(x, x, mask.weight, mask.bias),
    }[name]
    return lambda x: layer(layer(x)), [p for module in (conv, bn, mask) for p in module.parameters()]


class Twice(nn.Module):
    """``joins``: the second time, of half of the input and of what the first time made."""

    def __init__(self, block, joins):
        super().__init__()
        self.block, self.joins = block, joins

    def forward(self, x):
        y = self.block(x)
        return self.block(torch.cat([x[:, :2], y[:, :2]], 1) if self.joins else y)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "name",
    [
        *("conv2d", "bn_relu", "bn_relu_conv2d", "gate", "conv gate", "silu", "join", "gelu", "dropout", "max", "avg"),
    ],
)
def test_one_argument_made_of_another_counts_once_where_gradients_are_differentiated(name, backend):
    """As of layers that share a weight: ``create_graph`` changes no gradient."""
    call, parameters = shared(name)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    with set_backend(backend):
        out = call(x)
    loss, leaves = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum(), [x, *parameters]
    once = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    assert once[0].abs().max() > 0
    for one, other in zip(once, again, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-9)
