"""Rows of results as Markdown tables, JSON and charts, and the gate against an older run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ran_ext import _files
from ran_ext._attention_maps import png

from .timing import Spread

#: Colours of a chart's bars, the same in every chart: plain PyTorch grey, compiled orange, cuDNN green, ran_ext blue.
COLOURS = {
    "eager channels_last": "#555555",
    "eager NCHW fp32": "#bbbbbb",
    "eager, CUDA graph": "#888888",
    "torch.compile": "#d95f02",
    "torch.compile, freezing": "#f8cda6",
    "max-autotune": "#f09a4f",
    "max-autotune, CUDA graph": "#a34602",
    "cuDNN graph API": "#76b900",
    "ran_ext": "#1f5fa8",
    "ran_ext without kernels": "#a6cbee",
    "eager, converted": "#5fa8e0",
    "ran_ext folded": "#0b2f5c",
    "ran_ext, torch.compile": "#5b97d6",
    "ran_ext, CUDA graph": "#3f2fa8",
}

#: Inches of a picture, at 110 pixels each, and bars of a panel: what a screen shows at once.
SCREEN, BARS = 9.5, 32
#: Characters of a line of results, so that a row stands on one.
ROW = 1000


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender's figure, or why it has none.

    Args:
        suite, case, task, dtype, contender: what was measured.
        value: median of ``unit``, ms or MB; NaN where ``missing`` says why there is none.
        ratios: to each baseline: times faster for ms, the share of its bytes for MB.
        percent: of the machine's measured rate, and which rate; None where neither bounds the case.
    """

    suite: str
    case: str
    task: str
    dtype: str
    contender: str
    value: float
    unit: str
    ratios: dict[str, Spread]
    percent: tuple[float, str] | None = None
    missing: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What the same measurement has in common in two runs."""
        return self.suite, self.case, self.task, self.dtype, self.contender


def tables(rows: Sequence[Row]) -> str:
    """One Markdown table for each suite, task and dtype, in each case the baseline first."""
    text = []
    for (suite, task, dtype), group in groupby(rows, lambda row: (row.suite, row.task, row.dtype)):
        text.append(f"\n### {suite}: {task}, {dtype}\n\n{_table(list(group))}")
    return "\n".join(text)


def _table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.ratios))
    unit = rows[0].unit
    said = "share of" if unit == "MB" else "x"
    rated = any(row.percent for row in rows)
    head = ["case", "contender", unit, *(f"{said} {name}" for name in names), *(["% of rate"] if rated else [])]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    previous = ""
    for row in rows:
        value = f"not available: {row.missing}" if row.missing else f"{row.value:.4g}"
        cells = [row.case if row.case != previous else "", row.contender, value]
        cells += [_ratio(row.ratios.get(name), unit) for name in names]
        if rated:
            cells.append(f"{row.percent[0]:.0f} {row.percent[1]}" if row.percent else "")
        lines.append(cells)
        previous = row.case
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _ratio(spread: Spread | None, unit: str) -> str:
    if spread is None:
        return ""
    return f"{spread.median:.2f}" if unit == "MB" else f"{spread.median:.2f} [{spread.q25:.2f}, {spread.q75:.2f}]"


def write_json(path: Path, environment: dict[str, Any], rows: Sequence[Row]) -> None:
    """The rows and what they must be read with; a missing value is null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [dataclasses.asdict(row) | ({"value": None} if row.missing else {}) for row in rows]
    _files.write_json(path, {"environment": environment, "rows": [_rounded(row) for row in written]}, ROW)


def _rounded(value: Any) -> Any:
    """Five digits of every number, which is more than any of them is sure of."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read_json(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What :func:`write_json` wrote."""
    content = json.loads(path.read_text())
    rows = []
    for row in content["rows"]:
        row["ratios"] = {name: Spread(**spread) for name, spread in row["ratios"].items()}
        row["percent"] = tuple(row["percent"]) if row["percent"] else None
        row["value"] = math.nan if row["value"] is None else row["value"]
        rows.append(Row(**row))
    return content["environment"], rows


def regressions(rows: Sequence[Row], old: Sequence[Row], tolerance: float) -> list[str]:
    """One line for each of ran_ext's ratios that is worse than the old one by more than ``tolerance``.

    Raises:
        ValueError: the runs have no ratio of ran_ext's in common, so nothing would be compared.
    """
    before = {(row.key, name): spread.median for row in old for name, spread in row.ratios.items()}
    found, compared = [], 0
    for row in rows:
        if not row.contender.startswith("ran_ext"):
            continue
        for name, spread in row.ratios.items():
            past = before.get((row.key, name))
            if past is None:
                continue
            compared += 1
            worse = spread.median / past - 1 if row.unit == "MB" else 1 - spread.median / past
            if worse > tolerance:
                what = ", ".join(row.key)
                found.append(f"{what}: {spread.median:.3f} of {name}, was {past:.3f} ({worse:.1%} worse)")
    if not compared:
        raise ValueError(
            "compare: --against: no ratio of ran_ext's is in both runs; take one of the same suite and batch"
        )
    return found


def write_charts(path: Path, rows: Sequence[Row]) -> list[Path]:
    """Bars of the ratio to the first baseline, with quartiles; panels for each task and dtype of one suite.

    No picture is taller than a screen: where one would be, there are several, numbered; their paths.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # fails where matplotlib is missing, so not at import
    from matplotlib.figure import Figure

    shown = [row for row in rows if not row.missing]
    panels = [part for _, group in groupby(shown, lambda row: (row.task, row.dtype)) for part in _parts(list(group))]
    lines = [panels[first : first + 2] for first in range(0, len(panels), 2)]
    heights = [max(2.4, 0.22 * max(map(len, line)) + 1.4) for line in lines]
    pages: list[list[int]] = [[]]
    for number, height in enumerate(heights):
        if pages[-1] and sum(heights[line] for line in pages[-1]) + height > SCREEN:
            pages.append([])
        pages[-1].append(number)
    paths = [path if len(pages) == 1 else path.with_stem(f"{path.stem}_{page + 1}") for page in range(len(pages))]
    for place, page in zip(paths, pages, strict=True):
        columns, tall = min(2, len(panels)), [heights[line] for line in page]
        figure = Figure(figsize=(7.5 * columns, sum(tall)), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(page), columns, squeeze=False, height_ratios=tall)
        for axes, line in zip(grid, page, strict=True):
            for axis, panel in zip(axes, lines[line], strict=False):
                _panel(axis, panel)
            for axis in axes[len(lines[line]) :]:
                axis.remove()
        _files.write_atomically(place, png(figure))
    return paths


def _parts(rows: list[Row]) -> list[list[Row]]:
    """The rows of a panel in parts of whole cases, each of at most ``BARS`` where a case has not more."""
    parts: list[list[Row]] = [[]]
    for _, group in groupby(rows, lambda row: row.case):
        case = list(group)
        if parts[-1] and len(parts[-1]) + len(case) > BARS:
            parts.append([])
        parts[-1] += case
    return parts


def _panel(axis: Any, rows: list[Row]) -> None:
    contenders = list(dict.fromkeys(row.contender for row in rows))
    position, ticks = 0.0, []
    for case, group in groupby(rows, lambda row: row.case):
        begin = position
        for row in group:
            baseline, spread = next(iter(row.ratios.items()))
            sides = [[spread.median - spread.q25], [spread.q75 - spread.median]]
            error = {"ecolor": "black", "elinewidth": 0.8}
            axis.barh(position, spread.median, 0.9, color=COLOURS[row.contender], xerr=sides, error_kw=error)
            place: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7}
            axis.annotate(f"{spread.median:.2f}", (spread.q75, position), (3, 0), **place)
            position += 1
        ticks.append(((begin + position - 1) / 2, case))
        position += 0.7
    axis.set_yticks(*zip(*ticks, strict=True), fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(x=0.12)
    measure = "share of the bytes of" if rows[0].unit == "MB" else "times faster than"
    axis.set_xlabel(f"{measure} {baseline}")
    axis.set_title(f"{rows[0].task}, {rows[0].dtype}", fontsize=10)
    handles = [axis.barh(0, 0, color=COLOURS[name]) for name in contenders]
    axis.legend(handles, contenders, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
