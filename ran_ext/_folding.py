"""What folds into what: residual units, masks, whole networks, and what was traced of others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from . import _fusion
from ._folded_conv import (
    Evaluation,
    FoldedConv2d,
    at_least_float32,
    folded,
    is_bn,
    is_conv,
    is_known,
    with_relu,
)
from ._folded_graph import FoldedGraph
from ._wrappers import unwrapped
from .models.classifier import StagedNetwork, require_images
from .nn import BNReLUConv2d, ResidualUnit, SoftMaskBranch


class FoldedResidualUnit(Evaluation):
    """A residual unit in evaluation: one normalisation, then three convolutions with their ReLU or addition inside."""

    def __init__(self, unit: ResidualUnit, dtype: torch.dtype):
        super().__init__()
        self.bn = with_relu(unit.conv1.bn, dtype)
        self.conv1 = folded(unit.conv1.conv, unit.conv2.bn, True, dtype)
        self.conv2 = folded(unit.conv2.conv, unit.conv3.bn, True, dtype)
        self.conv3 = folded(unit.conv3.conv, None, False, dtype)
        shortcut: Any = unit.shortcut
        self.shortcut = folded(shortcut, None, False, dtype) if is_conv(shortcut) else shortcut and shortcut.to(dtype)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        return self.conv3(self.conv2(self.conv1(self.bn(x))), identity)


class FoldedNetwork(Evaluation):
    """A whole network: takes images of any floating dtype, returns logits in float32 (float64 for float64)."""

    with_relu = ("bn1", "bn2")

    def __init__(self, network: StagedNetwork, stages: list[nn.Module], dtype: torch.dtype):
        super().__init__()
        self.dtype, wide = dtype, at_least_float32(dtype)
        self.in_channels, self.min_size, self.kind = network.in_channels, network.min_size, type(network).__name__
        bn = network.bn1 if is_conv(network.conv1) and is_bn(network.bn1) else None
        self.conv1 = (
            folded(network.conv1, bn, bn is not None, dtype) if is_conv(network.conv1) else network.conv1.to(dtype)
        )
        self.bn1, self.pool = network.bn1 if bn is None else None, network.pool
        self.stages = nn.Sequential(*stages)
        # Normalisation and the dense layer stay wide; they are small.
        self.bn2, self.dropout, self.fc = network.bn2, network.dropout, network.fc.to(wide)
        for bn in (self.bn1, self.bn2):
            if bn is not None:
                bn.to(wide)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        require_images(x, self.in_channels, self.min_size, self.kind)
        x = self.conv1(x.to(self.dtype).contiguous(memory_format=torch.channels_last))
        x = x if self.bn1 is None else _fusion.bn_relu(self.bn1, x)
        x = self.stages(self.pool(x))
        x = x if self.bn2 is None else _fusion.bn_relu(self.bn2, x)
        return self.fc(self.dropout(x.mean((2, 3), dtype=at_least_float32(self.dtype))))

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedNetwork:
        wanted = fn(next(self.parameters()).new_empty(0, dtype=self.dtype)).dtype  # before anything is changed
        if wanted != self.dtype:
            raise TypeError(
                f"a folded network stays {self.dtype}, to which its weights were rounded: fold the trained model with "
                f"fold_for_inference(model, dtype={wanted})"
            )
        return super()._apply(fn, recurse)


class Folding:
    """Folds modules in place, each once wherever it is used; ``count`` says how many found something to fold."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.count = dtype, 0
        self.done: dict[nn.Module, nn.Module] = {}

    def __call__(self, module: nn.Module) -> nn.Module:
        module = unwrapped(module)
        if module not in self.done:
            self.done[module] = self._fold(module)
        return self.done[module]

    def _fold(self, module: nn.Module) -> nn.Module:
        if is_known(module, ResidualUnit) and unit_folds(module):
            self.count += 1
            return FoldedResidualUnit(module, self.dtype)
        if is_known(module, StagedNetwork):
            self.count += 1
            stages = [self(stage) for stage in module.stages]
            return FoldedNetwork(module, stages, self.dtype)
        if isinstance(module, FoldedGraph):
            self.count += module.fold(self.dtype)
        if is_known(module, SoftMaskBranch) and is_conv1x1(module.conv1) and is_conv1x1(module.conv2):
            self.count += 1
            module.conv1, module.conv2 = merged(module, self.dtype), nn.Identity()  # type: ignore[assignment]
        for name, child in list(module._modules.items()):
            if child is not None and not isinstance(child, FoldedConv2d):
                setattr(module, name, self(child))
        self._convert(module)
        return module

    def _convert(self, module: nn.Module) -> None:
        """What stays as written takes the dtype too."""
        dtype = at_least_float32(self.dtype) if isinstance(module, _NormBase) else self.dtype
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def unit_folds(unit: ResidualUnit) -> bool:
    """Whether a residual unit's three layers are what the class makes them."""
    layers = (unit.conv1, unit.conv2, unit.conv3)
    if not all(is_known(layer, BNReLUConv2d) and is_conv(layer.conv) for layer in layers):
        return False
    return is_bn(unit.conv2.bn) and is_bn(unit.conv3.bn)


def is_conv1x1(module: Any) -> bool:
    if not is_conv(module) or module.groups != 1:
        return False
    return (module.kernel_size, module.stride, module.padding) == ((1, 1), (1, 1), (0, 0))


def merged(mask: SoftMaskBranch, dtype: torch.dtype) -> FoldedConv2d:
    """The mask's two 1x1 convolutions as one: W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)."""
    first, second = (conv.weight.double().flatten(1) for conv in (mask.conv1, mask.conv2))
    bias = first.new_zeros(len(second)) if mask.conv2.bias is None else mask.conv2.bias.double()
    if mask.conv1.bias is not None:
        bias = bias + second @ mask.conv1.bias.double()
    return FoldedConv2d(mask.conv1, (second @ first)[..., None, None], bias, False, dtype)
