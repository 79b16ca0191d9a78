"""How a network does: loss, accuracy and confusion matrix on a data set, and what its attention masks look at."""

from __future__ import annotations

import dataclasses
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .._wrappers import eagerly, unwrapped
from ..data import CIFAR10, Batches, Normalize
from ..data.cifar10 import require_images
from ..nn import AttentionGate, AttentionModule
from .config import Config
from .step import require_classes
from .system import Ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode while entered; afterwards each of its modules is in the mode it was in.

    >>> model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout())
    >>> _ = model[0].eval()
    >>> with evaluating(model):
    ...     [module.training for module in model.modules()]
    [False, False, False]
    >>> [module.training for module in model.modules()]
    [True, False, True]
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])  # not the flags alone: some modules do more in train()
        for module, mode in modes:
            module.training = mode


def frozen(model: nn.Module) -> list[nn.Module]:
    """The modules in evaluation mode of a model in training mode; none where the whole model is in evaluation mode."""
    return [module for module in model.modules() if not module.training] if model.training else []


def train_all_but(frozen: list[nn.Module], model: nn.Module) -> None:
    """Put ``model`` into training mode, without ``frozen``."""
    model.train()
    for module in frozen:
        module.training = False


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        loss: mean cross entropy.
        accuracy: share of right predictions.
        confusion: int64 ``(classes, classes)``, images by true class (row) and predicted class (column).
        seconds: wall time.
    """

    loss: float
    accuracy: float
    confusion: Tensor
    seconds: float

    @property
    def per_class(self) -> list[float]:
        """Share of right predictions in each class; NaN for a class without images."""
        return (self.confusion.diag() / self.confusion.sum(1)).tolist()

    def to_dict(self) -> dict[str, Any]:
        """The figures, fit for JSON."""
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "per_class": [None if math.isnan(share) else share for share in self.per_class],
            "confusion": self.confusion.tolist(),
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: CIFAR10,
    normalize: Normalize,
    *,
    batch_size: int = 512,
    dtype: torch.dtype = torch.float32,
    mirror: bool = False,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Run ``model`` in evaluation mode over ``dataset``, on the device of its parameters.

    Args:
        model: run in evaluation mode; afterwards each of its modules is in the mode it was in.
        dataset: as :class:`ran_ext.data.CIFAR10`.
        normalize: as in training, so with the training set's mean: :func:`ran_ext.train.load_normalize` has it.
            Also sets the images' memory format.
        batch_size: images at a time; changes the results by rounding only.
        dtype: of autocast; float32 for none.
        mirror: average the logits of each image and of its mirror image, at twice the time.
        ranks: share the work with the other processes of a run.

    Raises:
        TypeError: ``dataset`` is not a :class:`~ran_ext.data.CIFAR10`.
        ValueError: ``dataset`` has fewer images than there are processes, or labels that the model has no output for.

    >>> from ran_ext.data import sample
    >>> from ran_ext.models import create_model
    >>> data = sample("test").subset(torch.arange(20))
    >>> result = evaluate(create_model("ran_compact", width=0.125), data, Normalize.per_pixel(data))
    >>> tuple(result.confusion.shape), result.confusion.sum().item()
    ((10, 10), 20)
    """
    require_images("evaluate", "dataset", dataset)
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    if len(dataset) < world_size:
        raise ValueError(f"evaluate: dataset must hold an image for each process, got {len(dataset)} for {world_size}")
    highest = int(dataset.labels.max())
    device = next(model.parameters()).device
    start = time.perf_counter()
    mine = dataset.subset(torch.arange(rank, len(dataset), world_size)) if world_size > 1 else dataset
    losses, pairs, classes = torch.zeros((), device=device), [], 0
    with evaluating(model):
        for images, labels in Batches(mine, batch_size, normalize, shuffle=False, device=device):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(images).float()
                if mirror:
                    logits = (logits + model(images.flip(3)).float()) / 2
            classes = require_classes("evaluate", logits, highest)
            losses += F.cross_entropy(logits, labels, reduction="sum")
            pairs.append(labels * classes + logits.argmax(1))
    confusion = torch.bincount(torch.cat(pairs), minlength=classes * classes).view(classes, classes)
    if ranks:
        losses, confusion = ranks.sum(losses), ranks.sum(confusion)
    accuracy = confusion.diag().sum().item() / len(dataset)
    return Evaluation(losses.item() / len(dataset), accuracy, confusion.cpu(), time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class EpochFigures:
    """One row of the learning curves.

    Attributes:
        epoch: from 1.
        train_loss: mean cross entropy over the epoch's steps, in training mode, on augmented images.
        train_accuracy: likewise.
        val_loss: mean cross entropy on the validation images after the epoch; None where there are none.
        val_accuracy: likewise.
        lr: learning rate of the epoch's last step.
        images_per_second: of the training steps alone.
        seconds: wall time since the run began; with validation, without interruptions.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float | None
    val_accuracy: float | None
    lr: float
    images_per_second: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What :func:`ran_ext.train.fit` hands back.

    Attributes:
        config: the recipe.
        figures: a row an epoch.
        best_epoch: of the best validation accuracy, from 1; None without validation images.
        selected_epoch: whose weights ``test`` and ``model.pt`` are about, from 1; None where no epoch was finished.
        test: figures on the test set, where one was given and the run came to its end.
        seconds: wall time of training, validation and checkpoints; without interruptions, without the test.
        stopped_early: by lack of progress.
        interrupted: by Ctrl-C or SIGTERM; ``resume=True`` continues.
        step: the kind of training step that ran last: ``eager``, ``graph`` or ``compile``.
    """

    config: Config
    figures: list[EpochFigures]
    best_epoch: int | None
    selected_epoch: int | None
    test: Evaluation | None
    seconds: float
    stopped_early: bool
    interrupted: bool
    step: str


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
        images: uint8 ``(N, 3, H, W)``.
        masks: float ``(N, H, W)``.
        scale: of the enlargement.

    >>> mask_picture(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.rand(4, 8, 8)).shape
    torch.Size([3, 48, 96])
    """
    low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
    stretched = ((masks - low) / (high - low).clamp_min(1e-6)).unsqueeze(1).expand(-1, 3, -1, -1)
    rows = torch.cat([images.cpu() / 255, stretched], dim=2)
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
