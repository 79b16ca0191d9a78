"""The results of a finished run, and of all runs of a plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ran_ext._errors import one_line
from ran_ext._files import write_json

from .plan import VARIANTS, Run, Scale, plan

RESULT = "result.json"


class StudyError(ValueError):
    """The folder or the images do not fit the plan; one sentence that says what to do."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run's figures.

    Attributes:
        parameters: of the network.
        diverged: what was not finite, where a training ended so; then there is nothing but this.
        epochs: ``epoch``, ``train_loss``, ``train_accuracy``, ``val_loss``, ``val_accuracy``, ``seconds`` since the
            start, for each.
        confusion: test images by true class (row) and predicted class (column), with the last epoch's weights.
        last_layer: the dense layer's weight at the end, classes x features.
        settings: all that decided the figures, and the device.
        environment: of :func:`timing.environment`.
    """

    parameters: int
    diverged: str = ""
    epochs: list[dict[str, float]] = dataclasses.field(default_factory=list)
    confusion: list[list[int]] = dataclasses.field(default_factory=list)
    last_layer: list[list[float]] = dataclasses.field(default_factory=list)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Wall time of training and validation."""
        return self.epochs[-1]["seconds"]

    @property
    def test_accuracy(self) -> float:
        """Share of the test images that the last epoch's weights get right."""
        right = sum(row[label] for label, row in enumerate(self.confusion))
        return right / sum(map(sum, self.confusion))

    @property
    def train_accuracy(self) -> float:
        """Of the last epoch, in training mode, on augmented images."""
        return self.epochs[-1]["train_accuracy"]

    @property
    def gap(self) -> float:
        """Training minus validation accuracy of the last epoch."""
        return self.train_accuracy - self.epochs[-1]["val_accuracy"]

    @property
    def convergence(self) -> float:
        """Seconds to the first epoch whose validation accuracy is within half a point of the run's best."""
        best = max(row["val_accuracy"] for row in self.epochs)
        return next(row["seconds"] for row in self.epochs if row["val_accuracy"] >= best - 0.005)

    @property
    def epoch_seconds(self) -> float:
        """Mean wall time of an epoch."""
        return self.seconds / len(self.epochs)

    def save(self, folder: Path) -> None:
        """Write ``result.json``, whole or not at all."""
        write_json(folder / RESULT, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Outcome | None:
        """What :meth:`save` wrote there; None where nothing is.

        Raises:
            StudyError: the file is no such result.
        """
        path = folder / RESULT
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise StudyError(
                f"{path} is no result of this experiment ({one_line(error)}); delete it to run it again"
            ) from error


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted names.

    >>> flat({"seed": 0, "recipe": {"epochs": 2}})
    {'seed': 0, 'recipe.epochs': 2}
    """
    named: dict[str, Any] = {}
    for name, value in settings.items():
        inner = flat(value) if isinstance(value, Mapping) else {}
        named |= {f"{name}.{key}": part for key, part in inner.items()} if inner else {name: value}
    return named


class Study:
    """The plan of a scale and those of its runs that are finished.

    Args:
        name, scale: of :data:`SCALES`.
        folder: has a folder for each run.
        device: the name of the device; times of two devices are never mixed in one figure.

    Raises:
        StudyError: a result there was computed with other settings.
    """

    def __init__(self, name: str, scale: Scale, folder: Path, device: str):
        self.name, self.scale, self.folder, self.device = name, scale, folder, device
        self.plan = plan(scale)
        self.outcomes: dict[Run, Outcome] = {}
        for run in self.plan:
            outcome = Outcome.load(self.run_folder(run))
            if outcome is not None:
                self._require_same_settings(run, outcome)
                self.outcomes[run] = outcome

    def run_folder(self, run: Run) -> Path:
        return self.folder / "runs" / run.name

    def settings(self, run: Run) -> dict[str, Any]:
        """What a result of ``run`` must say that it was computed with."""
        return run.settings(self.scale) | {"device": self.device}

    def _require_same_settings(self, run: Run, outcome: Outcome) -> None:
        here, there = flat(self.settings(run)), flat(outcome.settings)
        unlike = [f"{name} is {here.get(name)!r} here and {there.get(name)!r} there" for name in here | there
                  if here.get(name) != there.get(name)]  # fmt: skip
        if unlike:
            raise StudyError(
                f"{self.run_folder(run) / RESULT} was computed with other settings: {'; '.join(unlike)}; choose "
                "another --out, or delete that folder"
            )

    @property
    def missing(self) -> list[Run]:
        """Runs that are not finished, in the plan's order."""
        return [run for run in self.plan if run not in self.outcomes]

    def of(self, implementation: str, variant: str) -> dict[int, Outcome]:
        """Outcomes by seed, without the diverged."""
        found = {run.seed: outcome for run, outcome in self.outcomes.items()
                 if (run.implementation, run.variant) == (implementation, variant)}  # fmt: skip
        return {seed: outcome for seed, outcome in found.items() if not outcome.diverged}

    def seconds_left(self, runs: Sequence[Run]) -> float | None:
        """What ``runs`` will take, judged by the finished ones of the same implementation; None without any."""
        total = 0.0
        for run in runs:
            rates = [outcome.seconds / VARIANTS[done.variant].work for done, outcome in self.outcomes.items()
                     if done.implementation == run.implementation and not outcome.diverged]  # fmt: skip
            if not rates:
                return None
            total += VARIANTS[run.variant].work * sum(rates) / len(rates)
        return total
