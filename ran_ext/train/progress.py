"""Progress of the whole run: a bar on a terminal, a line now and then in a log; and when the run will end."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import TextIO

from tqdm import tqdm

#: What an image validated costs in images trained, its share of the checkpoint included: 0.48 to 0.59 in sample runs.
VALIDATION = 0.5


class Progress:
    """Shows loss, accuracy, images a second, the time left of the whole run and its expected end.

    The end is announced by a line of its own, within half a minute: after the first step that is through when
    ``announce_after`` has passed, or, where none is through for long, as the earliest time possible.

    Args:
        steps: of the whole run.
        done: of them, before this process took over.
        file: where to; standard error if None.
        interval: seconds between two refreshes of the bar.
        log_interval: seconds between two lines where ``file`` is no terminal.
        enabled: False shows nothing, but :attr:`due` still sets the pace at which the caller reads its meters.
        overhead: what is still to come beside the steps, as a share of their time; the caller sets the attribute to 0
            as soon as it has been met once, since from then on it is measured.
        may_stop: whether the run may stop before its last step.
        announce_after: seconds.
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
        overhead: float = 0.0,
        may_stop: bool = False,
        announce_after: float = 10.0,
    ):
        self.file = file or sys.stderr
        self.steps, self.done, self.first = steps, done, done
        self.start = self.shown = self.warm = time.monotonic()
        terminal = enabled and self.file.isatty()
        self.enabled, self.interval = enabled, interval if terminal else log_interval
        self.overhead, self.may_stop, self.announce_after = overhead, may_stop, announce_after
        self.announced = not enabled
        self.bar = (
            tqdm(total=steps, initial=done, file=self.file, bar_format="{desc} {bar} {postfix}") if terminal else None
        )
        self.waiting: threading.Timer | None = None

    def begin(self) -> None:
        """Start the clock: the first step is about to run."""
        self.start = self.shown = time.monotonic()
        if self.enabled and self.done < self.steps:
            self.waiting = threading.Timer(2.5 * self.announce_after, self._announce_at_least)
            self.waiting.daemon = True
            self.waiting.start()

    @property
    def due(self) -> bool:
        """Whether it is time to read the meters and :meth:`show` them."""
        return time.monotonic() - self.shown >= self.interval

    def advance(self) -> None:
        """Count one step."""
        self.done += 1
        if self.done == self.first + 1:
            self.warm = time.monotonic()
            self._stop_waiting()

    @property
    def seconds_left(self) -> float | None:
        """Expected, from the steps so far without the first, which chooses kernels; None before there is one."""
        fresh = self.done - self.first
        if fresh < 1:
            return None
        start, counted = (self.warm, fresh - 1) if fresh > 1 else (self.start, 1)
        return (time.monotonic() - start) / counted * (self.steps - self.done) * (1 + self.overhead)

    def show(self, where: str, loss: float, accuracy: float, images_per_second: float) -> None:
        """Refresh; ``where`` such as ``epoch 2/10``. In a log, nothing is written before it is :attr:`due`."""
        if self.bar is None and not self.due:
            return
        self.shown = time.monotonic()
        left = self.seconds_left
        self._announce(left)
        end = "?" if left is None else f"{duration(left)} left, ends {clock(left)}"
        figures = f"loss {loss:.3f}, accuracy {accuracy:.3f}, {images_per_second:.0f} images/s, {end}"
        if self.bar is not None:
            self.bar.n = self.done
            self.bar.set_description_str(where, refresh=False)
            self.bar.set_postfix_str(figures)
        elif self.enabled:
            say(f"{where}, {100 * self.done / self.steps:.0f} %: {figures}", self.file)

    def _announce(self, left: float | None) -> None:
        if self.announced or left is None or self.shown - self.start < self.announce_after:
            return
        self.announced = True
        latest = ", or earlier where the accuracy stops growing" if self.may_stop else ""
        self.line(f"expected end: {clock(left)}, in {duration(left)}{latest}")

    def _announce_at_least(self) -> None:
        """Runs in a thread of its own while the first step does."""
        took = time.monotonic() - self.start
        left = took * (self.steps - self.first)
        self.line(
            f"the first of {self.steps - self.first:,} steps is not through after {took:.0f} s: at this rate the run "
            f"takes over {duration(left)} and ends after {clock(left)}"
        )

    def line(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=self.file)
        elif self.enabled:
            say(text, self.file)

    def _stop_waiting(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()

    def close(self) -> None:
        self._stop_waiting()
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


def clock(seconds: float) -> str:
    """Local time so many seconds from now, with the date where it is another day's.

    >>> len(clock(0)), len(clock(3 * 86400))
    (5, 16)
    """
    now = time.time()
    then, today = time.localtime(now + seconds), time.localtime(now)
    return time.strftime("%H:%M" if then[:3] == today[:3] else "%Y-%m-%d %H:%M", then)
