"""Docstrings name other objects as Sphinx has it, :func:`~ran_ext.convert`; on the site that is a link: `convert`."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|data|mod|attr|exc):`(~?)([^`]+)`")


def as_code(text: str) -> str:
    """Docstring text with each role as code.

    >>> as_code("see :func:`~ran_ext.convert` and :class:`Config`")
    'see `convert` and `Config`'
    """
    return ROLE.sub(lambda role: f"`{role[2].rpartition('.')[2] if role[1] else role[2]}`", text)


class Roles(griffe.Extension):
    """Rewrites each docstring once, when griffe has read it."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every object that it reads."""
        if obj.docstring:
            obj.docstring.value = as_code(obj.docstring.value)
