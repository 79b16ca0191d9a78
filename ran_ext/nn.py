"""Modules over :mod:`ran_ext.ops`: they hold parameters and call the ops, which do the mathematics.

Submodules and state_dict keys are those of plain PyTorch (``nn.BatchNorm2d``, ``nn.Conv2d``), so checkpoints,
initialisers, optimizer groups and ``nn.SyncBatchNorm.convert_sync_batchnorm`` work as they always do. What acts through
a call of a submodule (hooks, other classes, a replaced ``forward``) acts here too: the modules are then called one
after the other, and :func:`ran_ext.explain` says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from . import _fusion, _tracing, ops
from .ops import _checks as checks
from .ops.attention_gate import upsampled

#: Makes a unit that keeps the shape, from the number of its channels.
MakeUnit = Callable[[int], nn.Module]
#: Of a mask: nothing across its U, a unit a level, or the level itself.
Skip = bool | Literal["identity"]


class AttentionGate(nn.Module):
    """``(1 + sigmoid(mask)) * trunk``; see :func:`ran_ext.ops.attention_gate`. Other forms run in PyTorch's own ops.

    Args:
        scale_factor: up-sampling of the mask, fused in where it is nearest-neighbour.
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


class BNReLU(nn.Module):
    """``relu(bn(x))`` in one op. The submodule ``bn`` is a plain ``nn.BatchNorm2d``, or what a tool puts in its place.

    A state_dict with keys of ``nn.BatchNorm2d`` itself (``weight`` for ``bn.weight``) loads too.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in ``nn.BatchNorm2d``.

    >>> BNReLU(8)(torch.randn(2, 8, 4, 4)).min().item()
    0.0
    """

    __prepare_scriptable__ = _tracing.no_script

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.bn = nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _fusion.bn_relu(self.bn, x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix) and "." not in key[len(prefix) :]]:
            state_dict[f"{prefix}bn.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class BNReLUConv2d(nn.Module):
    """Pre-activation convolution ``conv(relu(bn(x))) + residual`` in one op.

    Submodules ``bn`` (``nn.BatchNorm2d``) and ``conv`` (``nn.Conv2d``) hold the parameters. ``nn.SyncBatchNorm`` in
    the place of ``bn`` (by torch's own converter) and ``nn.utils.parametrizations`` keep the fusion. Any other module
    there, a convolution with groups, dilation or non-zero padding mode, and modules with more than
    their own forward (hooks, adapters, sharded or pruned parameters) are run as written, unfused.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias, groups: as in ``nn.Conv2d``.
        eps, momentum: as in ``nn.BatchNorm2d``.

    >>> unit = BNReLUConv2d(8, 16, 3, padding=1)
    >>> unit(torch.randn(2, 8, 7, 7)).shape
    torch.Size([2, 16, 7, 7])
    >>> list(unit.state_dict())[:2]
    ['bn.weight', 'bn.bias']
    """

    __prepare_scriptable__ = _tracing.no_script

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        groups: int = 1,
    ):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels, eps, momentum)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        statistics: ops.BatchStatistics | None = None,
        following: BNReLUConv2d | None = None,
    ) -> Tensor:
        if (statistics is not None or following is not None) and isinstance(x, Tensor):  # torch.fx passes no None
            return self._chained(x, residual, statistics, following)
        return _fusion.bn_relu_conv2d(self.bn, self.conv, x, residual)

    @property
    def is_fusable(self) -> bool:
        """Whether the op runs, and not ``bn`` and ``conv`` one after the other."""
        return not _fusion.why_unfused(self.bn, self.conv)

    def _chained(
        self,
        x: Tensor,
        residual: Tensor | None,
        statistics: ops.BatchStatistics | None,
        following: BNReLUConv2d | None,
    ) -> Any:
        """With ``following``, the module that takes the result next: what the op of the same name returns."""
        warnings.warn(
            "BNReLUConv2d: statistics and following are deprecated; use ran_ext.ops.chained_bn_relu_conv2d",
            DeprecationWarning,
            stacklevel=2,
        )
        chains = _fusion.chains(self.bn, self.conv)
        if not chains or not (following is None or _fusion.chains(following.bn, following.conv)):
            out = self(x, residual)
            return out if following is None else ops.Chained(out, None, x)
        next_bn = None if following is None else following.bn
        chained = ops.chained_bn_relu_conv2d(x, self.bn, self.conv, residual, statistics, next_bn)
        return chained.out if following is None else chained


class ResidualUnit(nn.Module):
    """Full pre-activation bottleneck (He et al. 2016): BN-ReLU-1x1, BN-ReLU-3x3 (the stride), BN-ReLU-1x1, plus input.

    Args:
        in_channels, out_channels: where they differ, or ``stride`` is not 1, the input passes a plain 1x1 convolution.
        mid_channels: width of the 1x1/3x3 pair.
        stride: of the 3x3 convolution.
        bias: whether the convolutions have biases.
        groups: of the 3x3 convolution; more than one is the ResNeXt unit (Xie et al. 2017, arXiv:1611.05431).

    >>> ResidualUnit(8, 16, 4, stride=2)(torch.randn(2, 8, 7, 7)).shape
    torch.Size([2, 16, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        stride: int = 1,
        bias: bool = True,
        groups: int = 1,
    ):
        super().__init__()
        self.conv1 = BNReLUConv2d(in_channels, mid_channels, 1, bias=bias)
        self.conv2 = BNReLUConv2d(mid_channels, mid_channels, 3, stride, 1, bias=bias, groups=groups)
        self.conv3 = BNReLUConv2d(mid_channels, out_channels, 1, bias=bias)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias)
            if in_channels != out_channels or stride != 1
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.conv1, self.conv2, self.conv3
        why = _fusion.why_called
        units = why("conv1", first, _UNITS) or why("conv2", second, _UNITS) or why("conv3", third, _UNITS)
        called, chained = bool(units or _fusion.why_watched(x)), False
        if not called:
            (bn1, conv1), (bn2, conv2) = (first.bn, first.conv), (second.bn, second.conv)
            chained = _fusion.chains(bn1, conv1) and _fusion.chains(bn2, conv2)
        if chained:
            h, statistics, x = ops.chained_bn_relu_conv2d(x, bn1, conv1, next_bn=bn2)
        else:
            h = first(x)
        identity = x if self.shortcut is None else _fusion.conv2d(self.shortcut, x)
        h = ops.chained_bn_relu_conv2d(h, bn2, conv2, statistics=statistics).out if chained else second(h)
        return third(h) + identity if called else third(h, identity)


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


def convert_sync_batchnorm(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """``nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)``, which keeps every fusion: use that.

    Deprecated.
    """
    warnings.warn(
        "ran_ext.nn.convert_sync_batchnorm is deprecated: nn.SyncBatchNorm.convert_sync_batchnorm does the same",
        DeprecationWarning,
        stacklevel=2,
    )
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    return converted


class SyncBNReLU(BNReLU):
    """A :class:`BNReLU` whose ``bn`` is an ``nn.SyncBatchNorm``, as torch's converter makes it. Deprecated.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group: as in ``nn.SyncBatchNorm``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ):
        warnings.warn(
            "ran_ext.nn.SyncBNReLU is deprecated: nn.SyncBatchNorm.convert_sync_batchnorm(BNReLU(...)) does the same",
            DeprecationWarning,
            stacklevel=2,
        )
        super().__init__(num_features)
        self.bn = nn.SyncBatchNorm(  # type: ignore[assignment]
            num_features, eps, momentum, affine, track_running_stats, process_group
        )


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
_UNITS = {BNReLUConv2d: BNReLUConv2d.forward}
_GATES = {AttentionGate: AttentionGate.forward}
_MASKS = {SoftMaskBranch: SoftMaskBranch.forward}


def _why_not_1x1(conv: nn.Conv2d) -> str:
    geometry = conv.kernel_size, conv.stride, conv.padding
    return "" if geometry == ((1, 1), (1, 1), (0, 0)) else "mask.conv2 is no plain 1x1 convolution"


__all__ = [
    "AttentionGate",
    "AttentionModule",
    "BNReLU",
    "BNReLUConv2d",
    "ResidualUnit",
    "SoftMaskBranch",
    "SyncBNReLU",
    "convert_sync_batchnorm",
]
