"""The finished parts of a long measurement in one JSON file, so that an interrupted run repeats none of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ran_ext._errors import one_line
from ran_ext.train.report import write_result


class Ledger:
    """Rows, each written as soon as it is added, and the settings and environment that all of them were measured in.

    Args:
        path: of the file; its rows are read where it is there.
        settings: what the rows depend on, the device among it; fit for JSON.
        environment: versions and hardware, for people.

    Raises:
        ValueError: the file is damaged, or holds rows of other settings.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "ledger.json"
    >>> Ledger(path, {"epochs": 3}, {}).add({"seed": 0, "accuracy": 0.5})
    >>> Ledger(path, {"epochs": 3}, {}).find(seed=0)
    {'seed': 0, 'accuracy': 0.5}
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], environment: Mapping[str, Any]):
        self.path, self.environment = path, environment
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text())
            theirs, self.rows = content["settings"], content["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({one_line(error)}); delete it and measure anew") from error
        names = sorted(
            name for name in self.settings.keys() | theirs.keys() if self.settings.get(name) != theirs.get(name)
        )
        if names:
            raise ValueError(
                f"{self.path} holds rows of another measurement, which differs in {', '.join(names)}: give the same "
                "options again, or choose another --out"
            )

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row with these values, if it has been measured."""
        return next((row for row in self.rows if all(row[name] == value for name, value in key.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and write the file, whole or not at all.

        Raises:
            TrainingError: it cannot be written.
        """
        self.rows.append(row)
        content = {"settings": self.settings, "environment": dict(self.environment), "rows": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_result(self.path, content)
