"""``ran_ext.convert(model)``: any network trains with the fused kernels, in place."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from ._converted import Converted, Convolving, Deferring, convert_class, is_served, revert_class
from ._joins import enter, leave

Network = TypeVar("Network", bound=nn.Module)


def convert(model: Network, channels_last: bool = True) -> Network:
    """Make ``model`` use the fused kernels, in place.

    Each ``nn.BatchNorm2d`` leaves its value unwritten until something needs it. ReLU, ReLU6, SiLU, GELU, Hardswish,
    LeakyReLU, Hardtanh and dropout leave it so too, and a convolution takes it in: behind ReLU in one fused op, else
    computing it again in backward. So the raw input alone is kept. Pooling keeps where the maxima stand. A
    concatenation keeps its pieces, which 1x1 convolutions read. On the CPU, 3x3 convolutions take
    :func:`ran_ext.ops.conv2d`. What cannot be fused runs as it was: see :func:`ran_ext.explain`.

    Modules, parameters, buffers, their order, hooks and state_dict stay what and where they are; ``isinstance`` holds,
    the exact type of converted modules is another of the same name. Under ``torch.compile`` (called later) BN, ReLU
    and convolution are fused in Inductor's graphs on the CPU, and 3x3 convolutions keep their kernels. Networks of this
    package fuse by themselves: their modules are left as they are.

    Args:
        model: any network. Weights and optimizers may be made before or after.
        channels_last: also put the weights into that memory format, which the kernels want. Inputs of either format
            are taken; activations become channels_last, of which ``x.view(n, -1)`` is an error in PyTorch
            (``x.flatten(1)`` is none): give False where a network does that.

    Returns:
        ``model`` itself; unchanged, with a warning, where nothing in it can be converted.

    Raises:
        TypeError: ``model`` is no module, or scripted or compiled: convert the network first.

    >>> model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    >>> x = torch.randn(2, 8, 4, 4)
    >>> expected = model.eval()(x)
    >>> bool((convert(model)(x) - expected).abs().max() < 1e-5)
    True
    """
    _check(model)
    own = set(_taken_by_this_package(model))
    norms, convs = [], []
    for module in model.modules():
        if isinstance(module, Converted) or module in own or isinstance(module, torch.jit.ScriptModule):
            continue
        # A parametrisation gave the module a class of its own, which it takes away again.
        if isinstance(module, nn.BatchNorm2d) and "parametrizations" not in module._modules:
            norms.append(module)
        elif type(module) is nn.Conv2d and is_served(module):
            convs.append(module)
    converted = any(isinstance(module, Converted) for module in model.modules())
    if not (norms or convs or own or converted):
        warnings.warn(
            f"ran_ext.convert: model, a {type(model).__name__}, has no nn.BatchNorm2d and no 3x3 nn.Conv2d with 16 "
            "channels or more that this package could serve; it is left as it is",
            UserWarning,
            stacklevel=2,
        )
        return model
    for module in norms:
        convert_class(module, Deferring)
    for module in convs:
        convert_class(module, Convolving)
    if norms and leave not in model._forward_hooks.values():
        model.register_forward_pre_hook(enter)
        model.register_forward_hook(leave, always_call=True)
    return model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload]


def revert(model: Network) -> Network:
    """Undo :func:`convert`, but for the weights' memory format; the network itself is returned.

    Raises:
        TypeError: as :func:`convert`.

    >>> type(revert(convert(nn.Sequential(nn.BatchNorm2d(8))))[0]) is nn.BatchNorm2d
    True
    """
    _check(model, "revert")
    for module in model.modules():
        if isinstance(module, Converted):
            revert_class(module)
        module.__dict__.pop("_joins", None)
        for hooks, mine in ((module._forward_pre_hooks, enter), (module._forward_hooks, leave)):
            for key in [key for key, hook in hooks.items() if hook is mine]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
    return model


@contextmanager
def fused(model: Network, channels_last: bool = True) -> Iterator[Network]:
    """:func:`convert` for the time of a ``with`` block.

    >>> model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    >>> with fused(model):
    ...     model(torch.randn(2, 8, 4, 4)).sum().backward()
    >>> type(model[0]) is nn.BatchNorm2d
    True
    """
    convert(model, channels_last)
    try:
        yield model
    finally:
        revert(model)


def _check(model: Any, name: str = "convert") -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"ran_ext.{name}: model must be an nn.Module that is not scripted, got {type(model).__name__}; convert "
            "the network first, then script it"
        )
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # nothing is compiled where it was never imported
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        raise TypeError(f"ran_ext.{name}: model is compiled; convert the network first, then compile it")


def _taken_by_this_package(model: nn.Module) -> Iterator[nn.Module]:
    """What is a direct part of a module of this package: it reads their parameters without calling them."""
    for module in model.modules():
        kinds = () if isinstance(module, Converted) else type(module).__mro__
        if any(kind.__module__.startswith("ran_ext.") for kind in kinds):
            yield from module.children()
