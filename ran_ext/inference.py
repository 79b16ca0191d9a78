"""A trained network folded for evaluation: batch normalisations inside residual units join the convolutions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _backend
from .models.cifar import ResidualAttentionNetwork
from .nn import BNReLU, ResidualUnit, SoftMaskBranch
from .ops import max_pool2d


def fold_for_inference(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of ``model`` that gives the same outputs in evaluation, with less work; ``model`` itself is left alone.

    In a residual unit the second and third batch normalisation fold into the convolution before them, whose output
    then passes the ReLU at once; the stem's folds into the first convolution; a mask's two 1x1 convolutions become one.
    On the CPU the weights are kept in the layout that oneDNN or this package's kernels want, packed at the first call.

    Args:
        model: a network of :mod:`ran_ext.models`, or any module that holds :mod:`ran_ext.nn` ones; its running
            statistics are what is folded.
        dtype: of weights and activations: float32, bfloat16, float16 or float64. A whole network takes images of any
            floating dtype and returns float32 logits (float64 for float64).

    Returns:
        A module in evaluation mode. It cannot be trained and its state_dict is its own: keep the trained model.

    Raises:
        TypeError: ``dtype`` is not a floating-point type.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2 (folding); the mask's two convolutions have no
    non-linearity between them, so their product is one.

    >>> model = ResidualUnit(8, 16, 4).eval()
    >>> x = torch.randn(2, 8, 6, 6)
    >>> bool((fold_for_inference(model)(x) - model(x)).abs().max() < 1e-5)
    True
    """
    if not dtype.is_floating_point:
        raise TypeError(f"fold_for_inference: dtype must be a floating-point type, got {dtype}")
    with torch.no_grad():
        folded = _fold(copy.deepcopy(model).eval(), dtype)
        for p in folded.parameters():
            p.requires_grad_(False)
    return folded


class FoldedConv2d(nn.Module):
    """A convolution with what was folded into it, then a ReLU where ``relu`` is set, or an addition."""

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor, relu: bool, dtype: torch.dtype):
        super().__init__()
        self.stride, self.padding, self.relu = conv.stride, conv.padding, relu
        self.weight, self.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype))
        self._packed: Tensor | None = None
        self._panels: dict[int, Tensor] = {}  # the weight for tiles of m x m outputs, by m

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._onednn(x):
            if residual is None and (tile := self._tile(x)):
                return self._by_tiles(x, tile)
            return self._packed_forward(x, residual)
        out = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]
        out = out if residual is None else out + residual
        return F.relu(out) if self.relu else out

    def _onednn(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or x.requires_grad or torch.compiler.is_compiling() or x.numel() == 0:
            return False
        if not torch.backends.mkldnn.is_available() or x.is_contiguous():
            return False
        return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def _tile(self, x: Tensor) -> int:
        """m of the Winograd kernel F(m x m, 3x3) that the convolution takes (3x3, float32), or 0."""
        same = self.stride == (1, 1) and self.padding == (1, 1) and _backend.use_native(x)
        return int(torch.ops.ran_ext.conv3x3_tile(x, self.weight)) if same else 0

    def _by_tiles(self, x: Tensor, tile: int) -> Tensor:
        if tile not in self._panels:
            self._panels[tile] = torch.ops.ran_ext.conv3x3_pack(self.weight.detach(), x)
        return torch.ops.ran_ext.conv3x3_packed(x, self._panels[tile], self.bias, self.relu)  # type: ignore[no-any-return]

    def _packed_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """oneDNN's convolution with the ReLU or the addition inside, as Inductor's frozen graphs call it."""
        geometry: tuple[Any, ...] = (self.padding, self.stride, (1, 1))
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *geometry, 1, list(x.shape))
        if residual is None:
            attr = "relu" if self.relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(x, self._packed, self.bias, *geometry, 1, attr, [], "")
        unary = "relu" if self.relu else None
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, self._packed, self.bias, *geometry, 1, "add", None, unary, [], None
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed, self._panels = None, {}
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedConv2d:
        self._packed, self._panels = None, {}  # another device or dtype
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_panels": {}}  # a packed weight can be neither copied nor saved


class FoldedResidualUnit(nn.Module):
    """A residual unit in evaluation: one normalisation, then three convolutions with their ReLU or addition inside."""

    def __init__(self, unit: ResidualUnit, dtype: torch.dtype):
        super().__init__()
        self.bn = BNReLU(unit.conv1.bn.num_features, unit.conv1.bn.eps)
        self.bn.load_state_dict(unit.conv1.bn.state_dict())
        if dtype == torch.float64:
            self.bn.double()
        self.bn.eval()
        self.conv1 = _folded(unit.conv1.conv, unit.conv2.bn, dtype)
        self.conv2 = _folded(unit.conv2.conv, unit.conv3.bn, dtype)
        self.conv3 = _folded(unit.conv3.conv, None, dtype)
        self.shortcut = None if unit.shortcut is None else _folded(unit.shortcut, None, dtype)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        return self.conv3(self.conv2(self.conv1(self.bn(x))), identity)


class FoldedNetwork(nn.Module):
    """A whole network: takes images of any floating dtype, returns logits in float32 (float64 for float64)."""

    def __init__(self, network: ResidualAttentionNetwork, dtype: torch.dtype):
        super().__init__()
        self.conv1, self.stem_pool = _folded(network.conv1, network.bn1, dtype), network.stem_pool
        self.stages = nn.Sequential(network.stage1, network.stage2, network.stage3)
        # Normalisation and the dense layer stay wide; they are small.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.bn2, self.fc = network.bn2, network.fc.to(wide)
        if self.bn2 is not None:
            self.bn2.to(wide)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        x = self.conv1(x.to(self.conv1.weight.dtype).contiguous(memory_format=torch.channels_last))
        x = self.stages(max_pool2d(x, ceil_mode=False) if self.stem_pool else x)
        x = x if self.bn2 is None else self.bn2(x)
        return self.fc(x.mean((2, 3), dtype=self.fc.weight.dtype))


def _folded(conv: nn.Conv2d, bn: nn.BatchNorm2d | None, dtype: torch.dtype) -> FoldedConv2d:
    """``conv``, then ``bn`` with its running statistics and a ReLU where ``bn`` is given; worked out in float64."""
    weight = conv.weight.double().contiguous(memory_format=torch.channels_last)
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.double()
    if bn is not None:
        if bn.running_mean is None or bn.running_var is None:
            raise ValueError("fold_for_inference: a batch normalisation has no running statistics to fold")
        scale = torch.rsqrt(bn.running_var.double() + bn.eps)
        scale = scale if bn.weight is None else scale * bn.weight.double()
        shift = -bn.running_mean.double() * scale + (0 if bn.bias is None else bn.bias.double())
        weight, bias = weight * scale.view(-1, 1, 1, 1), bias * scale + shift
    return FoldedConv2d(conv, weight, bias, bn is not None, dtype)


def _merged(mask: SoftMaskBranch, dtype: torch.dtype) -> FoldedConv2d:
    """The mask's two 1x1 convolutions as one: W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)."""
    first, second = (conv.weight.double().flatten(1) for conv in (mask.conv1, mask.conv2))
    bias = first.new_zeros(len(second)) if mask.conv2.bias is None else mask.conv2.bias.double()
    if mask.conv1.bias is not None:
        bias = bias + second @ mask.conv1.bias.double()
    return FoldedConv2d(mask.conv1, (second @ first)[..., None, None], bias, False, dtype)


def _fold(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, ResidualUnit):
        return FoldedResidualUnit(module, dtype)
    for name, child in module.named_children():
        setattr(module, name, _fold(child, dtype))
    if isinstance(module, SoftMaskBranch):
        module.conv1, module.conv2 = _merged(module, dtype), nn.Identity()  # type: ignore[assignment]
    if isinstance(module, ResidualAttentionNetwork):
        return FoldedNetwork(module, dtype)
    return module


__all__ = ["FoldedConv2d", "FoldedNetwork", "FoldedResidualUnit", "fold_for_inference"]
