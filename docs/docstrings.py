"""Docstrings for the site: roles as code, doctests as blocks, an entry for each argument of "stride, padding: ..."."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|data|mod|attr|exc):`(~?)([^`]+)`")
DOCTEST = re.compile(r"^( *)>>> .*\n(?:\1\S.*\n?|\1 +.*\n?)*", re.M)
JOINT = re.compile(r"^( +)(\w+(?:, \w+)+): ((?:.*\n)(?:\1 .*\n)*)", re.M)
SECTION = re.compile(r"^( *)(?:Args|Attributes):\n(?:(?:\1 +.*)?\n)*", re.M)


def for_site(text: str) -> str:
    """The docstring as griffe's reader of Google's style and Markdown take it.

    >>> for_site("see :func:`~ran_ext.convert` and :class:`Config`")
    'see `convert` and `Config`'
    >>> for_site("Args:\\n    a, b: sizes.\\n")
    'Args:\\n    a: sizes.\\n    b: sizes.\\n'
    """
    text = ROLE.sub(lambda role: f"`{role[2].rpartition('.')[2] if role[1] else role[2]}`", text)
    text = text.replace("::\n\n", ":\n\n")
    text = SECTION.sub(lambda section: JOINT.sub(_each, section[0]), f"{text}\n")
    return DOCTEST.sub(lambda lines: f"{lines[1]}```pycon\n{lines[0].rstrip()}\n{lines[1]}```\n", text)[:-1]


def _each(entry: re.Match[str]) -> str:
    """One entry for each name."""
    return "".join(f"{entry[1]}{name}: {entry[3]}" for name in entry[2].split(", "))


class ForSite(griffe.Extension):
    """Rewrites each docstring once, when griffe has read it."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every object that it reads."""
        if obj.docstring:
            obj.docstring.value = for_site(obj.docstring.value)
