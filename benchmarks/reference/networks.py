"""The three CIFAR-10 networks of the report's Table 1, as a careful reader would write them.

Eager PyTorch, NCHW, ``nn.BatchNorm2d``, a separate ReLU, ``torch.sigmoid``, the mask convolutions at full resolution.
Submodule names follow ``ran_ext.models``, so a state_dict loads in both directions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BNReLUConv2d(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x)))


class ResidualUnit(nn.Module):
    """Full pre-activation bottleneck (He et al. 2016); the 3x3 carries the stride."""

    def __init__(self, in_channels: int, out_channels: int, mid_channels: int, stride: int = 1, bias: bool = True):
        super().__init__()
        self.conv1 = BNReLUConv2d(in_channels, mid_channels, 1, bias=bias)
        self.conv2 = BNReLUConv2d(mid_channels, mid_channels, 3, stride, 1, bias=bias)
        self.conv3 = BNReLUConv2d(mid_channels, out_channels, 1, bias=bias)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias)
            if in_channels != out_channels or stride != 1
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        return self.conv3(self.conv2(self.conv1(x))) + identity


class SoftMaskBranch(nn.Module):
    """Bottom-up, top-down: ``depth`` x (max-pool, unit), ``depth`` x (unit, up-sampling), two 1x1 convolutions."""

    def __init__(self, channels: int, depth: int, skip: bool, bias: bool):
        super().__init__()

        def units(count: int) -> nn.ModuleList:
            return nn.ModuleList(
                nn.Sequential(ResidualUnit(channels, channels, channels, bias=bias)) for _ in range(count)
            )

        self.down, self.up = units(depth), units(depth)
        self.skip = nn.ModuleList(
            ResidualUnit(channels, channels, channels, bias=bias) for _ in range(depth - 1 if skip else 0)
        )
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=bias)
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for unit in self.down:
            x = unit(F.max_pool2d(x, 2))
            levels.append(x)
        for level, unit in reversed(list(enumerate(self.up))):
            x = F.interpolate(unit(x), scale_factor=2, mode="nearest")
            if level > 0 and len(self.skip):
                x = x + self.skip[level - 1](levels[level - 1])
        return self.conv2(self.conv1(x))


class AttentionModule(nn.Module):
    """``(1 + sigmoid(mask)) * trunk`` between two residual units; p = 1, t = 2, r = 1."""

    def __init__(self, channels: int, depth: int, skip: bool = False, bias: bool = True):
        super().__init__()

        def units(count: int) -> nn.Sequential:
            return nn.Sequential(*(ResidualUnit(channels, channels, channels, bias=bias) for _ in range(count)))

        self.pre, self.trunk, self.post = units(1), units(2), units(1)
        self.mask = SoftMaskBranch(channels, depth, skip, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        return self.post((1 + torch.sigmoid(self.mask(x))) * self.trunk(x))


def wide(channels: int, width: float) -> int:
    """``channels`` of a network ``width`` times as wide: a multiple of 8.

    >>> [wide(32, width) for width in (1, 0.4, 0.125)]
    [32, 16, 8]
    """
    return max(8, round(channels * width / 8) * 8)


class ResidualAttentionNetwork(nn.Module):
    """Table 1. ``regularised``: BN + ReLU in stem and head; ``skip``: mask skip connections."""

    def __init__(
        self,
        modules: tuple[int, int],
        regularised: bool,
        skip: bool,
        num_classes: int,
        dropout: float,
        bias: bool,
        width: float,
    ):
        super().__init__()
        c0, c1, c2, c3, mid = (wide(channels, width) for channels in (32, 128, 256, 1024, 64))
        self.conv1 = nn.Conv2d(3, c0, 5, padding=2, bias=bias)
        self.bn1 = nn.BatchNorm2d(c0) if regularised else None
        self.stage1 = nn.Sequential(
            ResidualUnit(c0, c1, c0, bias=bias), *(AttentionModule(c1, 2, skip, bias) for _ in range(modules[0]))
        )
        self.stage2 = nn.Sequential(
            ResidualUnit(c1, c2, mid, 2, bias=bias), *(AttentionModule(c2, 1, skip, bias) for _ in range(modules[1]))
        )
        self.stage3 = nn.Sequential(
            ResidualUnit(c2, c3, mid, 2, bias=bias), *(ResidualUnit(c3, c3, mid, bias=bias) for _ in range(2))
        )
        self.bn2 = nn.BatchNorm2d(c3) if regularised else None
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, 32, 32)``."""
        x = self.conv1(x)
        if self.bn1 is not None:
            x = F.relu(self.bn1(x))
        x = self.stage3(self.stage2(self.stage1(F.max_pool2d(x, 2))))
        if self.bn2 is not None:
            x = F.relu(self.bn2(x))
        return self.fc(self.dropout(x.mean((2, 3))))


def ran_compact(
    num_classes: int = 10, dropout: float = 0.5, bias: bool = True, width: float = 1.0
) -> ResidualAttentionNetwork:
    """The report's own network.

    >>> sum(p.numel() for p in ran_compact().parameters())
    6810570
    """
    return ResidualAttentionNetwork((1, 1), True, False, num_classes, dropout, bias, width)


def ran_base(
    num_classes: int = 10, dropout: float = 0.0, bias: bool = True, width: float = 1.0
) -> ResidualAttentionNetwork:
    """The report's network before regularisation."""
    return ResidualAttentionNetwork((1, 1), False, False, num_classes, dropout, bias, width)


def ran_paper(
    num_classes: int = 10, dropout: float = 0.0, bias: bool = True, width: float = 1.0
) -> ResidualAttentionNetwork:
    """Wang et al.'s network as the report shrinks it: a further attention module, mask skip connections.

    >>> sum(p.numel() for p in ran_paper().parameters())
    11460618
    """
    return ResidualAttentionNetwork((1, 2), False, True, num_classes, dropout, bias, width)
