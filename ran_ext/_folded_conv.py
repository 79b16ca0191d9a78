"""A convolution for evaluation, its weight packed for the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _backend, _paths, _tracing
from ._kept import Kept


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
        self.weight, self.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype))
        self._packed: Kept[Tensor] = Kept()
        self._panels: dict[int, Kept[Tensor]] = {2: Kept(), 4: Kept()}  # for tiles of m x m outputs, by m

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._onednn(x, residual):
            if residual is None and (tile := self._tile(x)):
                return self._by_tiles(x, tile)
            return self._packed_forward(x, residual)
        out = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]
        out = out if residual is None else out + residual
        return F.relu(out) if self.relu else out

    def _onednn(self, x: Tensor, residual: Tensor | None) -> bool:
        tensors = (x, self.weight, self.bias) if residual is None else (x, self.weight, self.bias, residual)
        if torch.compiler.is_compiling() or _tracing.why_watched(*tensors):
            return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return False
        if not all(t.is_cpu and t.dtype == x.dtype for t in tensors):
            return False
        if x.dim() != 4 or x.shape[1] != self.weight.shape[1]:  # F.conv2d says what is wrong
            return False
        if residual is not None and residual.shape != self._out_shape(x):  # `+` broadcasts, or says what is wrong
            return False
        if not torch.backends.mkldnn.is_available() or x.numel() == 0 or x.is_contiguous():
            return False
        return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def _out_shape(self, x: Tensor) -> tuple[int, ...]:
        pads: Any = self.padding
        size = ((x.shape[2 + i] + 2 * pads[i] - self.weight.shape[2 + i]) // self.stride[i] + 1 for i in (0, 1))
        return len(x), len(self.weight), *size

    def _tile(self, x: Tensor) -> int:
        """m of the Winograd kernel F(m x m, 3x3) that the convolution takes (3x3, float32), or 0."""
        same = self.stride == (1, 1) and self.padding == (1, 1) and _backend.use_native(x, self.weight)
        return int(torch.ops.ran_ext.conv3x3_tile(x, self.weight, _paths.paths(x))) if same else 0

    def _by_tiles(self, x: Tensor, tile: int) -> Tensor:
        panels = self._panels[tile](self.weight, lambda: torch.ops.ran_ext.conv3x3_pack(self.weight.detach(), x, tile))
        return torch.ops.ran_ext.conv3x3_packed(x, panels, self.bias, self.relu)  # type: ignore[no-any-return]

    def _packed_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """oneDNN's convolution with the ReLU or the addition inside, as Inductor's frozen graphs call it."""
        geometry: tuple[Any, ...] = (self.padding, self.stride, (1, 1))
        reorder, conv = torch.ops.mkldnn._reorder_convolution_weight, torch.ops.mkldnn._convolution_pointwise
        packed = self._packed(self.weight, lambda: reorder(self.weight.detach(), *geometry, 1, list(x.shape)))
        if residual is None:
            return conv(x, packed, self.bias, *geometry, 1, "relu" if self.relu else "none", [], "")
        unary = "relu" if self.relu else None
        return conv.binary(x, residual, packed, self.bias, *geometry, 1, "add", None, unary, [], None)

    def extra_repr(self) -> str:
        out, into, *size = self.weight.shape
        return f"{into}, {out}, {tuple(size)}, stride={self.stride}, padding={self.padding}, relu={self.relu}"
