"""What becomes of the batch normalisations and convolutions of a converted network, for :func:`ran_ext.explain`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _backend
from ._converted import Converted, Convolving
from ._deferred import FUSED, RECOMPUTED, Deferred

PASSES = ("forward", "dgrad", "wgrad")
LIBRARY = "library"
#: By pass of an op, what it runs on and why.
Paths = dict[str, tuple[str, str]]


def is_converted(model: nn.Module) -> bool:
    """Whether anything in ``model`` is."""
    return any(isinstance(module, Converted) for module in model.modules())


def kernel_paths(conv: Any, x: Tensor) -> list[tuple[bool, str]]:
    """Whether each pass of a convolution (with or without BN-ReLU) takes a kernel, and why."""
    weight, kernels = conv.weight.to(x.dtype), _backend._C
    assert kernels is not None
    found: list[tuple[bool, str]] = kernels.explain_conv(x, weight, conv.stride, conv.padding, _backend.conv3x3_mode())
    return found


def fused_paths(conv: Any, x: Tensor, remark: str = "") -> Paths:
    """Of a convolution with BN-ReLU before it."""
    paths: Paths = {}
    for one, (fused, why) in zip(PASSES, kernel_paths(conv, x), strict=True):
        # Winograd's kernels differ in accuracy; of the others there is one.
        why = why if not fused or why.startswith("Winograd") else ""
        paths[one] = FUSED if fused else LIBRARY, "; ".join(part for part in (why, remark) if part)
    return paths


def plain_paths(conv: Any, x: Tensor) -> Paths:
    """Of a convolution that takes a tensor as it is: the library's but for 3x3 kernels."""
    paths: Paths = dict.fromkeys(PASSES, (LIBRARY, ""))
    if Convolving not in type(conv).__mro__ or not x.is_cpu or not _backend.use_native(x):
        return paths
    if conv.weight.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    for one, (_, why) in zip(PASSES, kernel_paths(conv, x), strict=True):
        if why.startswith("Winograd"):
            paths[one] = "fast", why
    return paths


def taken_paths(conv: Any, x: Deferred, outcome: str) -> tuple[str, Paths]:
    """The op and the paths of a convolution that took ``x`` in, as :func:`ran_ext._deferred.tell` says."""
    recipe = x.resolve().recipe
    if outcome.startswith(RECOMPUTED):
        why = f"{outcome.removeprefix(RECOMPUTED + ': ')}: its input is computed again in backward, and not kept"
        return "conv2d", dict.fromkeys(PASSES, ("recomputed", why))
    raw = recipe.pieces[0] if len(recipe.pieces) == 1 else torch.cat(recipe.pieces, 1)
    of = f"of {len(recipe.pieces)} pieces, joined for the call" if len(recipe.pieces) > 1 else ""
    return "bn_relu_conv2d", fused_paths(conv, raw, of)


def norm_paths(outcome: str) -> Paths:
    """The path of a normalisation whose value no convolution took in."""
    what, _, why = outcome.partition(": ")
    return {"forward": (what, why)}


def is_taken(outcome: str) -> bool:
    """Whether a convolution took the value in."""
    return outcome.startswith((FUSED, RECOMPUTED))
