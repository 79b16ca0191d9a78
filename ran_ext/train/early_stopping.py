"""Stop when the validation accuracy has stopped growing."""

from __future__ import annotations

import dataclasses


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
