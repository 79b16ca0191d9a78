"""ResNet-18 and VGG-16 with batch normalisation in plain PyTorch, for measurements of ``ran_ext.ops.conv2d``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

Conv = Callable[..., Tensor]


class _Conv2d(nn.Conv2d):
    """A convolution that runs ``function`` in place of ``F.conv2d``."""

    def __init__(self, function: Conv, c_in: int, c_out: int, kernel: int, stride: int = 1, bias: bool = False):
        super().__init__(c_in, c_out, kernel, stride, kernel // 2, bias=bias)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias, self.stride, self.padding)


class _BasicBlock(nn.Module):
    def __init__(self, conv: Conv, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _Conv2d(conv, c_in, c_out, 3, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = _Conv2d(conv, c_out, c_out, 3), nn.BatchNorm2d(c_out)
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

    >>> import torch
    >>> resnet18(classes=10)(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    sizes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    blocks = [_BasicBlock(conv, *size) for size in [*sizes, (512, 512, 1)]]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def vgg16_bn(conv: Conv = F.conv2d, classes: int = 1000) -> nn.Module:
    """VGG-16 with batch normalisation (Simonyan and Zisserman 2015, arXiv:1409.1556), of its dense layers the last.

    >>> import torch
    >>> vgg16_bn(classes=10)(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [_Conv2d(conv, channels, width, 3, bias=True), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))
