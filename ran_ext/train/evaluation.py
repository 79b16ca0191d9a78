"""How a network does: loss, accuracy and confusion matrix on a data set."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._wrappers import evaluating
from ..data import Normalize
from ..data.loading import evaluation_batches
from ..data.sources import Source, count_images, require_source
from .config import Config
from .step import require_classes
from .system import Ranks


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
        top5: share of images whose class is among the five likeliest; 1 where there are no more than five.
        probabilities: float32 ``(N, classes)``, on the CPU, in the data set's order, where they were asked for.
        labels: int64 ``(N,)``, likewise.
    """

    loss: float
    accuracy: float
    confusion: Tensor
    seconds: float
    top5: float = math.nan
    probabilities: Tensor | None = None
    labels: Tensor | None = None

    @property
    def per_class(self) -> list[float]:
        """Share of right predictions in each class; NaN for a class without images."""
        return (self.confusion.diag() / self.confusion.sum(1)).tolist()

    def to_dict(self) -> dict[str, Any]:
        """The figures, fit for JSON."""
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "top5": self.top5,
            "per_class": [None if math.isnan(share) else share for share in self.per_class],
            "confusion": self.confusion.tolist(),
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Source,
    normalize: Normalize | None,
    *,
    batch_size: int = 512,
    dtype: torch.dtype = torch.float32,
    mirror: bool = False,
    ranks: Ranks | None = None,
    workers: int = 0,
    keep: bool = False,
) -> Evaluation:
    """Run ``model`` in evaluation mode over ``dataset``, on the device of its parameters.

    Args:
        model: run in evaluation mode; afterwards each of its modules is in the mode it was in.
        dataset: :class:`ran_ext.data.Images`, such as CIFAR-10, any ``Dataset`` of ``(image, label)``, or a
            ``DataLoader`` of such batches.
        normalize: as in training, so with the training set's mean: :func:`ran_ext.train.load_normalize` has it.
            Also sets the images' memory format. Floating images are taken as they are, with None or without.
        batch_size: images at a time; changes the results by rounding only. A loader has its own.
        dtype: of autocast; float32 for none.
        mirror: average the logits of each image and of its mirror image, at twice the time.
        ranks: share the work with the other processes of a run. A loader must give each its own share; one that
            repeats images to make the shares equal (``DistributedSampler``) has them counted twice, a data set not.
        workers: processes that read a data set that is not in memory.
        keep: keep the probabilities of each image; in one process alone.

    Raises:
        TypeError: ``dataset`` is none of these.
        ValueError: ``dataset`` has fewer images than there are processes, or labels that the model has no output for.

    >>> from ran_ext.data import sample
    >>> from ran_ext.models import create_model
    >>> data = sample("test").subset(torch.arange(20))
    >>> result = evaluate(create_model("ran_compact", width=0.125), data, Normalize.per_pixel(data))
    >>> tuple(result.confusion.shape), result.confusion.sum().item()
    ((10, 10), 20)
    """
    dataset = require_source("evaluate", "dataset", dataset)
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    if world_size > 1 and keep:
        raise ValueError(f"evaluate: keep must be False where there are several processes, got {world_size}")
    if (count := count_images(dataset, world_size)) < world_size:
        raise ValueError(f"evaluate: dataset must hold an image for each process, got {count} for {world_size}")
    device = next(model.parameters()).device
    start = time.perf_counter()
    sums, pairs, classes = torch.zeros(2, device=device), [], 0  # of losses; of images found among five
    kept: list[tuple[Tensor, Tensor]] = []
    batches = evaluation_batches("evaluate", dataset, batch_size, normalize, device, rank, world_size, workers)
    with evaluating(model):
        for images, labels, highest in batches:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(images).float()
                if mirror:
                    logits = (logits + model(images.flip(3)).float()) / 2
            classes = require_classes("evaluate", logits, highest)
            sums[0] += F.cross_entropy(logits, labels, reduction="sum")
            sums[1] += (logits.topk(min(5, classes)).indices == labels[:, None]).sum()
            pairs.append(labels * classes + logits.argmax(1))
            if keep:
                kept.append((logits.softmax(1).cpu(), labels.cpu()))
    if not pairs:
        raise ValueError("evaluate: dataset must hold images, got none")
    confusion = torch.bincount(torch.cat(pairs), minlength=classes * classes).view(classes, classes)
    if ranks:
        sums, confusion = ranks.sum(sums), ranks.sum(confusion)
    loss, top5 = (sums.cpu().double() / int(confusion.sum())).tolist()
    right = confusion.diag().sum().item() / int(confusion.sum())
    parts = [torch.cat(part) for part in zip(*kept, strict=True)] if keep else [None, None]
    return Evaluation(loss, right, confusion.cpu(), time.perf_counter() - start, top5, *parts)


#: Of so many classes a matrix still fits on a screen.
FEW_CLASSES = 20


def by_class(found: Evaluation, classes: Sequence[str]) -> list[str]:
    """Each class with its share of right predictions."""
    return [f"{name} {share:.2f}" for name, share in zip(classes, found.per_class, strict=True)]


def describe(found: Evaluation, classes: Sequence[str]) -> str:
    """Accuracy, top-5 accuracy, accuracy of each class and, of up to 20 classes, the confusion matrix, as text.

    >>> print(describe(Evaluation(0.5, 0.75, torch.tensor([[2, 1], [0, 1]]), 0.0), ["cat", "dog"]))
    loss 0.500, top-1 0.7500
    by class: cat 0.67, dog 1.00
    images by true class (row) and predicted class (column):
         cat  dog
    cat    2    1
    dog    0    1
    """
    top5 = f", top-5 {found.top5:.4f}" if len(classes) > 5 else ""
    lines = [
        f"loss {found.loss:.3f}, top-1 {found.accuracy:.4f}{top5}",
        f"by class: {', '.join(by_class(found, classes))}",
    ]
    if len(classes) <= FEW_CLASSES:
        rows = [["", *classes], *([name, *row] for name, row in zip(classes, found.confusion.tolist(), strict=True))]
        width, first = max(4, *(len(str(cell)) for row in rows for cell in row[1:])), max(map(len, classes))
        lines.append("images by true class (row) and predicted class (column):")
        lines += [f"{row[0]:<{first}}" + "".join(f" {cell:>{width}}" for cell in row[1:]) for row in rows]
    return "\n".join(lines)


def confusion_csv(found: Evaluation, classes: Sequence[str]) -> str:
    """The confusion matrix as CSV: a row a true class, a column a predicted one."""
    rows = zip(classes, found.confusion.tolist(), strict=True)
    return csv_text([["true class", *classes], *([name, *row] for name, row in rows)])


def predictions_csv(
    names: Sequence[object],
    probabilities: Tensor,
    classes: Sequence[str],
    labels: Tensor | None = None,
    top: int = 5,
) -> str:
    """A row an image: its name, its true class where ``labels`` say, and the likeliest classes with probabilities.

    Args:
        names: of the images.
        probabilities: ``(N, classes)``.
        classes: names of the classes.
        labels: int64 ``(N,)``, or None.
        top: how many classes.

    >>> print(predictions_csv(["a.png"], torch.tensor([[0.25, 0.75]]), ["cat", "dog"], torch.tensor([0])).strip())
    image,true class,class 1,probability 1,class 2,probability 2
    a.png,cat,dog,0.750000,cat,0.250000
    """
    shares, found = probabilities.topk(min(top, len(classes)))
    header = ["image", *([] if labels is None else ["true class"])]
    for place in range(1, shares.shape[1] + 1):
        header += [f"class {place}", f"probability {place}"]
    rows: list[Sequence[object]] = [header]
    for index, name in enumerate(names):
        row = [name, *([] if labels is None else [classes[int(labels[index])]])]
        for share, label in zip(shares[index].tolist(), found[index].tolist(), strict=True):
            row += [classes[label], f"{share:.6f}"]
        rows.append(row)
    return csv_text(rows)


def csv_text(rows: Sequence[Sequence[object]]) -> str:
    """``rows`` as CSV, quoted where they must be."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


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


@dataclasses.dataclass
class EarlyStopping:
    """Remembers the best value and how many epochs have passed since.

    Args:
        patience: epochs without a better value after which :attr:`should_stop` turns true; 0 for never.

    >>> stopping = EarlyStopping(patience=2)
    >>> [stopping.update(epoch, value) for epoch, value in enumerate([0.5, 0.6, 0.6, 0.4])]
    [True, True, False, False]
    >>> stopping.should_stop, stopping.best_epoch
    (True, 1)
    """

    patience: int
    best: float = float("-inf")
    best_epoch: int = -1
    bad_epochs: int = 0

    def update(self, epoch: int, value: float) -> bool:
        """Count one epoch; whether ``value`` is the best so far (a tie is not)."""
        if value > self.best:
            self.best, self.best_epoch, self.bad_epochs = value, epoch, 0
            return True
        self.bad_epochs += 1
        return False

    @property
    def should_stop(self) -> bool:
        return 0 < self.patience <= self.bad_epochs
