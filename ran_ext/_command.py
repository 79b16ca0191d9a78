"""The command line's parser: every flag by its whole name, and a mistake in one line."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import re
import sys
from typing import Any, NoReturn

from tqdm import tqdm


class TerminalHandler(logging.Handler):
    """Shows what the library logs on standard error, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; a full disk or a closed pipe costs the text alone."""
        with contextlib.suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


def log_to_terminal(level: int = logging.INFO) -> None:
    """Show what the library logs, as commands do; once, however often it is called."""
    logger = logging.getLogger("ran_ext")
    logger.setLevel(level)
    if not any(isinstance(handler, TerminalHandler) for handler in logger.handlers):
        logger.addHandler(TerminalHandler())


class Parser(argparse.ArgumentParser):
    """``ArgumentParser`` that takes no abbreviations, shows ``--help``'s defaults as they are, and explains briefly.

    >>> parser = Parser(prog="train")
    >>> _ = parser.add_argument("--epochs", type=int)
    >>> try:
    ...     parser.parse_args(["--epoch", "2"])
    ... except SystemExit as stop:
    ...     stop.code
    2
    """

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options}, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print one line, with the nearest flag where there is one, and exit with status 2."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], flags, 1) if unknown else []
        hint = f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}; --help explains every flag\n")
