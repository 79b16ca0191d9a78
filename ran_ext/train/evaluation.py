"""How a network does: loss, accuracy and confusion matrix on a data set."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._wrappers import evaluating
from ..data import CIFAR10, Batches, Normalize
from ..data.cifar10 import require_images
from .config import Config
from .step import require_classes
from .system import Ranks

if TYPE_CHECKING:
    pass


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
