"""Networks of others in plain PyTorch, written anew from their papers, for tests and measurements."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class _PreActBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, dropout: float = 0.0):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if stride > 1 or c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x))
        identity: Tensor = x if self.shortcut is None else self.shortcut(a)
        return identity + self.conv2(self.dropout(F.relu(self.bn2(self.conv1(a)))))


def _preact(widths: list[int], blocks: int, classes: int, stem: int, dropout: float = 0.0) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, padding=1, bias=False)]
    c_in = stem
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(_PreActBlock(c_in, width, 2 if stage and not block else 1, dropout))
            c_in = width
    head = [nn.BatchNorm2d(c_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes)]
    return nn.Sequential(*layers, *head)


def preact_resnet18(classes: int = 10) -> nn.Module:
    """PreActResNet-18 (He et al. 2016, arXiv:1603.05027), for 32 pixels.

    >>> preact_resnet18()(torch.randn(1, 3, 16, 16)).shape
    torch.Size([1, 10])
    """
    return _preact([64, 128, 256, 512], 2, classes, 64)


def wide_resnet(depth: int, width: int, dropout: float = 0.0, classes: int = 10) -> nn.Module:
    """WRN-``depth``-``width`` (Zagoruyko and Komodakis 2016, arXiv:1605.07146).

    >>> wide_resnet(16, 1)(torch.randn(1, 3, 16, 16)).shape
    torch.Size([1, 10])
    """
    return _preact([16 * width, 32 * width, 64 * width], (depth - 4) // 6, classes, 16, dropout)


class _DenseLayer(nn.Module):
    def __init__(self, c_in: int, growth: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, 4 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))], 1)


def densenet_bc(depth: int = 100, growth: int = 12, classes: int = 10) -> nn.Module:
    """DenseNet-BC-``depth``-``growth`` (Huang et al. 2017, arXiv:1608.06993), for 32 pixels.

    >>> densenet_bc(22)(torch.randn(1, 3, 16, 16)).shape
    torch.Size([1, 10])
    """
    c, layers = 2 * growth, (depth - 4) // 6
    body: list[nn.Module] = [nn.Conv2d(3, c, 3, padding=1, bias=False)]
    for block in range(3):
        for _ in range(layers):
            body.append(_DenseLayer(c, growth))
            c += growth
        if block < 2:
            body += [nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c // 2, 1, bias=False), nn.AvgPool2d(2)]
            c //= 2
    head = [nn.BatchNorm2d(c), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes)]
    return nn.Sequential(*body, *head)


class _DenseBlock(nn.Module):
    """Layers that each take all outputs before it, as a list; ``checkpointed``: up to the 3x3 convolution."""

    def __init__(self, c_in: int, growth: int, count: int, checkpointed: bool):
        super().__init__()
        self.layers = nn.ModuleList(_DenseLayer(c_in + i * growth, growth) for i in range(count))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        pieces = [x]
        for layer in self.layers:

            def narrow(*pieces: Tensor, layer: nn.Module = layer) -> Tensor:
                return layer.conv1(F.relu(layer.bn1(torch.cat(pieces, 1))))  # type: ignore[no-any-return,operator]

            within = checkpoint(narrow, *pieces, use_reentrant=False) if self.checkpointed else narrow(*pieces)
            pieces.append(layer.conv2(F.relu(layer.bn2(within))))  # type: ignore[operator]
        return torch.cat(pieces, 1)


def densenet121(classes: int = 1000, checkpointed: bool = False) -> nn.Module:
    """DenseNet-121 (Huang et al. 2017, arXiv:1608.06993).

    Args:
        classes: of the dense layer.
        checkpointed: each layer's first half runs again in backward, as in torchvision's ``memory_efficient=True``.

    >>> densenet121(classes=10)(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    c = 64
    body: list[nn.Module] = [nn.Conv2d(3, c, 7, 2, 3, bias=False), nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for stage, count in enumerate((6, 12, 24, 16)):
        body.append(_DenseBlock(c, 32, count, checkpointed))
        c += 32 * count
        if stage < 3:
            body += [nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c // 2, 1, bias=False), nn.AvgPool2d(2)]
            c //= 2
    head = [nn.BatchNorm2d(c), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes)]
    return nn.Sequential(*body, *head)


def _twice(c_in: int, c_out: int) -> nn.Module:
    layers: list[nn.Module] = []
    for c in (c_in, c_out):
        layers += [nn.Conv2d(c, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015, arXiv:1505.04597) with batch normalisation and padding.

    Args:
        width: channels of the first level; doubled by each of the ``depth`` below.
        depth: how often the size is halved; it must divide by ``2 ** depth``.
        classes: channels of the result, ``(N, classes, H, W)``.

    >>> UNet(8)(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 2, 32, 32])
    """

    def __init__(self, width: int = 64, depth: int = 4, classes: int = 2):
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        pairs = list(itertools.pairwise(widths))
        self.first, self.last = _twice(3, width), nn.Conv2d(width, classes, 1)
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), _twice(a, b)) for a, b in pairs)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in reversed(pairs))
        self.up = nn.ModuleList(_twice(b, a) for a, b in reversed(pairs))

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.first(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = levels.pop()
        for grow, up in zip(self.grow, self.up, strict=True):
            x = up(torch.cat([levels.pop(), grow(x)], 1))
        out: Tensor = self.last(x)
        return out


class _CSP(nn.Module):
    """Two paths, one through bottlenecks, joined (Wang et al. 2019, arXiv:1911.11929)."""

    def __init__(self, channels: int, count: int):
        super().__init__()
        half = channels // 2
        self.one, self.two, self.last = _silu(channels, half, 1), _silu(channels, half, 1), _silu(channels, channels, 1)
        self.body = nn.ModuleList(nn.Sequential(_silu(half, half, 1), _silu(half, half, 3)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        for body in self.body:
            one = one + body(one)
        out: Tensor = self.last(torch.cat([one, self.two(x)], 1))
        return out


def _silu(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out, 1e-3, 0.03), nn.SiLU(inplace=True))


def silu_stack(width: int = 32, classes: int = 10) -> nn.Module:
    """The backbone of a detector, as YOLO's of 2020: SiLU, bottlenecks in two paths.

    >>> silu_stack(16)(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    """
    layers: list[nn.Module] = [_silu(3, width, 6, 2)]
    for level, count in enumerate((1, 2, 3, 1)):
        c = width << level
        layers += [_silu(c, 2 * c, 3, 2), _CSP(2 * c, count)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width << 4, classes))


Conv = Callable[..., Tensor]


class _Conv2d(nn.Conv2d):
    """A convolution that runs ``function`` in place of ``F.conv2d``."""

    def __init__(self, function: Conv, c_in: int, c_out: int, kernel: int, stride: int = 1, bias: bool = False):
        super().__init__(c_in, c_out, kernel, stride, kernel // 2, bias=bias)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias, self.stride, self.padding)


def _conv2d(conv: Conv, c_in: int, c_out: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    if conv is F.conv2d:  # the plain module, which `ran_ext.convert` knows
        return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=bias)
    return _Conv2d(conv, c_in, c_out, kernel, stride, bias)


class _BasicBlock(nn.Module):
    def __init__(self, conv: Conv, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv2d(conv, c_in, c_out, 3, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = _conv2d(conv, c_out, c_out, 3), nn.BatchNorm2d(c_out)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
            if stride > 1 or c_in != c_out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def resnet18(conv: Conv = F.conv2d, classes: int = 1000) -> nn.Module:
    """ResNet-18 (He et al. 2016, arXiv:1512.03385); its 3x3 convolutions run ``conv``.

    >>> resnet18(classes=10)(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    sizes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    blocks = [_BasicBlock(conv, *size) for size in [*sizes, (512, 512, 1)]]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


class _Bottleneck(nn.Module):
    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c)
        self.conv3, self.bn3 = nn.Conv2d(c, 4 * c, 1, bias=False), nn.BatchNorm2d(4 * c)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(c_in, 4 * c, 1, stride, bias=False), nn.BatchNorm2d(4 * c))
            if stride > 1 or c_in != 4 * c
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def resnet50(classes: int = 1000) -> nn.Module:
    """ResNet-50 (He et al. 2016, arXiv:1512.03385), strides in the 3x3 convolutions.

    >>> resnet50(classes=10)(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    body: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    c_in = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for block in range(count):
            body.append(_Bottleneck(c_in, 64 << stage, 2 if stage and not block else 1))
            c_in = 256 << stage
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes))


def vgg16_bn(conv: Conv = F.conv2d, classes: int = 1000) -> nn.Module:
    """VGG-16 with batch normalisation (Simonyan and Zisserman 2015, arXiv:1409.1556), of its dense layers the last.

    >>> vgg16_bn(classes=10)(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [_conv2d(conv, channels, width, 3, bias=True), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


class _Inverted(nn.Module):
    """Wider, one by one, narrower, past ReLU6 but for the last (Sandler et al. 2018)."""

    def __init__(self, c_in: int, c_out: int, stride: int, widen: int):
        super().__init__()
        c = c_in * widen
        layers: list[nn.Module] = [] if widen == 1 else [_relu6(c_in, c, 1)]
        layers += [_relu6(c, c, 3, stride, c), nn.Conv2d(c, c_out, 1, bias=False), nn.BatchNorm2d(c_out)]
        self.body, self.adds = nn.Sequential(*layers), stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.adds else out


def _relu6(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True))


def mobilenet_v2(classes: int = 1000) -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381).

    >>> mobilenet_v2(classes=10)(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    layers: list[nn.Module] = [_relu6(3, 32, 3, 2)]
    c_in = 32
    for widen, c, count, stride in (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ):
        for i in range(count):
            layers.append(_Inverted(c_in, c, 1 if i else stride, widen))
            c_in = c
    head = [_relu6(c_in, 1280, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, classes)]
    return nn.Sequential(*layers, *head)


#: For ``tests/ecosystem`` and the measurements in ``docs/convert.md``, by name.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "PreActResNet-18": preact_resnet18,
    "WRN-28-10": lambda: wide_resnet(28, 10),
    "WRN-16-4, dropout": lambda: wide_resnet(16, 4, 0.3),
    "DenseNet-BC-100-12": densenet_bc,
    "U-Net": lambda: UNet(32),
    "SiLU stack": silu_stack,
}
