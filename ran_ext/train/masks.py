"""What the attention modules look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import AttentionGate


@torch.no_grad()
def attention_masks(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The gates' masks, averaged over their channels, at the images' size.

    Args:
        model: with :class:`ran_ext.nn.AttentionGate` modules; run in evaluation mode, left in the mode it came in.
        images: normalised, float ``(N, C, H, W)``, on the model's device.

    Returns:
        By the gate's name, in the order of the calls, float32 ``(N, H, W)`` in (0, 1), up-sampled to nearest.

    >>> from ran_ext.models import create_model
    >>> masks = attention_masks(create_model("ran_compact", width=0.125), torch.randn(2, 3, 32, 32))
    >>> {name: tuple(mask.shape) for name, mask in masks.items()}
    {'stage1.1.gate': (2, 32, 32), 'stage2.1.gate': (2, 32, 32)}
    """
    masks: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            mean = inputs[1].float().sigmoid().mean(1, keepdim=True)
            masks[name] = F.interpolate(mean, size=images.shape[-2:], mode="nearest").squeeze(1)

        return hook

    gates = [(name, module) for name, module in model.named_modules() if isinstance(module, AttentionGate)]
    hooks = [gate.register_forward_pre_hook(keep(name)) for name, gate in gates]
    was_training = model.training
    try:
        model.eval()(images)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return masks
