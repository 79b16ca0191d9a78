"""The figures of a run."""

from __future__ import annotations

import dataclasses

from .config import Config
from .evaluation import Evaluation


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
