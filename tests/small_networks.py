"""Small networks of others, one for each pattern that ``convert`` knows, and what their tests share."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from ran_ext import convert


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
    "gelu, tanh": lambda: head(Mobile(16, lambda: nn.GELU("tanh"))),
    "dense": lambda: head(Dense(16)),
    "without affine": lambda: head(nn.BatchNorm2d(16, affine=False), nn.ReLU(), nn.Conv2d(16, 8, 1)),
    "without tracking": lambda: head(nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU(), nn.Conv2d(16, 8, 1)),
    "cumulative": lambda: head(nn.BatchNorm2d(16, momentum=None), nn.ReLU(), nn.Conv2d(16, 8, 1)),
    "normalised twice": lambda: head(nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)),
    "ends in a normalisation": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
    "dropout": lambda: head(nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(16, 8, 1), Mobile(8)),
    "dropout in place": lambda: head(
        nn.BatchNorm2d(16),
        nn.SiLU(inplace=True),
        nn.Dropout(0.3, inplace=True),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.Dropout2d(0.2),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
    ),
    "dropout used twice": lambda: head(
        nn.BatchNorm2d(16), nn.SiLU(), nn.Dropout2d(0.4), PreAct(16, 16), nn.BatchNorm2d(16), nn.Dropout(0.4)
    ),
    "no dropout": lambda: head(nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(0), nn.Conv2d(16, 8, 1)),
    "pooled": lambda: head(
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.MaxPool2d((3, 2), stride=(1, 2), padding=1, dilation=(2, 1), ceil_mode=True),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AvgPool2d(2, 1, 1, count_include_pad=False),
        nn.Conv2d(16, 16, 1),
    ),
    "pooled by two": lambda: head(
        nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(16, 16, 3, padding=1)
    ),
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


class Scale(torch.autograd.Function):
    """Not reached by __torch_function__."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dout):
        return dout * 2
