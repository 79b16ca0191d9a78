"""Trains what a study is missing, one run after another: each is tested once, at its end, and leaves its outcome."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ran_ext.data import CIFAR10, split_validation
from ran_ext.train import Callback, NonFiniteError, Progress, Ranks, fit
from ran_ext.train.state import LAST
from ran_ext.train.system import duration

from ..reference import training
from ..timing import environment
from .outcomes import Outcome, Study
from .plan import RAN_EXT, Run, Scale

CURVES = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds")


class Stopped(Exception):
    """The time is up; what is finished is kept."""


class Diverged(Exception):
    """A loss is no longer finite."""


@dataclasses.dataclass(frozen=True)
class Images:
    """The same for every run of a study."""

    train: CIFAR10
    val: CIFAR10
    test: CIFAR10


def load_images(scale: Scale, data: Path | None) -> Images:
    """The images of ``scale``, equally many of each class.

    Raises:
        DatasetError: ``data`` holds no CIFAR-10.
    """
    train, test = (
        CIFAR10.sample(split) if scale.sample or data is None else CIFAR10(data, split) for split in ("train", "test")
    )
    train, val = split_validation(train, scale.val_images)
    if scale.train_images is not None:
        train = split_validation(train, scale.train_images)[1]
    if scale.test_images is not None:
        test = split_validation(test, scale.test_images)[1]
    return Images(train, val, test)


class Deadline(Callback):
    """The end of the time allowed; asks a run of ran_ext to stop there, as Ctrl-C does.

    Args:
        minutes: from now; None for no end.
    """

    def __init__(self, minutes: float | None):
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.asked = False

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def on_steps(self, first: int, rows: list[tuple[float, float]], images_per_second: float) -> None:
        if self.left < 0 and not self.asked:
            self.asked = True
            signal.raise_signal(signal.SIGTERM)


class Runner:
    """Trains the missing runs of a study.

    Args:
        study: takes the outcomes up.
        images: of all runs.
        device: of the networks.
        deadline: when to stop.
    """

    def __init__(self, study: Study, images: Images, device: torch.device, deadline: Deadline):
        self.study, self.images, self.device, self.deadline = study, images, device, deadline

    def run_all(self) -> None:
        """Train run after run.

        Raises:
            Stopped: the deadline comes before the end.
            KeyboardInterrupt: Ctrl-C; ran_ext's run has written a checkpoint.
            TrainingError: a run of ran_ext cannot go on.
        """
        study = self.study
        for run in study.missing:
            left = study.seconds_left(study.missing)
            about = "" if left is None else f"; about {duration(left)} left for all"
            where = f"run {len(study.outcomes) + 1} of {len(study.plan)}"
            print(f"\n{where}: {run.label}{about}", file=sys.stderr, flush=True)
            folder = study.run_folder(run)
            folder.mkdir(parents=True, exist_ok=True)
            outcome = self.train_ran_ext(run) if run.implementation == RAN_EXT else self.train_reference(run)
            facts = environment(self.device)
            study.outcomes[run] = dataclasses.replace(outcome, settings=study.settings(run), environment=facts)
            study.outcomes[run].save(folder)
            (folder / LAST).unlink(missing_ok=True)
            if self.deadline.left < 0 and study.missing:
                raise Stopped("the time is up")

    def train_ran_ext(self, run: Run) -> Outcome:
        """Train with :func:`ran_ext.train.fit`, from its checkpoint where there is one."""
        config, images = run.config(self.study.scale), self.images
        torch.manual_seed(config.seed)
        model = config.create_model()
        try:
            result = fit(
                model,
                images.train,
                images.val,
                config,
                self.study.run_folder(run),
                test_set=images.test,
                ranks=Ranks(0, 1, self.device),
                resume=True,
                callbacks=[self.deadline],
            )
        except NonFiniteError as error:
            return Outcome(count_parameters(model), diverged=str(error).partition(":")[0])
        if result.test is None:
            raise Stopped("the time is up") if self.deadline.asked else KeyboardInterrupt
        epochs = [{name: getattr(row, name) for name in CURVES} for row in result.figures]
        return tested(model, epochs, result.test.confusion)

    def train_reference(self, run: Run) -> Outcome:
        """Train with the reference, which cannot resume; a run that would not finish in time is not begun."""
        expected = self.study.seconds_left([run])
        if expected is not None and self.deadline.left < expected:
            raise Stopped(f"the next run, of the reference, takes {duration(expected)} and must end within one call")
        recipe, images = run.recipe(self.study.scale), self.images
        train, val, test = images.train, images.val, images.test
        progress = Progress(recipe.epochs)

        def on_epoch(figures: dict[str, float]) -> None:
            self.show_epoch(figures, recipe.epochs, progress)
            if self.deadline.left < 0 and figures["epoch"] < recipe.epochs:
                raise Stopped("the time is up; the run of the reference will start over")

        try:
            trained = training.train(recipe, train.images, train.labels, val.images, val.labels, self.device, on_epoch)
        except Diverged as error:
            return Outcome(count_parameters(training.build_network(recipe)), diverged=str(error))
        finally:
            progress.close()
        predicted = training.predict(trained, test.images).argmax(1)
        confusion = torch.bincount(test.labels * 10 + predicted, minlength=100).view(10, 10)
        return tested(trained.network, trained.figures, confusion)

    def show_epoch(self, figures: dict[str, float], epochs: int, progress: Progress) -> None:
        """A line for the reference's epoch.

        Raises:
            Diverged: its loss is not finite.
        """
        if not math.isfinite(figures["train_loss"]):
            raise Diverged(f"the training loss of epoch {figures['epoch']} is {figures['train_loss']}")
        where, seconds, accuracy = f"epoch {figures['epoch']}/{epochs}", figures["seconds"], figures["train_accuracy"]
        progress.advance()
        progress.show(where, figures["train_loss"], accuracy, len(self.images.train) * figures["epoch"] / seconds)
        progress.line(
            f"{where}: training accuracy {accuracy:.4f}, validation accuracy {figures['val_accuracy']:.4f}; "
            f"{duration(seconds)}"
        )


def tested(network: nn.Module, epochs: list[dict[str, Any]], confusion: Tensor) -> Outcome:
    """The outcome of a run that came to its end."""
    weight: Tensor = network.get_parameter("fc.weight").detach().float().cpu()
    last_layer = [[float(f"{value:.5g}") for value in row] for row in weight.tolist()]
    return Outcome(count_parameters(network), "", epochs, confusion.tolist(), last_layer)


def count_parameters(network: nn.Module) -> int:
    """Trainable ones."""
    return sum(p.numel() for p in network.parameters())
