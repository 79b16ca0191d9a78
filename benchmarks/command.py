"""How long-running commands end: with an exit status, and one sentence about what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ran_ext._command import log_to_terminal
from ran_ext._errors import one_line
from ran_ext.data import DatasetError
from ran_ext.train import TrainingError


def run_command(name: str, work: Callable[[], int | None], go_on: str = "the same command again goes on") -> int:
    """Do the work; the exit status: its own or 0, 1 after an error that it explains, 130 after Ctrl-C.

    >>> run_command("measure", lambda: None)
    0
    """
    log_to_terminal()
    try:
        return work() or 0
    except (TrainingError, DatasetError, ValueError, OSError) as error:
        print(f"{name}: error: {one_line(error, most=2000)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {go_on}", file=sys.stderr)
        return 130
