"""The modules and networks once more in plain PyTorch: what each tool's result is compared with.

``nn.BatchNorm2d``, ``nn.Conv2d`` and PyTorch's functions, with a module wherever ``ran_ext`` has one, so that a tool
finds the same children in both. Nothing here imports ``ran_ext``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AttentionGate(nn.Module):
    def __init__(self, scale_factor: int = 1):
        super().__init__()
        self.scale_factor = scale_factor

    def forward(self, trunk: Tensor, mask: Tensor) -> Tensor:
        wide = F.interpolate(mask, size=trunk.shape[2:], mode="nearest")
        return (1 + torch.sigmoid(wide)) * trunk


class BNReLU(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x))


class BNReLUConv2d(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x)))


class ResidualUnit(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, mid_channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = BNReLUConv2d(in_channels, mid_channels, 1)
        self.conv2 = BNReLUConv2d(mid_channels, mid_channels, 3, stride, 1)
        self.conv3 = BNReLUConv2d(mid_channels, out_channels, 1)
        changes = in_channels != out_channels or stride != 1
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        identity = x if self.shortcut is None else self.shortcut(x)
        return self.conv3(self.conv2(h)) + identity


def units(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualUnit(channels, channels, channels) for _ in range(count)))


class SoftMaskBranch(nn.Module):
    def __init__(self, channels: int, depth: int, skip: bool = False):
        super().__init__()
        self.down = nn.ModuleList(units(channels, 1) for _ in range(depth))
        self.up = nn.ModuleList(units(channels, 1) for _ in range(depth))
        self.skip = nn.ModuleList(ResidualUnit(channels, channels, channels) for _ in range(depth - 1 if skip else 0))
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pyramid = []
        for level in self.down:
            x = level(F.max_pool2d(x, 2, ceil_mode=True))
            pyramid.append(x)
        for level in range(len(self.up) - 1, 0, -1):
            upper = pyramid[level - 1]
            x = F.interpolate(self.up[level](x), size=upper.shape[2:], mode="nearest")
            if len(self.skip):
                x = x + self.skip[level - 1](upper)
        return self.conv2(self.conv1(self.up[0](x)))


class AttentionModule(nn.Module):
    def __init__(self, channels: int, depth: int, skip: bool = False):
        super().__init__()
        self.pre, self.trunk, self.post = units(channels, 1), units(channels, 2), units(channels, 1)
        self.mask = SoftMaskBranch(channels, depth, skip)
        self.gate = AttentionGate(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        return self.post(self.gate(self.trunk(x), self.mask(x)))


class ResidualAttentionNetwork(nn.Module):
    def __init__(self, modules: tuple[int, int], regularised: bool, skip: bool, dropout: float, width: float):
        super().__init__()
        c0, c1, c2, c3, mid = (max(8, round(c * width / 8) * 8) for c in (32, 128, 256, 1024, 64))
        self.conv1 = nn.Conv2d(3, c0, 5, padding=2)
        self.bn1 = nn.BatchNorm2d(c0) if regularised else None
        self.stage1 = nn.Sequential(
            ResidualUnit(c0, c1, c0), *(AttentionModule(c1, 2, skip) for _ in range(modules[0]))
        )
        self.stage2 = nn.Sequential(
            ResidualUnit(c1, c2, mid, 2), *(AttentionModule(c2, 1, skip) for _ in range(modules[1]))
        )
        self.stage3 = nn.Sequential(ResidualUnit(c2, c3, mid, 2), *(ResidualUnit(c3, c3, mid) for _ in range(2)))
        self.bn2 = nn.BatchNorm2d(c3) if regularised else None
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x if self.bn1 is None else F.relu(self.bn1(x))
        x = self.stage3(self.stage2(self.stage1(F.max_pool2d(x, 2))))
        x = x if self.bn2 is None else F.relu(self.bn2(x))
        return self.fc(self.dropout(x.mean((2, 3))))


def ran_compact(width: float) -> nn.Module:
    return ResidualAttentionNetwork((1, 1), True, False, 0.5, width)


def ran_base(width: float) -> nn.Module:
    return ResidualAttentionNetwork((1, 1), False, False, 0.0, width)


def ran_paper(width: float) -> nn.Module:
    return ResidualAttentionNetwork((1, 2), False, True, 0.0, width)
