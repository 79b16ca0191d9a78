"""The attention module of Wang et al. 2017: its gate, its mask branch, and the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _fusion, _tracing, ops
from ..ops import _checks as checks
from ..ops.attention_gate import upsampled
from .units import BNReLUConv2d, ResidualUnit

#: Makes a unit that keeps the shape, from the number of its channels.
MakeUnit = Callable[[int], nn.Module]
#: Of a mask: nothing across its U, a unit a level, or the level itself.
Skip = bool | Literal["identity"]


class AttentionGate(nn.Module):
    """``(1 + sigmoid(mask)) * trunk``; see :func:`ran_ext.ops.attention_gate`. Other forms run in PyTorch's own ops.

    Args:
        scale_factor: up-sampling of the mask, fused in.
        interpolation: of the up-sampling, ``"nearest"`` or ``"bilinear"``.
        attention: how logits become the mask ``M``. ``"mixed"``: a sigmoid. ``"channel"``: each position's vector of
            channels divided by its L2 norm. ``"spatial"``: each channel's map less its mean, divided by its standard
            deviation, then a sigmoid.
        residual: whether the trunk is multiplied by ``1 + M``; False: by ``M``, the paper's naive attention.

    Source: Wang et al. 2017, arXiv:1704.06904, sections 3.1 (residual, naive) and 3.2 (mixed, channel, spatial).

    >>> AttentionGate(2)(torch.ones(1, 8, 5, 5), torch.zeros(1, 8, 3, 3)).mean().item()
    1.5
    >>> AttentionGate(residual=False)(torch.ones(1, 8, 5, 5), torch.zeros(1, 8, 5, 5)).mean().item()
    0.5
    """

    __prepare_scriptable__ = _tracing.no_script

    def __init__(
        self,
        scale_factor: int = 1,
        interpolation: str = "nearest",
        attention: str = "mixed",
        residual: bool = True,
    ):
        super().__init__()
        checks.choice("AttentionGate", "interpolation", interpolation, checks.INTERPOLATIONS)
        checks.choice("AttentionGate", "attention", attention, tuple(_ATTENTION))
        self.scale_factor, self.interpolation = scale_factor, interpolation
        self.attention, self.residual = attention, checks.flag("AttentionGate", "residual", residual)

    def forward(self, trunk: Tensor, mask: Tensor) -> Tensor:
        if not self.why_plain:
            return ops.attention_gate(trunk, mask, self.scale_factor, self.interpolation)
        weights = self.weights(trunk, mask)
        return (1 + weights) * trunk if self.residual else weights * trunk

    def weights(self, trunk: Tensor, mask: Tensor) -> Tensor:
        """The mask ``M`` at the trunk's resolution, from its logits."""
        return _ATTENTION[self.attention](upsampled(mask, trunk, self.scale_factor, self.interpolation))

    @property
    def why_plain(self) -> str:
        """What keeps the gate from being one op; "" where nothing does."""
        if self.attention != "mixed":
            return f"{self.attention} attention"
        return "" if self.residual else "naive attention (residual=False)"

    def extra_repr(self) -> str:
        told = [f"scale_factor={self.scale_factor}"]
        told += [] if self.interpolation == "nearest" else [f"interpolation={self.interpolation!r}"]
        told += [] if self.attention == "mixed" else [f"attention={self.attention!r}"]
        return ", ".join(told + ([] if self.residual else ["residual=False"]))


class SoftMaskBranch(nn.Module):
    """The mask's bottom-up, top-down branch; returns logits, by default at **half** the resolution of its input.

    ``depth`` times (2x2 max-pool, ``r`` units), ``depth`` times (``r`` units, x2, plus the skip unit's output
    of that level), two 1x1 convolutions. The last up-sampling is left to :class:`AttentionGate`, which reads the mask
    at low resolution: a 1x1 convolution commutes with up-sampling, nearest and bilinear, so both run on a quarter of
    the pixels. Pooling rounds up and up-sampling is cropped to the level it meets, so every size works.

    Args:
        channels, depth, r, skip, bias, unit, interpolation, full_size: as in :class:`AttentionModule`.
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        r: int = 1,
        skip: Skip = False,
        bias: bool = True,
        unit: MakeUnit | None = None,
        interpolation: str = "nearest",
        full_size: bool = False,
    ):
        super().__init__()
        checks.choice("SoftMaskBranch", "interpolation", interpolation, checks.INTERPOLATIONS)
        if skip not in (False, True, "identity"):
            raise ValueError(f"SoftMaskBranch: skip must be False, True or 'identity', got {checks.shown(skip)}")
        make = unit or _bottleneck(bias)

        def levels(count: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Sequential(*(make(channels) for _ in range(r))) for _ in range(count))

        linear: Any = BNReLUConv2d if full_size else nn.Conv2d
        self.interpolation, self.full_size = interpolation, full_size
        self.down, self.up = levels(depth), levels(depth)
        self.skip = nn.ModuleList(
            nn.Identity() if skip == "identity" else make(channels) for _ in range(depth - 1 if skip else 0)
        )
        self.conv1, self.conv2 = (linear(channels, channels, 1, bias=bias) for _ in range(2))

    def features(self, x: Tensor) -> Tensor:
        """What ``conv2`` takes."""
        pyramid: list[Tensor] = [x]
        for units in self.down:
            x = units(ops.max_pool2d(x))
            pyramid.append(x)
        for level in range(len(self.up) - 1, 0, -1):
            lower, upper = self.up[level](x), pyramid[level]
            skip = self.skip[level - 1](upper) if len(self.skip) else None
            x = ops.upsample_add(lower, skip, upper.shape[2:], self.interpolation)
        x = self.up[0](x)
        if self.full_size:
            x = ops.upsample_add(x, None, pyramid[0].shape[2:], self.interpolation)
        return _linear(self.conv1, x)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(self.conv2, self.features(x))


class AttentionModule(nn.Module):
    """Attention module of Wang et al. 2017: ``post(gate(trunk(pre(x)), mask(pre(x))))``.

    The mask's last convolution runs in the gate's op (:func:`ran_ext.ops.conv_attention_gate`) unless a hook on
    ``gate``, ``mask`` or ``mask.conv2`` looks at what passes between them, or the gate or the mask has a form of its
    own.

    Args:
        channels: of input and output.
        depth: how often the mask branch halves the resolution, >= 1.
        p, t, r: units before and after, in the trunk, and between two poolings of the mask (the paper's names).
        skip: units across the mask's U, one for each level but the lowest; ``"identity"``: the level itself, no unit.
        bias: whether the convolutions have biases.
        unit: makes one of the units from ``channels``: a module that keeps the shape. None for
            ``ResidualUnit(channels, channels, channels, bias=bias)``.
        trunk: any module that keeps the shape, in the place of the ``t`` units.
        interpolation: of every up-sampling in the mask, ``"nearest"`` or ``"bilinear"``.
        full_size: whether the mask's two 1x1 convolutions run at the trunk's resolution, each after a batch
            normalisation and a ReLU of its own, as in the authors' Caffe networks.
        attention, residual: as in :class:`AttentionGate`.

    Raises:
        ValueError: at construction, ``depth`` < 1 or an option that is none; at the call, an image too small for
            ``depth`` (the text says the smallest size), or a ``trunk`` that does not keep the shape.

    >>> AttentionModule(8, depth=2)(torch.randn(2, 8, 13, 9)).shape
    torch.Size([2, 8, 13, 9])
    >>> own = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU())
    >>> AttentionModule(8, depth=1, trunk=own, interpolation="bilinear")(torch.randn(2, 8, 13, 9)).shape
    torch.Size([2, 8, 13, 9])
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        p: int = 1,
        t: int = 2,
        r: int = 1,
        skip: Skip = False,
        bias: bool = True,
        *,
        unit: MakeUnit | None = None,
        trunk: nn.Module | None = None,
        interpolation: str = "nearest",
        full_size: bool = False,
        attention: str = "mixed",
        residual: bool = True,
    ):
        super().__init__()
        if depth < 1:
            raise ValueError(f"AttentionModule: depth must be at least 1, got {depth}")
        if trunk is not None and not isinstance(trunk, nn.Module):
            raise TypeError(f"AttentionModule: trunk must be an nn.Module, got {checks.shown(trunk)}")
        self.depth = depth
        make = unit or _bottleneck(bias)

        def units(count: int) -> nn.Module:
            return nn.Sequential(*(make(channels) for _ in range(count)))

        self.pre, self.trunk, self.post = units(p), units(t) if trunk is None else trunk, units(p)
        self.mask = SoftMaskBranch(channels, depth, r, skip, bias, unit, interpolation, full_size)
        self.gate = AttentionGate(1 if full_size else 2, interpolation, attention, residual)

    @property
    def min_size(self) -> int:
        """The smallest height and width: each of the ``depth`` poolings must find at least two pixels."""
        return 2 ** (self.depth - 1) + 1

    def forward(self, x: Tensor) -> Tensor:
        if not _tracing.is_symbolic(x) and min(x.shape[-2:]) < self.min_size:
            raise ValueError(
                f"AttentionModule: depth {self.depth} needs an input of at least {self.min_size}x{self.min_size} "
                f"pixels, got {x.shape[-2]}x{x.shape[-1]}; use a larger image or a smaller depth"
            )
        x = self.pre(x)
        trunk, conv = self.trunk(x), None if torch.compiler.is_compiling() else self.gate_conv
        if not _tracing.is_symbolic(x) and trunk.shape != x.shape:
            raise ValueError(
                f"AttentionModule: trunk must keep the shape, got {list(trunk.shape)} from {list(x.shape)}; it is a "
                f"{type(self.trunk).__name__}"
            )
        if conv is None or _fusion.why_watched(trunk):
            return self.post(self.gate(trunk, self.mask(x)))
        mask = self.mask.features(x)
        return self.post(ops.conv_attention_gate(trunk, mask, conv.weight, conv.bias, self.gate.scale_factor))

    @property
    def gate_conv(self) -> nn.Conv2d | None:
        """The convolution that runs in the gate's op; None where the gate runs by itself."""
        return None if self.why_gate_apart else self.mask.conv2

    @property
    def why_gate_apart(self) -> str:
        """What keeps ``mask.conv2`` from running in the gate's op; "" where nothing does."""
        gate, mask = self.gate, self.mask
        why = _fusion.why_called("gate", gate, _GATES) or _fusion.why_called("mask", mask, _MASKS) or gate.why_plain
        if why or gate.interpolation != "nearest":
            return why or "bilinear interpolation"
        return _fusion.why_conv("mask.conv2", conv := mask.conv2) or _why_not_1x1(conv)


def _bottleneck(bias: bool) -> MakeUnit:
    return lambda channels: ResidualUnit(channels, channels, channels, bias=bias)


def _linear(conv: Any, x: Tensor) -> Tensor:
    """A mask's 1x1 convolution, with or without its own batch normalisation and ReLU."""
    return conv(x) if isinstance(conv, BNReLUConv2d) else _fusion.conv2d(conv, x)


def _l2_normalised(mask: Tensor) -> Tensor:
    return F.normalize(mask, dim=1)


def _standardised(mask: Tensor) -> Tensor:
    """The sigmoid of each channel's map, less its mean over the positions, over its standard deviation."""
    mean = mask.mean((2, 3), keepdim=True)
    variance = (mask - mean).square().mean((2, 3), keepdim=True)
    return torch.sigmoid((mask - mean) * torch.rsqrt(variance + 1e-5))


#: Eq. 4 to 6 of Wang et al. 2017.
_ATTENTION: dict[str, Callable[[Tensor], Tensor]] = {
    "mixed": torch.sigmoid,
    "channel": _l2_normalised,
    "spatial": _standardised,
}


_GATES = {AttentionGate: AttentionGate.forward}
_MASKS = {SoftMaskBranch: SoftMaskBranch.forward}


def _why_not_1x1(conv: nn.Conv2d) -> str:
    geometry = conv.kernel_size, conv.stride, conv.padding
    return "" if geometry == ((1, 1), (1, 1), (0, 0)) else "mask.conv2 is no plain 1x1 convolution"
