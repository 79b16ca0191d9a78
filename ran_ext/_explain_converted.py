"""What becomes of the batch normalisations and convolutions of a converted network, for :func:`ran_ext.explain`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _backend
from ._converted import Converted, Convolving
from ._deferred import FUSED, RECOMPUTED, Deferred
from ._paths import paths

PASSES = ("forward", "dgrad", "wgrad")
LIBRARY = "library"
#: By pass of an op, what it runs on and why.
Paths = dict[str, tuple[str, str]]


def is_converted(model: nn.Module) -> bool:
    """Whether anything in ``model`` is."""
    return any(isinstance(module, Converted) for module in model.modules())


def kernel_paths(conv: Any, x: Tensor, with_norm: bool) -> list[tuple[bool, str, str]]:
    """Whether each pass of a convolution (with or without BN-ReLU) takes a kernel, why, and who chose."""
    weight, kernels = conv.weight.to(x.dtype), _backend._C
    assert kernels is not None
    return kernels.explain_conv(x, weight, conv.stride, conv.padding, paths(x), with_norm)  # type: ignore[no-any-return]


def fused_paths(conv: Any, x: Tensor, remark: str = "") -> Paths:
    """Of a convolution with BN-ReLU before it."""
    found: Paths = {}
    for one, (fused, why, source) in zip(PASSES, kernel_paths(conv, x, True), strict=True):
        # Winograd's kernels differ in accuracy; of the others there is one.
        why = why if not fused or why.startswith("Winograd") else ""
        found[one] = FUSED if fused else LIBRARY, joined(why, source, remark)
    return found


def plain_paths(conv: Any, x: Tensor) -> Paths:
    """Of a convolution that takes a tensor as it is: the library's but for 3x3 kernels."""
    found: Paths = dict.fromkeys(PASSES, (LIBRARY, ""))
    if Convolving not in type(conv).__mro__ or not x.is_cpu or not _backend.use_native(x):
        return found
    if conv.weight.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    for one, (fused, why, source) in zip(PASSES, kernel_paths(conv, x, False), strict=True):
        if fused or source:
            found[one] = "fast" if fused else LIBRARY, joined(why, source)
    return found


def joined(*parts: str) -> str:
    """What there is to say."""
    return "; ".join(part for part in parts if part)


def taken_paths(conv: Any, x: Deferred, outcome: str) -> tuple[str, Paths]:
    """The op and the paths of a convolution that took ``x`` in, as :func:`ran_ext._deferred.tell` says."""
    recipe = x.resolve().recipe
    if outcome.startswith(RECOMPUTED):
        why = f"{outcome.removeprefix(RECOMPUTED + ': ')}: its input is computed again in backward, and not kept"
        return "conv2d", dict.fromkeys(PASSES, ("recomputed", why))
    raw = recipe.pieces[0] if len(recipe.pieces) == 1 else torch.cat(recipe.pieces, 1)
    of = f"of {len(recipe.pieces)} pieces" if len(recipe.pieces) > 1 else ""
    return "bn_relu_conv2d", fused_paths(conv, raw, of)


def norm_paths(outcome: str) -> Paths:
    """The path of a normalisation whose value no convolution took in."""
    what, _, why = outcome.partition(": ")
    return {"forward": (what, why)}


def is_taken(outcome: str) -> bool:
    """Whether a convolution took the value in."""
    return outcome.startswith((FUSED, RECOMPUTED))
