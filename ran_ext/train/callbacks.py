"""What a run tells to whoever wants to log it."""

from __future__ import annotations

from .results import EpochFigures, Result
from .state import TrainingState


class Callback:
    """What a run tells while it goes; every method does nothing by default. Called in the first process alone.

    An ``OSError`` from one of them (a full disk, say) ends the calls, not the training.
    """

    def on_start(self, state: TrainingState, step: int) -> None:
        """Training begins with step ``step`` of the run, 0 or that of a resumed checkpoint."""

    def on_steps(self, first: int, rows: list[tuple[float, float]], images_per_second: float) -> None:
        """Steps ``first``, ``first + 1``, ... of the run took place, with these losses and accuracies."""

    def on_epoch(self, figures: EpochFigures, state: TrainingState) -> None:
        """An epoch has been validated."""

    def on_end(self, result: Result) -> None:
        """The run has come to its end, or was interrupted."""
