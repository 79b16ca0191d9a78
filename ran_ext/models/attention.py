"""The networks of Wang et al. 2017 at the paper's size: Attention-56 to 164 for ImageNet, 36m + 20 for CIFAR."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _fusion
from ..nn import AttentionModule, BNReLUConv2d, ResidualUnit
from ..nn.attention import Skip
from ..ops import _checks as checks
from .classifier import StagedNetwork, no_pool, pool3, require_options, scaled


class AttentionNetwork(StagedNetwork):
    """The residual attention network of Wang et al. 2017; use :func:`attention56` and its like.

    For ImageNet, Table 2 of the paper: a 7x7 convolution of stride 2, a 3x3 max-pool, three stages of 256, 512 and
    1,024 channels, each a residual unit and its attention modules, three units of 2,048 channels, average pooling. For
    CIFAR (``small``): a 3x3 convolution, three stages of 64, 128 and 256 channels, each a residual unit, its modules
    and a further unit. All units are pre-activation bottlenecks, their 3x3 convolutions a quarter as wide. The masks
    pool three times in the first stage, twice in the second and once in the third; their two 1x1 convolutions run at
    the trunk's resolution, each after a batch normalisation and a ReLU, as in the authors' Caffe networks.

    Args:
        modules: attention modules in each of the three stages.
        small: the form for CIFAR.
        num_classes, in_channels: outputs of the dense layer (None: 1,000, or 10 for ``small``), image channels.
        dropout: probability before the dense layer.
        conv_bias: whether the convolutions have biases.
        width: multiplier of every width, rounded to a multiple of 32 (the stem's: of 8).
        unit: ``"bottleneck"``; ``"resnext"``, 3x3 convolutions half as wide as the unit in 32 groups (AttentionNeXt);
            ``"inception"``, three branches of one, two and three convolutions (AttentionInception, whose unit the paper
            does not describe).
        skip: across the masks' U: ``"identity"``, the level itself; True, a unit; False, nothing.
        interpolation: of the masks, ``"bilinear"`` or ``"nearest"``.
        attention: ``"mixed"``, ``"channel"`` or ``"spatial"``; see :class:`ran_ext.nn.AttentionGate`.
        residual: ``(1 + M) * T``; False: ``M * T``, the paper's naive attention.

    Raises:
        TypeError, ValueError: an option is none; the text names it.
    """

    def __init__(
        self,
        modules: tuple[int, int, int],
        small: bool = False,
        *,
        num_classes: int | None = None,
        in_channels: int = 3,
        dropout: float = 0.0,
        conv_bias: bool = False,
        width: float = 1.0,
        unit: str = "bottleneck",
        skip: Skip = "identity",
        interpolation: str = "bilinear",
        attention: str = "mixed",
        residual: bool = True,
    ):
        super().__init__()
        kind = "AttentionNetwork"
        num_classes = (10 if small else 1000) if num_classes is None else num_classes
        require_options(kind, num_classes, in_channels, dropout, width, {"conv_bias": conv_bias, "residual": residual})
        checks.choice(kind, "unit", unit, tuple(_UNITS))
        make = _UNITS[unit]
        stem = scaled(16 if small else 64, width)
        widths = [scaled(c, width, 32) for c in ((64, 128, 256) if small else (256, 512, 1024, 2048))]

        def stage(number: int) -> nn.Sequential:
            """A unit that changes the width, attention modules, and for CIFAR a further unit."""
            into, out = [stem, *widths][number : number + 2]
            attended = (
                AttentionModule(
                    out,
                    depth=3 - number,
                    skip=skip,
                    bias=conv_bias,
                    unit=lambda channels: make(channels, channels, 1, conv_bias),
                    interpolation=interpolation,
                    full_size=True,
                    attention=attention,
                    residual=residual,
                )
                for _ in range(modules[number])
            )
            after = [make(out, out, 1, conv_bias)] if small else []
            return nn.Sequential(make(into, out, 2 if number else 1, conv_bias), *attended, *after)

        self.in_channels, self.small = in_channels, small
        # The first stage's masks pool three times, and each pooling must find two pixels.
        self.min_size = 5 if small else 17
        self.conv1 = nn.Conv2d(
            in_channels, stem, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=conv_bias
        )
        self.bn1 = None if small else nn.BatchNorm2d(stem)
        self.stage1, self.stage2, self.stage3 = (stage(number) for number in range(3))
        if not small:
            self.stage4 = nn.Sequential(
                make(widths[2], widths[3], 2, conv_bias), *(make(widths[3], widths[3], 1, conv_bias) for _ in range(2))
            )
        self.bn2 = nn.BatchNorm2d(widths[-1])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(widths[-1], num_classes)

    @property
    def pool(self) -> Callable[[Tensor], Tensor]:
        return no_pool if self.small else pool3


class InceptionUnit(nn.Module):
    """A pre-activation residual unit of three branches: 1x1; 1x1, 3x3; 1x1, 3x3, 3x3; joined by a 1x1 convolution.

    The branches are a sixteenth, an eighth and an eighth as wide as the unit, so that it has about as many parameters
    as a bottleneck. The last convolution of each carries the stride.

    Args:
        in_channels, out_channels: where they differ, or ``stride`` is not 1, the input passes a plain 1x1 convolution.
        stride, bias: as in :class:`ran_ext.nn.ResidualUnit`.

    Source: Szegedy et al. 2016, arXiv:1602.07261, figure 10 (Inception-ResNet-A), narrower and pre-activated.

    >>> InceptionUnit(16, 32, stride=2)(torch.randn(2, 16, 7, 7)).shape
    torch.Size([2, 32, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, bias: bool = True):
        super().__init__()
        narrow, wide = out_channels // 16, out_channels // 8
        self.branch1 = BNReLUConv2d(in_channels, narrow, 1, stride, bias=bias)
        self.branch2 = nn.Sequential(
            BNReLUConv2d(in_channels, wide, 1, bias=bias), BNReLUConv2d(wide, wide, 3, stride, 1, bias=bias)
        )
        self.branch3 = nn.Sequential(
            BNReLUConv2d(in_channels, wide, 1, bias=bias),
            BNReLUConv2d(wide, wide, 3, 1, 1, bias=bias),
            BNReLUConv2d(wide, wide, 3, stride, 1, bias=bias),
        )
        self.join = BNReLUConv2d(narrow + 2 * wide, out_channels, 1, bias=bias)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias)
            if in_channels != out_channels or stride != 1
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else _fusion.conv2d(self.shortcut, x)
        return self.join(torch.cat((self.branch1(x), self.branch2(x), self.branch3(x)), 1), identity)


def _bottleneck(into: int, out: int, stride: int, bias: bool) -> nn.Module:
    return ResidualUnit(into, out, out // 4, stride, bias)


def _resnext(into: int, out: int, stride: int, bias: bool) -> nn.Module:
    return ResidualUnit(into, out, out // 2, stride, bias, groups=math.gcd(32, out // 2))


#: By name: a unit from input and output channels, stride, and whether convolutions have biases.
_UNITS: dict[str, Callable[[int, int, int, bool], nn.Module]] = {
    "bottleneck": _bottleneck,
    "resnext": _resnext,
    "inception": InceptionUnit,
}


def attention56(**options: Any) -> AttentionNetwork:
    """Attention-56 for ImageNet: one attention module a stage; ``options`` of :class:`AttentionNetwork`.

    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in attention56().parameters())
    31389864
    """
    return AttentionNetwork((1, 1, 1), **options)


def attention92(**options: Any) -> AttentionNetwork:
    """Attention-92 for ImageNet: one, two and three attention modules; ``options`` of :class:`AttentionNetwork`.

    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in attention92().parameters())
    51765416
    """
    return AttentionNetwork((1, 2, 3), **options)


def attention128(**options: Any) -> AttentionNetwork:
    """128 layers deep, for ImageNet: 1, 3 and 5 attention modules; ``options`` of :class:`AttentionNetwork`.

    The paper has a network of this depth for CIFAR alone: the modules here go on as from 56 to 92.

    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in attention128().parameters())
    72140968
    """
    return AttentionNetwork((1, 3, 5), **options)


def attention164(**options: Any) -> AttentionNetwork:
    """164 layers deep, for ImageNet: 1, 4 and 7 attention modules; ``options`` of :class:`AttentionNetwork`.

    The paper has a network of this depth for CIFAR alone: the modules here go on as from 56 to 92.

    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in attention164().parameters())
    92516520
    """
    return AttentionNetwork((1, 4, 7), **options)


def attention92_cifar(**options: Any) -> AttentionNetwork:
    """Attention-92 for CIFAR (36m + 20, m = 2 attention modules a stage); ``options`` of :class:`AttentionNetwork`.

    >>> sum(p.numel() for p in attention92_cifar().parameters())
    1787482
    """
    return AttentionNetwork((2, 2, 2), small=True, **options)


def attention236_cifar(**options: Any) -> AttentionNetwork:
    """Attention-236 for CIFAR (36m + 20, m = 6 attention modules a stage); ``options`` of :class:`AttentionNetwork`.

    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in attention236_cifar().parameters())
    4923482
    """
    return AttentionNetwork((6, 6, 6), small=True, **options)


def attention452_cifar(**options: Any) -> AttentionNetwork:
    """Attention-452 for CIFAR (36m + 20, m = 12 attention modules a stage); ``options`` of :class:`AttentionNetwork`.

    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in attention452_cifar().parameters())
    9627482
    """
    return AttentionNetwork((12, 12, 12), small=True, **options)
