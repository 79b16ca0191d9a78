"""A trained network folded for evaluation: batch normalisations behind a convolution join it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ._folded_conv import FoldedConv2d
from ._folding import FoldedChain, FoldedNetwork, FoldedResidualUnit, Folding
from ._wrappers import copied, unwrapped


def fold_for_inference(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of ``model`` that gives the same outputs in evaluation, with less work; ``model`` itself is left alone.

    In a residual unit the second and third batch normalisation fold into the convolution before them, whose output
    then passes the ReLU at once; the stem's folds into the first convolution; a mask's two 1x1 convolutions become one.
    They also fold in an ``nn.Sequential``, where a ``BNReLU`` or ``BNReLUConv2d`` follows an ``nn.Conv2d`` or
    ``BNReLUConv2d``; its members cannot be called one by one then. What is pruned or parametrised (weight_norm,
    spectral_norm) is worked out once. A layer stays as written where a forward is not the library's own, a hook looks
    on, a convolution is grouped, dilated or padded with other than zeros, or there are no running statistics.
    On the CPU the weights are kept in the layout that oneDNN or this package's kernels want, packed at the first call
    and again after they change; changes through ``weight.data`` are not seen.

    Args:
        model: a network of :mod:`ran_ext.models`, or any module that holds :mod:`ran_ext.nn` ones; its running
            statistics are what is folded. Taken out of ``torch.compile`` and (Distributed)DataParallel.
        dtype: of weights and activations: float32, bfloat16, float16 or float64; batch normalisations that stay are
            at least float32. A whole network takes images of any floating dtype and returns float32 logits (float64
            for float64).

    Returns:
        A module in evaluation mode. It cannot be trained and its state_dict is its own: keep the trained model.

    Raises:
        TypeError: ``model`` is not a module, or ``dtype`` not a floating-point type.
        ValueError: there is nothing to fold in ``model``.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2 (folding); the mask's two convolutions have no
    non-linearity between them, so their product is one.

    >>> from ran_ext.nn import ResidualUnit
    >>> model = ResidualUnit(8, 16, 4).eval()
    >>> x = torch.randn(2, 8, 6, 6)
    >>> bool((fold_for_inference(model)(x) - model(x)).abs().max() < 1e-5)
    True
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"fold_for_inference: dtype must be a floating-point type, got {dtype}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold_for_inference: model must be an nn.Module, got {type(model).__name__}")
    with torch.inference_mode(False), torch.no_grad():
        fold = Folding(dtype)
        folded = fold(_worked_out(unwrapped(model)))
        if not fold.count:
            raise ValueError(
                f"fold_for_inference: there is nothing to fold in model, a {type(model).__name__}: it needs a network "
                "of ran_ext.models, a ResidualUnit, a SoftMaskBranch, or an nn.Sequential in which a BNReLU or "
                "BNReLUConv2d follows an nn.Conv2d or BNReLUConv2d; without hooks and forwards of their own, and with "
                "running statistics"
            )
        return folded.requires_grad_(False)


def _worked_out(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, in which every computed weight is a plain parameter."""
    twin = copied(model).eval()
    for module in twin.modules():
        if parametrize.is_parametrized(module):
            values = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
            del module.parametrizations
            kind: Any = type(module)
            module.__class__ = kind.__base__  # remove_parametrizations changes the class, which copies share
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
        for key, hook in list(module._forward_pre_hooks.items()):
            if type(hook).__module__.startswith("torch.nn.utils."):  # prune, weight_norm, spectral_norm
                hook(module, ())  # type: ignore[operator]
                hook.remove(module)  # type: ignore[attr-defined]
                del module._forward_pre_hooks[key]
    return twin


__all__ = ["FoldedChain", "FoldedConv2d", "FoldedNetwork", "FoldedResidualUnit", "fold_for_inference"]
