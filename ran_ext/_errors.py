"""Errors in words."""

from __future__ import annotations


def one_line(error: BaseException, most: int = 300) -> str:
    """An error's message as one line of at most ``most`` characters, for use in a sentence.

    >>> one_line(ValueError("not a tar:\\n- gzip: no\\n- xz: no"))
    'not a tar: - gzip: no - xz: no'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]}..."
