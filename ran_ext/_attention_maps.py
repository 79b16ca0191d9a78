"""What a network's attention masks look at: the maps of every gate, and pictures of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ._wrappers import eagerly, evaluating, unwrapped
from .nn import AttentionGate, AttentionModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class AttentionMaps(NamedTuple):
    """One module's maps, float32 ``(N, H, W)`` each, averaged over the channels.

    Attributes:
        trunk: magnitude of what the trunk branch sees.
        mask: the soft mask, in (0, 1).
        product: magnitude of ``(1 + mask) * trunk``, the gate's output.
    """

    trunk: Tensor
    mask: Tensor
    product: Tensor


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor) -> dict[str, AttentionMaps]:
    """Trunk, mask and their product in every gate, averaged over the channels, at the images' size.

    Args:
        model: with :class:`ran_ext.nn.AttentionGate` modules. It runs in evaluation mode, eagerly and on one
            device, also inside ``torch.compile`` or (Distributed)DataParallel; afterwards each module is in the mode
            it was in.
        images: normalised, float ``(N, C, H, W)``, on the model's device.

    Returns:
        By the gate's name, in the order of the calls, up-sampled to nearest.

    Raises:
        ValueError: ``model`` has no gates, or calls none of them.

    >>> from ran_ext.models import create_model
    >>> maps = attention_maps(create_model("ran_compact", width=0.125), torch.randn(2, 3, 32, 32))
    >>> {name: tuple(map.product.shape) for name, map in maps.items()}
    {'stage1.1.gate': (2, 32, 32), 'stage2.1.gate': (2, 32, 32)}
    """
    maps: dict[str, AttentionMaps] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            trunk, mask = inputs
            parts = (trunk.float().abs(), module.weights(trunk, mask.float()), output.float().abs())
            means = (part.mean(1, keepdim=True) for part in parts)
            maps[name] = AttentionMaps(
                *(F.interpolate(mean, size=images.shape[-2:], mode="nearest").squeeze(1) for mean in means)
            )

        return hook

    model = unwrapped(model)
    gates = _gates(model)
    if not gates:
        raise ValueError(f"attention_maps: model, a {type(model).__name__}, has no ran_ext.nn.AttentionGate to look at")
    hooks = [gate.register_forward_hook(keep(name)) for name, gate in gates.items()]
    try:
        with eagerly(), evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not maps:
        raise ValueError(f"attention_maps: model, a {type(model).__name__}, calls none of its AttentionGate modules")
    return maps


def attention_masks(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The masks of :func:`attention_maps` alone: by the gate's name, float32 ``(N, H, W)`` in (0, 1)."""
    return {name: maps.mask for name, maps in attention_maps(model, images).items()}


def has_attention(model: nn.Module) -> bool:
    """Whether :func:`attention_maps` finds gates in ``model``."""
    return bool(_gates(unwrapped(model)))


def _gates(model: nn.Module) -> dict[str, AttentionGate]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AttentionGate)}


def depths(model: nn.Module) -> dict[str, int]:
    """How often the mask branch before each gate halves the resolution, by the gate's name.

    >>> from ran_ext.models import create_model
    >>> depths(create_model("ran_compact", width=0.125))
    {'stage1.1.gate': 2, 'stage2.1.gate': 1}
    """
    return {f"{name}.gate": module.depth for name, module in unwrapped(model).named_modules()
            if isinstance(module, AttentionModule)}  # fmt: skip


def draw_attention(
    images: Tensor, maps: Mapping[str, AttentionMaps], depth: Mapping[str, int], titles: Sequence[str]
) -> Figure:
    """Each image in a row, beside its trunk, mask and product in every attention module.

    A map is drawn from its least value, dark, to its greatest, bright; both stand below it.

    Args:
        images: uint8 ``(N, 3, H, W)``, as they were before normalisation.
        maps: of :func:`attention_maps`, on any device.
        depth: of :func:`depths`.
        titles: a line for each image, drawn beside it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # fails where matplotlib is missing, so not at import

    columns = 1 + 3 * len(maps)
    figure = Figure(figsize=(1.25 * columns + 0.8, 1.4 * len(images) + 0.5), layout="constrained")
    axes = figure.subplots(len(images), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for row, image, title in zip(axes, images.cpu(), titles, strict=True):
        row[0].imshow(image.permute(1, 2, 0).numpy())
        row[0].set_ylabel(title, fontsize=8)
    for module, (name, parts) in enumerate(maps.items()):
        for part, (kind, values) in enumerate(parts._asdict().items()):
            column = 1 + 3 * module + part
            known = f", depth {depth[name]}" if name in depth else ""
            where = f"{name.removesuffix('.gate')}{known}\n" if part == 1 else ""
            axes[0][column].set_title(where + kind, fontsize=8)
            for axis, value in zip(axes[:, column], values.cpu().numpy(), strict=True):
                axis.imshow(value, cmap="magma")
                axis.set_xlabel(f"{value.min():.2f} to {value.max():.2f}", fontsize=6, labelpad=1)
    axes[0][0].set_title("image", fontsize=8)
    return figure


def mask_picture(images: Tensor, masks: Tensor, scale: int = 3) -> Tensor:
    """Images above their masks, each mask stretched to black ... white, enlarged: float ``(3, 2 H s, N W s)`` in 0..1.

    Args:
        images: uint8 ``(N, 3, H, W)``, or grey ones ``(N, 1, H, W)``.
        masks: float ``(N, H, W)``.
        scale: of the enlargement.

    >>> mask_picture(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.rand(4, 8, 8)).shape
    torch.Size([3, 48, 96])
    """
    low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
    stretched = ((masks - low) / (high - low).clamp_min(1e-6)).unsqueeze(1).expand(-1, 3, -1, -1)
    rows = torch.cat([images.cpu().expand(-1, 3, -1, -1) / 255, stretched], dim=2)
    rows = F.interpolate(rows, scale_factor=float(scale), mode="nearest")
    return rows.permute(1, 2, 0, 3).flatten(2)


#: As many as a palette holds: photographs beside the curves need them.
COLOURS = 256


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The file's contents.

    >>> from matplotlib.figure import Figure
    >>> png(Figure(figsize=(1, 1)))[1:4]
    b'PNG'
    """
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(small, format="png", optimize=True)
    return small.getvalue()
