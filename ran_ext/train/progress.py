"""Progress of the whole run: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Shows loss, accuracy, images a second and the time left of the whole run.

    Args:
        steps: of the whole run.
        done: of them, before this process took over.
        file: where to; standard error if None.
        interval: seconds between two refreshes of the bar.
        log_interval: seconds between two lines where ``file`` is no terminal.
        enabled: False shows nothing, but :attr:`due` still sets the pace at which the caller reads its meters.
    """

    def __init__(
        self,
        steps: int,
        done: int = 0,
        *,
        file: TextIO | None = None,
        interval: float = 0.5,
        log_interval: float = 10.0,
        enabled: bool = True,
    ):
        self.file = file or sys.stderr
        self.steps, self.done, self.first = steps, done, done
        self.start = self.shown = time.monotonic()
        terminal = enabled and self.file.isatty()
        self.enabled, self.interval = enabled, interval if terminal else log_interval
        self.bar = (
            tqdm(total=steps, initial=done, file=self.file, bar_format="{desc} {bar} {postfix}") if terminal else None
        )

    @property
    def due(self) -> bool:
        """Whether it is time to read the meters and :meth:`show` them."""
        return time.monotonic() - self.shown >= self.interval

    def advance(self) -> None:
        """Count one step."""
        self.done += 1

    def show(self, where: str, loss: float, accuracy: float, images_per_second: float) -> None:
        """Refresh; ``where`` such as ``epoch 2/10``. In a log, nothing is written before it is :attr:`due`."""
        if self.bar is None and not self.due:
            return
        self.shown = time.monotonic()
        elapsed, fresh = self.shown - self.start, self.done - self.first
        left = duration(elapsed / fresh * (self.steps - self.done)) if fresh else "?"
        figures = f"loss {loss:.3f}, accuracy {accuracy:.3f}, {images_per_second:.0f} images/s, {left} left"
        if self.bar is not None:
            self.bar.n = self.done
            self.bar.set_description_str(where, refresh=False)
            self.bar.set_postfix_str(figures)
        elif self.enabled:
            say(f"{where}, {100 * self.done / self.steps:.0f} %: {figures}", self.file)

    def line(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=self.file)
        elif self.enabled:
            say(text, self.file)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def say(text: str, file: TextIO | None = None) -> None:
    """Print to ``file``, by default standard output; a full disk or a closed pipe there costs the text alone."""
    with contextlib.suppress(OSError):
        print(text, file=file, flush=True)


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any.

    >>> duration(61.4), duration(3723)
    ('1:01', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
