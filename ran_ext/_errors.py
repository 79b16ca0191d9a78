"""Errors in words."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """What an error says, for the middle of a sentence: one line, and not without end.

    >>> one_line(ValueError("not a tar:\\n- gzip: no\\n- xz: no"))
    'not a tar: - gzip: no - xz: no'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
