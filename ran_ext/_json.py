"""JSON that is easy to read and to keep in git: what fits on one line is on one line."""

from __future__ import annotations

import json
from typing import Any

#: Characters of a line.
WIDTH = 120


def dumps(value: Any, indent: int = 0, room: int = WIDTH) -> str:
    """``value`` as JSON, broken into lines where an object, or a list of more than numbers, is longer than one.

    >>> print(dumps({"seed": 0, "rows": [{"loss": 0.5, "epoch": epoch} for epoch in range(4)]}, room=40))
    {
     "seed": 0,
     "rows": [
      {"loss": 0.5, "epoch": 0},
      {"loss": 0.5, "epoch": 1},
      {"loss": 0.5, "epoch": 2},
      {"loss": 0.5, "epoch": 3}
     ]
    }
    """
    line = json.dumps(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    numbers = not isinstance(value, dict) and not any(isinstance(part, (dict, list, tuple, str)) for part in parts)
    if numbers or not parts or len(line) <= room - indent:
        return line
    inner = indent + 1
    if isinstance(value, dict):
        # Keys that are not strings are converted as json does.
        items = [f"{json.dumps(json.loads(json.dumps({key: 0})).popitem()[0])}: {dumps(item, inner, room)}"
                 for key, item in value.items()]  # fmt: skip
    else:
        items = [dumps(item, inner, room) for item in value]
    begin, end = "{}" if isinstance(value, dict) else "[]"
    return begin + "".join(f"\n{' ' * inner}{item}," for item in items)[:-1] + f"\n{' ' * indent}{end}"
