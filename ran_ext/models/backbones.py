"""Attention modules in other backbones: VGG-16, AlexNet and MobileNetV2 for images of 32 pixels and up.

Each network is the published one but for its strides, which suit small images, and its head: average pooling and one
dense layer. A stage's first layer changes the channels; the layers behind it, which keep the shape, are the trunk of an
attention module, ``(1 + M(x)) * trunk(x)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..nn import AttentionModule, ResidualUnit
from .classifier import ImageClassifier, require_options, scaled


class BackboneNetwork(ImageClassifier):
    """Features, average pooling, a dense layer; use :func:`vgg16_attention` and its like.

    Args:
        features: layers from the images to ``(N, channels, H, W)``.
        channels: that the dense layer takes.
        num_classes, in_channels: outputs of the dense layer, image channels.
        dropout: probability before the dense layer.
    """

    #: Five halvings of VGG-16 must each find two pixels.
    min_size = 32

    def __init__(
        self, features: Iterable[nn.Module], channels: int, num_classes: int, in_channels: int, dropout: float
    ):
        super().__init__()
        self.in_channels = in_channels
        self.features = nn.Sequential(*features)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)`` of any size from 32x32."""
        self._require_images(x)
        return self.fc(self.dropout(self.features(x).mean((2, 3))))


def vgg16_attention(
    num_classes: int = 10, in_channels: int = 3, dropout: float = 0.5, width: float = 1.0, attention: bool = True
) -> BackboneNetwork:
    """VGG-16 with batch normalisation, attention in its second and third stage (masks of depth 2 and 1).

    Args:
        num_classes, in_channels, dropout: as in :class:`BackboneNetwork`.
        width: multiplier of every width, rounded to a multiple of 8.
        attention: False leaves out the masks, the gates and nothing else.

    Source: Simonyan and Zisserman 2015, arXiv:1409.1556, configuration D.

    >>> [sum(p.numel() for p in vgg16_attention(attention=attention).parameters()) for attention in (True, False)]
    [15099850, 14724042]
    """
    require_options("vgg16_attention", num_classes, in_channels, dropout, width, {"attention": attention})
    layers: list[nn.Module] = []
    into = in_channels
    for channels, count, depth in ((64, 2, 0), (128, 2, 2), (256, 3, 1), (512, 3, 0), (512, 3, 0)):
        out = scaled(channels, width)
        first, *trunk = (_conv_bn_relu(out if i else into, out) for i in range(count))
        layers += [first, *_attended(trunk, out, depth if attention else 0), nn.MaxPool2d(2)]
        into = out
    return BackboneNetwork(layers, into, num_classes, in_channels, dropout)


def alexnet_attention(
    num_classes: int = 10, in_channels: int = 3, dropout: float = 0.5, width: float = 1.0, attention: bool = True
) -> BackboneNetwork:
    """AlexNet's five convolutions, attention around the last (a mask of depth 1); without batch normalisation.

    Args:
        num_classes, in_channels, dropout: as in :class:`BackboneNetwork`.
        width: multiplier of every width, rounded to a multiple of 8.
        attention: False leaves out the mask, the gate and nothing else.

    Weights are drawn as of He et al. 2015 (arXiv:1502.01852), as without normalisation PyTorch's own start too small.

    Source: Krizhevsky 2014, arXiv:1404.5997, the one column of AlexNet; stride 1 in the first convolution.

    >>> [sum(p.numel() for p in alexnet_attention(attention=attention).parameters()) for attention in (True, False)]
    [2725706, 2453834]
    """
    require_options("alexnet_attention", num_classes, in_channels, dropout, width, {"attention": attention})
    c1, c2, c3, c4 = (scaled(channels, width) for channels in (64, 192, 384, 256))
    layers: list[nn.Module] = [
        *(_conv_relu(in_channels, c1, 5), nn.MaxPool2d(3, 2, 1)),
        *(_conv_relu(c1, c2, 5), nn.MaxPool2d(3, 2, 1)),
        *(_conv_relu(c2, c3), _conv_relu(c3, c4)),
        *_attended([_conv_relu(c4, c4)], c4, 1 if attention else 0),
        nn.MaxPool2d(3, 2, 1),
    ]
    return BackboneNetwork(layers, c4, num_classes, in_channels, dropout)


def mobilenet_v2_attention(
    num_classes: int = 10, in_channels: int = 3, dropout: float = 0.2, width: float = 1.0, attention: bool = True
) -> BackboneNetwork:
    """MobileNetV2, attention in its stages of 32 and 96 channels (masks of depth 2 and 1).

    Args:
        num_classes, in_channels, dropout: as in :class:`BackboneNetwork`.
        width: multiplier of every width, rounded to a multiple of 8.
        attention: False leaves out the masks, the gates and nothing else.

    Source: Sandler et al. 2018, arXiv:1801.04381, table 2; stride 1 in the first convolution and the second stage.

    >>> [sum(p.numel() for p in mobilenet_v2_attention(attention=on).parameters()) for on in (True, False)]
    [2282058, 2236682]
    """
    require_options("mobilenet_v2_attention", num_classes, in_channels, dropout, width, {"attention": attention})
    into = scaled(32, width)
    layers: list[nn.Module] = [_conv_bn_relu(in_channels, into, relu6=True)]
    for expansion, channels, count, stride, depth in (
        (1, 16, 1, 1, 0),
        (6, 24, 2, 1, 0),
        (6, 32, 3, 2, 2),
        (6, 64, 4, 2, 0),
        (6, 96, 3, 1, 1),
        (6, 160, 3, 2, 0),
        (6, 320, 1, 1, 0),
    ):
        out = scaled(channels, width)
        trunk = [InvertedResidual(out, out, 1, expansion) for _ in range(count - 1)]
        layers += [InvertedResidual(into, out, stride, expansion), *_attended(trunk, out, depth if attention else 0)]
        into = out
    last = scaled(1280, width)
    layers.append(_conv_bn_relu(into, last, kernel_size=1, relu6=True))
    return BackboneNetwork(layers, last, num_classes, in_channels, dropout)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 to ``expansion`` times the width, depthwise 3x3 (the stride), 1x1 without a ReLU.

    The input is added where its shape is the output's.

    >>> InvertedResidual(8, 16, 2, 6)(torch.randn(2, 8, 8, 8)).shape
    torch.Size([2, 16, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        mid = in_channels * expansion
        self.adds = in_channels == out_channels and stride == 1
        self.layers = nn.Sequential(
            *([_conv_bn_relu(in_channels, mid, kernel_size=1, relu6=True)] if expansion > 1 else []),
            _conv_bn_relu(mid, mid, stride=stride, groups=mid, relu6=True),
            nn.Conv2d(mid, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


def _conv_bn_relu(
    into: int, out: int, kernel_size: int = 3, stride: int = 1, groups: int = 1, relu6: bool = False
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU6() if relu6 else nn.ReLU(),
    )


def _conv_relu(into: int, out: int, kernel_size: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(into, out, kernel_size, padding=kernel_size // 2)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return nn.Sequential(conv, nn.ReLU())


def _attended(trunk: Sequence[nn.Module], channels: int, depth: int) -> list[nn.Module]:
    """``trunk`` in an attention module whose mask halves the resolution ``depth`` times; as it is where that is 0."""
    if not depth:
        return list(trunk)

    def quarter(channels: int) -> ResidualUnit:
        return ResidualUnit(channels, channels, max(8, channels // 4), bias=False)

    return [AttentionModule(channels, depth, p=0, unit=quarter, trunk=nn.Sequential(*trunk), bias=False)]
