"""A trained network folded for evaluation: batch normalisations join the convolutions around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from ._convert import revert
from ._folded_conv import FoldedConv2d
from ._folded_graph import FoldedGraph, differ_by, trace_parts
from ._folding import FoldedNetwork, FoldedResidualUnit, Folding
from ._wrappers import copied, unwrapped

#: Between the outputs of a network and of its folded copy, over the largest output.
LARGEST_DIFFERENCE = 0.01


def fold_for_inference(model: nn.Module, dtype: torch.dtype | None = None, images: Tensor | None = None) -> nn.Module:
    """A copy of ``model`` that gives the same outputs in evaluation, with less work; ``model`` itself is left alone.

    A batch normalisation joins the convolution before it, or, where it is exact, behind it; a ReLU and the addition of
    a residual are done with the convolution. 3x3 convolutions run by this package's kernels on the CPU. In a network
    of :mod:`ran_ext.models` a mask's two 1x1 convolutions become one.

    The forward pass of other networks is traced (``torch.fx``), for which ``images`` are needed: what was traced must
    give the outputs of ``model`` on them, else it is left as written. Where the whole cannot be traced, as with a
    forward pass that asks for sizes or values, its parts are. Without images only plain ``nn.Sequential`` are traced.

    What is pruned or parametrised (weight_norm, spectral_norm) is worked out once; :func:`ran_ext.convert` is undone.
    A layer stays as written where a forward is not the library's own, a hook looks on, a convolution is padded with
    other than zeros, or there are no running statistics. On the CPU the weights are kept in the layout that oneDNN or
    this package's kernels want, packed at the first call and again after they change; changes through ``weight.data``
    are not seen.

    Args:
        model: any network in which batch normalisations have running statistics, which are what is folded. Taken out
            of ``torch.compile`` and (Distributed)DataParallel.
        dtype: of weights and activations: float32, bfloat16, float16 or float64; by default that of ``model``'s first
            convolution. Batch normalisations that stay are at least float32. A network of this package takes images of
            any floating dtype and returns float32 logits (float64 for float64); what was traced takes them, and returns
            ``dtype``.
        images: a batch that ``model`` takes, in its own dtype. Where the model takes images of channels_last, what was
            traced puts them into it.

    Returns:
        A module in evaluation mode. It cannot be trained and its state_dict is its own: keep the trained model.

    Raises:
        TypeError: ``model`` is not a module, ``dtype`` not a floating-point type, or ``images`` not a tensor.
        ValueError: there is nothing to fold in ``model``.
        RuntimeError: the folded copy, in float32 or float64, gives other outputs for ``images``.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2 (folding); the mask's two convolutions have no
    non-linearity between them, so their product is one.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> x = torch.randn(2, 3, 6, 6)
    >>> bool((fold_for_inference(model, images=x)(x) - model(x)).abs().max() < 1e-5)
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold_for_inference: model must be an nn.Module, got {type(model).__name__}")
    dtype = _dtype_of(model) if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"fold_for_inference: dtype must be a floating-point type, got {dtype}")
    if images is not None and not isinstance(images, Tensor):
        raise TypeError(f"fold_for_inference: images must be a tensor or None, got {type(images).__name__}")
    with torch.inference_mode(False), torch.no_grad():
        twin = _worked_out(unwrapped(model))
        expected = None if images is None else twin(images)
        fold = Folding(dtype)
        folded = fold(trace_parts(twin, images, expected))
        if not fold.count:
            raise ValueError(
                f"fold_for_inference: there is nothing to fold in model, a {type(model).__name__}: it needs "
                "convolutions without hooks and forwards of their own, and, but for a network of ran_ext.models, a "
                "forward pass that torch.fx can trace"
                + ("; give images, a batch that the model takes" if images is None else "")
            )
        if images is not None and dtype in (torch.float32, torch.float64):
            _check(folded(images.to(dtype) if images.is_floating_point() else images), expected)
        return folded.requires_grad_(False)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """That of the first convolution; float32 where there is none."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Conv2d) and isinstance(weight, Tensor) and weight.is_floating_point():
            return weight.dtype
    return torch.float32


def _check(found: Any, expected: Any) -> None:
    """Raises where folding changed the outputs, but for those that may change in number, such as boxes."""
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=False))
    if any(isinstance(one, Tensor) and one.shape != other.shape for one, other in pairs):
        return
    for one, other in pairs:
        if isinstance(one, Tensor) and one.is_floating_point() and one.numel():
            off = differ_by(one, other)
            if not off <= LARGEST_DIFFERENCE:
                raise RuntimeError(
                    f"fold_for_inference: the folded network's outputs for images are off by {off:.2g} of the largest; "
                    f"more than {LARGEST_DIFFERENCE} is no rounding, so it is not returned"
                )


def _worked_out(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, in which every computed weight is a plain parameter."""
    twin = revert(copied(model)).eval()
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


__all__ = ["FoldedConv2d", "FoldedGraph", "FoldedNetwork", "FoldedResidualUnit", "fold_for_inference"]
