"""``ran_ext.attach_attention(model, where)``: attention modules behind layers of anybody's network."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._wrappers import eagerly, evaluating, unwrapped
from .nn import AttentionModule, ResidualUnit

Network = TypeVar("Network", bound=nn.Module)
#: The child of a layer that holds what was attached to it.
NAME = "attached_attention"


def attach_attention(
    model: Network,
    where: Sequence[str],
    images: Tensor | None = None,
    *,
    channels: Sequence[int] | None = None,
    depth: int | Sequence[int] = 1,
    **options: Any,
) -> Network:
    """Put an attention module behind each of the layers named in ``where``, in place; the weights stay.

    The layer's output ``x`` becomes ``x + gain * (module(x) - x)``, with a gain for each channel that is learned from
    0: until it is trained the network puts out what it did, bit for bit, whatever the module makes of ``x``. See
    :class:`AttachedAttention`.

    The module is a child of the layer, ``attached_attention``. So all keys of the ``state_dict`` stay what they were,
    and a checkpoint from before loads with ``strict=False``; one from after loads after the same call. In an
    ``nn.Sequential`` the child is one member more, the last; elsewhere a forward hook on the layer calls it. A layer
    that ran in one op with its neighbours (a converted network, this package's modules) runs by itself then, and may
    round otherwise.

    Args:
        model: any network. Make the optimizer afterwards, or give it the new parameters.
        where: names of layers as in ``model.named_modules()``, that put out ``(N, C, H, W)`` once in a forward pass.
        images: what ``model`` is called with, to find each layer's channels and size; it runs once in evaluation mode,
            and no statistics change.
        channels: of each layer's output, where no ``images`` are given.
        depth: how often the mask halves the resolution, one for all or one for each layer.
        options: of :class:`ran_ext.nn.AttentionModule`. By default ``unit`` makes bottlenecks a quarter as wide as the
            layer, and there are no biases.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is no module, or an option is none.
        ValueError: a name is not in the network, given twice or attached to already; a layer is not called once, puts
            out something other than ``(N, C, H, W)``, or too little for ``depth``; neither or both of ``images`` and
            ``channels`` are given. Nothing has been changed then.

    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    >>> images = torch.randn(2, 3, 12, 12)
    >>> before = model(images)
    >>> torch.equal(attach_attention(model, ["1"], images, depth=2)(images), before)
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach_attention: model must be an nn.Module, got {type(model).__name__}")
    inner = unwrapped(model)
    layers = _layers(inner, where)
    if (images is None) == (channels is None):
        raise ValueError("attach_attention: give images, from which channels are found, or channels; one of the two")
    depths = _each("depth", depth, where)
    if images is not None:
        shapes = _shapes(inner, layers, images)
        widths = [shape[1] for shape in shapes.values()]
        for (name, (*_, height, width)), one in zip(shapes.items(), depths, strict=True):
            if min(height, width) < (least := 2 ** (one - 1) + 1):
                most = max(min(height, width) - 1, 0).bit_length()
                advice = f"a depth of at most {most} fits" if most else "no depth fits"
                raise ValueError(
                    f"attach_attention: depth {one} needs {least}x{least} pixels or more, and {name} puts out "
                    f"{height}x{width}; {advice}"
                )
    else:
        widths = _each("channels", channels, where)
    modules = [_module(width, one, options) for width, one in zip(widths, depths, strict=True)]
    for layer, module, width in zip(layers.values(), modules, widths, strict=True):
        like = next((p for p in (*layer.parameters(), *inner.parameters()) if p.is_floating_point()), torch.empty(0))
        attached = AttachedAttention(module, width).to(device=like.device, dtype=like.dtype)
        layer.add_module(NAME, attached.train(layer.training))
        if not _runs_members(layer):
            layer.register_forward_hook(_attended)
    return model


class AttachedAttention(nn.Module):
    """``x + gain * (module(x) - x)`` with a learned gain for each channel, 0 at first.

    Where the gain is 0 the output is ``x`` itself to the last bit, also where ``module(x)`` is NaN or infinite and
    where ``x`` is -0.0; the gain has its gradient all the same, in which values that are not finite count as 0.

    Args:
        module: keeps the shape ``(N, C, H, W)``.
        channels: C.

    >>> attached = AttachedAttention(nn.Conv2d(4, 4, 1), 4)
    >>> x = torch.randn(2, 4, 5, 5)
    >>> torch.equal(attached(x), x)
    True
    """

    def __init__(self, module: nn.Module, channels: int):
        super().__init__()
        self.module = module
        self.gain = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain.to(x.dtype).view(1, -1, 1, 1)  # under autocast x may be narrower
        off = gain == 0
        change = self.module(x).to(x.dtype) - x
        step = gain * torch.where(off & ~change.isfinite(), torch.zeros_like(change), change)
        # Where off, -0.0 with the gradient of step: x + -0.0 is x to the bit, of either sign.
        return x + torch.where(off, -(step.detach() - step), step)


def _attended(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
    """The forward hook of a layer."""
    return layer.get_submodule(NAME)(out)  # type: ignore[no-any-return]


def _layers(model: nn.Module, where: Sequence[str]) -> dict[str, nn.Module]:
    """The layers by name, each of which may be attached to."""
    if isinstance(where, str) or not where:
        raise ValueError(f"attach_attention: where must be a list of names, and not empty, got {where!r}")
    known, found = dict(model.named_modules()), dict[str, nn.Module]()
    for name in where:
        if not name or name not in known:
            near = difflib.get_close_matches(str(name), list(known)[1:], 3, 0)
            raise ValueError(f"attach_attention: the network has no layer {name!r}; near it are {', '.join(near)}")
        layer = known[name]
        if name in found or hasattr(layer, NAME):
            raise ValueError(f"attach_attention: {name} would be attached to twice")
        if isinstance(layer, (nn.ModuleList, nn.ModuleDict)):
            raise ValueError(
                f"attach_attention: {name} is a {type(layer).__name__}, whose members the network calls one by one: "
                "name one of them"
            )
        if isinstance(layer, nn.Sequential) and not _runs_members(layer):
            raise ValueError(
                f"attach_attention: {name} is a {type(layer).__name__}, an nn.Sequential with a forward of its own, "
                "which may run its members as it likes: name one of them"
            )
        found[name] = layer
    return found


def _runs_members(layer: nn.Module) -> bool:
    """Whether ``layer`` runs its members one after the other, and so what is added as the last."""
    return type(layer).forward is nn.Sequential.forward and "forward" not in vars(layer)


def _each(name: str, value: Any, where: Sequence[str]) -> list[int]:
    """``value``, one number or one for each layer, as a list of numbers >= 1."""
    values = [value] * len(where) if isinstance(value, int) else list(value)
    if len(values) != len(where) or not all(type(one) is int and one >= 1 for one in values):
        raise ValueError(
            f"attach_attention: {name} must be whole numbers >= 1, one for each of {len(where)} layers, got {value!r}"
        )
    return values


def _shapes(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor) -> dict[str, torch.Size]:
    """The shape of each layer's output."""
    seen: dict[str, list[Any]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_hook(lambda _layer, _args, out, name=name: seen[name].append(out))  # type: ignore[misc]
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad(), eagerly(), evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    for name, outs in seen.items():
        if len(outs) != 1:
            raise ValueError(
                f"attach_attention: {name} is called {len(outs)} times in a forward pass; name a layer that is called "
                "once"
            )
        if not isinstance(outs[0], Tensor) or outs[0].dim() != 4:
            got = list(outs[0].shape) if isinstance(outs[0], Tensor) else type(outs[0]).__name__
            raise ValueError(f"attach_attention: {name} must put out (N, C, H, W), got {got}")
    return {name: outs[0].shape for name, outs in seen.items()}


def _module(channels: int, depth: int, options: dict[str, Any]) -> AttentionModule:
    def quarter(channels: int) -> ResidualUnit:
        return ResidualUnit(channels, channels, max(1, channels // 4), bias=False)

    defaults: dict[str, Any] = {"bias": False, "unit": quarter}
    return AttentionModule(channels, depth, **defaults | options)
