"""Pre-activation convolutions and units (He et al. 2016)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _fusion, _tracing, ops


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


_UNITS = {BNReLUConv2d: BNReLUConv2d.forward}
