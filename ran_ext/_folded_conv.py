"""A convolution for evaluation, its weight packed for the CPU."""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _backend, _fusion, _paths, _tracing
from ._kept import Kept
from .nn import BNReLU
from .ops.conv2d import is_3x3

M = TypeVar("M", bound=nn.Module)


class Evaluation(nn.Module):
    """A module that stays in evaluation mode, whatever mode the one around it is set to."""

    __prepare_scriptable__ = _tracing.no_script

    def train(self, mode: bool = True) -> Evaluation:
        return super().train(False)


class FoldedConv2d(Evaluation):
    """A convolution with what was folded into it, then a ReLU where ``relu`` is set, or an addition."""

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor, relu: bool, dtype: torch.dtype):
        super().__init__()
        self.stride, self.padding, self.relu = conv.stride, conv.padding, relu
        self.dilation, self.groups = conv.dilation, conv.groups
        self.weight, self.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype))
        self._packed: Kept[Tensor] = Kept()
        self._panels: dict[int, Kept[Tensor]] = {2: Kept(), 4: Kept()}  # for tiles of m x m outputs, by m

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._is_plain(x, residual):
            if tile := self._tile(x):
                return self._by_tiles(x, residual, tile)
            if (dtype := _onednn_dtype(x)) is not None:
                return self._packed_forward(x, residual, dtype)
        out = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]
        out = out if residual is None else out + residual
        return F.relu(out) if self.relu else out

    def _is_plain(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether kernels that take memory as it lies, and have no derivative, may run."""
        tensors = (x, self.weight, self.bias) if residual is None else (x, self.weight, self.bias, residual)
        if torch.compiler.is_compiling() or _tracing.why_watched(*tensors):
            return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return False
        if not all(t.is_cpu and t.dtype == x.dtype for t in tensors):
            return False
        if x.dim() != 4 or x.shape[1] != self.weight.shape[1] * self.groups:  # F.conv2d says what is wrong
            return False
        if residual is not None and residual.shape != self._out_shape(x):  # `+` broadcasts, or says what is wrong
            return False
        return x.numel() > 0 and not x.is_contiguous()

    def _out_shape(self, x: Tensor) -> tuple[int, ...]:
        pads: Any = self.padding
        reach = (self.dilation[i] * (self.weight.shape[2 + i] - 1) + 1 for i in (0, 1))
        size = ((x.shape[2 + i] + 2 * pads[i] - far) // self.stride[i] + 1 for i, far in enumerate(reach))
        return len(x), len(self.weight), *size

    def _tile(self, x: Tensor) -> int:
        """m of the Winograd kernel F(m x m, 3x3) that the convolution takes, or 0."""
        same = is_3x3(self.weight.shape[2:], self.stride, self.padding, self.dilation, self.groups)
        if not same or not _backend.use_native(x, self.weight):
            return 0
        return int(torch.ops.ran_ext.conv3x3_tile(x, self.weight, _paths.paths(x)))

    def _by_tiles(self, x: Tensor, residual: Tensor | None, tile: int) -> Tensor:
        panels = self._panels[tile](self.weight, lambda: torch.ops.ran_ext.conv3x3_pack(self.weight.detach(), x, tile))
        return torch.ops.ran_ext.conv3x3_packed(x, panels, self.bias, residual, self.relu)  # type: ignore[no-any-return]

    def _packed_forward(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """oneDNN's convolution with the ReLU or the addition inside, as Inductor's frozen graphs call it.

        ``dtype``: that of its operands; the result has that of ``x``.
        """
        geometry: tuple[Any, ...] = (self.padding, self.stride, self.dilation, self.groups)
        reorder, conv = torch.ops.mkldnn._reorder_convolution_weight, torch.ops.mkldnn._convolution_pointwise
        packed = self._packed(self.weight, lambda: reorder(self.weight.detach().to(dtype), *geometry, list(x.shape)))
        given, bias = x.to(dtype), self.bias.to(dtype)
        if residual is None:
            return conv(given, packed, bias, *geometry, "relu" if self.relu else "none", [], "").to(x.dtype)  # type: ignore[no-any-return]
        inside = self.groups == 1 or dtype == torch.float32  # else torch has no kernel for both
        unary = "relu" if self.relu and inside else None
        out: Tensor = conv.binary(given, residual.to(dtype), packed, bias, *geometry, "add", None, unary, [], None)
        return (out.relu_() if self.relu and not inside else out).to(x.dtype)

    def extra_repr(self) -> str:
        out, into, *size = self.weight.shape
        more = "" if self.groups == 1 else f", groups={self.groups}"
        more += "" if self.dilation == (1, 1) else f", dilation={self.dilation}"
        taken = into * self.groups
        return f"{taken}, {out}, {tuple(size)}, stride={self.stride}, padding={self.padding}{more}, relu={self.relu}"


def _onednn_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which oneDNN convolves ``x`` fast: where it has no kernel for 16 bits, float32."""
    if not torch.backends.mkldnn.is_available() or x.dtype == torch.float64:
        return None
    kernels = torch.ops.mkldnn
    if x.dtype == torch.float16 and kernels._is_mkldnn_fp16_supported():
        return None  # torch's own call, which takes them
    return x.dtype if x.dtype == torch.bfloat16 and kernels._is_mkldnn_bf16_supported() else torch.float32


def folded(conv: nn.Conv2d, bn: Any, relu: bool, dtype: torch.dtype, before: Any = None) -> FoldedConv2d:
    """``bn(conv(before(x)))`` with running statistics, then a ReLU where ``relu``; computed in float64.

    ``bn`` and ``before`` may be None; ``before`` wants a convolution without padding and groups.
    """
    weight = conv.weight.double().contiguous(memory_format=torch.channels_last)
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.double()
    if before is not None:
        scale, shift = _scale_and_shift(before)
        bias = bias + (weight * shift.view(1, -1, 1, 1)).sum((1, 2, 3))
        weight = weight * scale.view(1, -1, 1, 1)
    if bn is not None:
        scale, shift = _scale_and_shift(bn)
        weight, bias = weight * scale.view(-1, 1, 1, 1), bias * scale + shift
    return FoldedConv2d(conv, weight, bias, relu, dtype)


def _scale_and_shift(bn: Any) -> tuple[Tensor, Tensor]:
    """What ``bn`` does to each channel, in float64."""
    scale = torch.rsqrt(bn.running_var.double() + bn.eps)
    scale = scale if bn.weight is None else scale * bn.weight.double()
    return scale, -bn.running_mean.double() * scale + (0 if bn.bias is None else bn.bias.double())


def with_relu(bn: Any, dtype: torch.dtype) -> BNReLU:
    """``bn`` and a ReLU."""
    twin = BNReLU(1)
    twin.bn = bn.to(at_least_float32(dtype))
    return twin


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_known(module: Any, kind: type[M]) -> TypeGuard[M]:
    """Whether a call of ``module`` runs the forward of ``kind`` and nothing else."""
    return isinstance(module, kind) and not _fusion.why_called("", module, {type(module): kind.forward})


def is_conv(module: Any) -> TypeGuard[nn.Conv2d]:
    """Whether ``module`` is a convolution that a :class:`FoldedConv2d` can stand for."""
    if not isinstance(module, nn.Conv2d) or _fusion.why_called("", module, _fusion.CONVS):
        return False
    return module.padding_mode == "zeros" and type(module.stride) is type(module.padding) is tuple


def is_bn(module: Any) -> bool:
    """Whether ``module`` is a batch normalisation with running statistics."""
    known = isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and not _fusion.why_unfused(module)
    return known and module.running_mean is not None and module.running_var is not None
