"""Modules over :mod:`ran_ext.ops`: they hold parameters and make calls, the mathematics lives in the ops.

Submodules and state_dict keys are those of plain PyTorch (``nn.BatchNorm2d``, ``nn.Conv2d``), so checkpoints,
initialisers, optimizer groups and ``nn.SyncBatchNorm.convert_sync_batchnorm`` work as they always do.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from . import _tracing, ops
from .ops.sync import sync_bn_relu, sync_bn_relu_conv2d


class AttentionGate(nn.Module):
    """``(1 + sigmoid(mask)) * trunk``; see :func:`ran_ext.ops.attention_gate`.

    Args:
        scale_factor: nearest-neighbour up-sampling of the mask, fused in.

    >>> AttentionGate(2)(torch.ones(1, 8, 5, 5), torch.zeros(1, 8, 3, 3)).mean().item()
    1.5
    """

    def __init__(self, scale_factor: int = 1):
        super().__init__()
        self.scale_factor = scale_factor

    def forward(self, trunk: Tensor, mask: Tensor) -> Tensor:
        return ops.attention_gate(trunk, mask, self.scale_factor)

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}"


class BNReLU(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` and a ReLU in one op; parameters, buffers and keys are ``nn.BatchNorm2d``'s.

    >>> BNReLU(8)(torch.randn(2, 8, 4, 4)).min().item()
    0.0
    """

    def forward(self, x: Tensor) -> Tensor:
        return _bn_relu(self, x)


class SyncBNReLU(nn.SyncBatchNorm):
    """:class:`BNReLU` with the statistics of all processes; made by :func:`convert_sync_batchnorm`."""

    def forward(self, x: Tensor) -> Tensor:
        return _bn_relu(self, x)


class BNReLUConv2d(nn.Module):
    """Pre-activation convolution ``conv(relu(bn(x))) + residual`` in one op.

    Submodules ``bn`` (``nn.BatchNorm2d``) and ``conv`` (``nn.Conv2d``) hold the parameters. ``nn.SyncBatchNorm`` in
    the place of ``bn`` (by torch's own converter) keeps the fusion. Any other module there, or a convolution with
    groups, dilation or non-zero padding mode, is run as written, unfused. Forward hooks on ``bn`` and ``conv`` are not
    called by the fused path.

    With ``following``, the module that takes the result next, a call returns the result, in training the statistics
    that ``following`` takes with it, and ``x``: see :func:`ran_ext.ops.chained_bn_relu_conv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias: as in ``nn.Conv2d``.
        eps, momentum: as in ``nn.BatchNorm2d``.

    >>> unit = BNReLUConv2d(8, 16, 3, padding=1)
    >>> unit(torch.randn(2, 8, 7, 7)).shape
    torch.Size([2, 16, 7, 7])
    >>> list(unit.state_dict())[:2]
    ['bn.weight', 'bn.bias']
    """

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
    ):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels, eps, momentum)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        statistics: ops.BatchStatistics | None = None,
        following: BNReLUConv2d | None = None,
    ) -> Any:
        chains = self._chains and (following is None or following._chains) and not _tracing.is_symbolic(x)
        if not chains or (statistics is None and following is None):
            out = self._plain(x, residual)
            return out if following is None else ops.Chained(out, None, x)
        next_bn = None if following is None else following.bn
        chained = ops.chained_bn_relu_conv2d(x, self.bn, self.conv, residual, statistics, next_bn)
        return chained.out if following is None else chained

    @property
    def is_fusable(self) -> bool:
        """Whether ``bn`` and ``conv`` are of the kinds that the op takes."""
        return isinstance(self.bn, (nn.BatchNorm2d, nn.SyncBatchNorm)) and _is_plain(self.conv)

    @property
    def _chains(self) -> bool:
        """Whether this call is fused and normalises with the statistics of this process's batch."""
        return type(self.bn) is nn.BatchNorm2d and self.bn.training and _is_plain(self.conv)

    def _plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        bn, conv = self.bn, self.conv
        if not self.is_fusable or _tracing.is_symbolic(x):
            out = conv(F.relu(bn(x)))
            return out if residual is None else out + residual
        if isinstance(bn, nn.SyncBatchNorm) and _synchronises(bn):
            return sync_bn_relu_conv2d(x, bn, conv, residual)
        return ops.bn_relu_conv2d(
            x,
            bn.weight,
            bn.bias,
            bn.running_mean,
            bn.running_var,
            conv.weight,
            conv.bias,
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            training=bn.training,
            momentum=bn.momentum,
            eps=bn.eps,
            residual=residual,
            num_batches_tracked=bn.num_batches_tracked,
        )


class ResidualUnit(nn.Module):
    """Full pre-activation bottleneck (He et al. 2016): BN-ReLU-1x1, BN-ReLU-3x3 (the stride), BN-ReLU-1x1, plus input.

    Args:
        in_channels, out_channels: where they differ, or ``stride`` is not 1, the input passes a plain 1x1 convolution.
        mid_channels: width of the 1x1/3x3 pair.
        stride: of the 3x3 convolution.
        bias: whether the convolutions have biases.

    >>> ResidualUnit(8, 16, 4, stride=2)(torch.randn(2, 8, 7, 7)).shape
    torch.Size([2, 16, 4, 4])
    """

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
        h, statistics, x = self.conv1(x, following=self.conv2)
        identity = x if self.shortcut is None else self.shortcut(x)
        h = self.conv2(h, statistics=statistics)
        out: Tensor = self.conv3(h, residual=identity)
        return out


class SoftMaskBranch(nn.Module):
    """The mask's bottom-up, top-down branch; returns logits at **half** the resolution of its input.

    ``depth`` times (2x2 max-pool, ``r`` units), ``depth`` times (``r`` units, nearest x2, plus the skip unit's output
    of that level), two 1x1 convolutions. The last up-sampling is left to :class:`AttentionGate`, which reads the mask
    at low resolution: a 1x1 convolution commutes with nearest up-sampling, so both run on a quarter of the pixels.
    Pooling rounds up and up-sampling is cropped to the level it meets, so every size works.
    """

    def __init__(self, channels: int, depth: int, r: int = 1, skip: bool = False, bias: bool = True):
        super().__init__()

        def levels(count: int) -> nn.ModuleList:
            return nn.ModuleList(_units(channels, r, bias) for _ in range(count))

        self.down, self.up = levels(depth), levels(depth)
        self.skip = nn.ModuleList(
            ResidualUnit(channels, channels, channels, bias=bias) for _ in range(depth - 1 if skip else 0)
        )
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=bias)
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=bias)

    def features(self, x: Tensor) -> Tensor:
        """What ``conv2`` takes."""
        pyramid: list[Tensor] = []
        for units in self.down:
            x = units(ops.max_pool2d(x))
            pyramid.append(x)
        for level in range(len(self.up) - 1, 0, -1):
            lower, upper = self.up[level](x), pyramid[level - 1]
            skip = self.skip[level - 1](upper) if len(self.skip) else None
            x = ops.upsample_add(lower, skip, upper.shape[2:])
        return self.conv1(self.up[0](x))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.features(x))


class AttentionModule(nn.Module):
    """Attention module of Wang et al. 2017: ``post(gate(trunk(pre(x)), mask(pre(x))))``.

    The mask's last convolution runs in the gate's op (:func:`ran_ext.ops.conv_attention_gate`) unless a hook on
    ``gate``, ``mask`` or ``mask.conv2`` looks at what passes between them.

    Args:
        channels: of input and output.
        depth: how often the mask branch halves the resolution, >= 1.
        p, t, r: units before and after, in the trunk, and between two poolings of the mask (the paper's names).
        skip: units across the mask's U, one for each level but the lowest.
        bias: whether the convolutions have biases.

    Raises:
        ValueError: at construction, ``depth`` < 1; at the call, an image too small for ``depth`` (the text says the
            smallest size).

    >>> AttentionModule(8, depth=2)(torch.randn(2, 8, 13, 9)).shape
    torch.Size([2, 8, 13, 9])
    """

    def __init__(
        self, channels: int, depth: int, p: int = 1, t: int = 2, r: int = 1, skip: bool = False, bias: bool = True
    ):
        super().__init__()
        if depth < 1:
            raise ValueError(f"AttentionModule: depth must be at least 1, got {depth}")
        self.depth = depth
        self.pre, self.trunk, self.post = (_units(channels, count, bias) for count in (p, t, p))
        self.mask = SoftMaskBranch(channels, depth, r, skip, bias)
        self.gate = AttentionGate(scale_factor=2)

    @property
    def min_size(self) -> int:
        """The smallest height and width: each of the ``depth`` poolings must find at least two pixels."""
        return 2 ** (self.depth - 1) + 1

    def forward(self, x: Tensor) -> Tensor:
        symbolic = _tracing.is_symbolic(x)
        if not symbolic and min(x.shape[-2:]) < self.min_size:
            raise ValueError(
                f"AttentionModule: depth {self.depth} needs an input of at least {self.min_size}x{self.min_size} "
                f"pixels, got {x.shape[-2]}x{x.shape[-1]}; use a larger image or a smaller depth"
            )
        x = self.pre(x)
        trunk, conv = self.trunk(x), None if symbolic or torch.compiler.is_compiling() else self.gate_conv
        if conv is None:
            return self.post(self.gate(trunk, self.mask(x)))
        mask = self.mask.features(x)
        return self.post(ops.conv_attention_gate(trunk, mask, conv.weight, conv.bias, self.gate.scale_factor))

    @property
    def gate_conv(self) -> nn.Conv2d | None:
        """The convolution that runs in the gate's op; None where the gate runs by itself."""
        if type(self.gate) is not AttentionGate or type(self.mask) is not SoftMaskBranch:
            return None
        conv = self.mask.conv2
        geometry = (getattr(conv, name, None) for name in ("kernel_size", "stride", "padding"))
        if type(conv) is not nn.Conv2d or tuple(geometry) != ((1, 1), (1, 1), (0, 0)) or not _is_plain(conv):
            return None
        return None if any(map(_is_hooked, (self.gate, self.mask, conv))) or _has_any_global_hook() else conv


def convert_sync_batchnorm(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """``module`` with every batch normalisation synchronised over the processes, fusions kept.

    ``nn.SyncBatchNorm.convert_sync_batchnorm`` does the same for all but :class:`BNReLU`, whose ReLU it would drop.
    Keys of the state_dict stay as they are.

    Args:
        module: converted in place; what is returned replaces it where ``module`` itself is a batch normalisation.
        process_group: None for all processes.

    >>> type(convert_sync_batchnorm(BNReLU(8))).__name__
    'SyncBNReLU'
    """
    if isinstance(module, BNReLU):
        converted = SyncBNReLU(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, process_group
        )
        converted.weight, converted.bias = module.weight, module.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(converted, name, getattr(module, name))
        return converted.train(module.training)
    if isinstance(module, nn.BatchNorm2d):
        return cast(nn.Module, nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group))
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, process_group))
    return module


def _units(channels: int, count: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(*(ResidualUnit(channels, channels, channels, bias=bias) for _ in range(count)))


def _is_plain(conv: nn.Module) -> bool:
    return (
        isinstance(conv, nn.Conv2d)
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def _is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)  # replaced on the object itself, as some libraries do


def _synchronises(bn: nn.SyncBatchNorm) -> bool:
    return bn.training and dist.is_available() and dist.is_initialized()


def _bn_relu(bn: nn.BatchNorm2d | nn.SyncBatchNorm, x: Tensor) -> Tensor:
    if isinstance(bn, nn.SyncBatchNorm) and _synchronises(bn):
        return sync_bn_relu(x, bn)
    return ops.bn_relu(
        x,
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        training=bn.training,
        momentum=bn.momentum,
        eps=bn.eps,
        num_batches_tracked=bn.num_batches_tracked,
    )


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
