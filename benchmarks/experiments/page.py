"""Sections of text, tables and figures as one HTML file that needs nothing else, and as Markdown with PNG beside it."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ran_ext._files import write_atomically

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1f2328; --soft: #5b6470; --line: #d8dde3; --head: #f3f5f7;
  --reproduced: #1a7f4b; --refuted: #b3261e; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ground: #15181c; --ink: #d7dce2; --soft: #98a2ae; --line: #343b44; --head: #1e232a; --reproduced: #5cc48d;
    --refuted: #f2887f; }
}
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.75rem; border-top: 1px solid var(--line); padding-top: 1.25rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; margin: 0.75rem 0; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 0.7rem; border-bottom: 1px solid var(--line); }
th { background: var(--head); }
.reproduced { color: var(--reproduced); font-weight: 600; }
.refuted { color: var(--refuted); font-weight: 600; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 0.875rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  table { font-size: 8pt; }
  th, td { padding: 0.25rem 0.4rem; }
  h2, p, tr, figure { break-inside: avoid; }
  h2 { break-after: avoid; }
  .wide { overflow: visible; }
}
"""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure on light and on dark ground, as PNG."""

    name: str
    caption: str
    light: bytes
    dark: bytes


@dataclasses.dataclass(frozen=True)
class Section:
    """Paragraphs, tables and figures under a title."""

    title: str
    blocks: Sequence[str | Table | Picture]


def html(sections: Sequence[Section]) -> str:
    """The page; the first section's title is the page's.

    >>> html([Section("A < B", ["text"])]).count("A &lt; B")
    2
    """
    parts = []
    for number, section in enumerate(sections):
        heading = "h2" if number else "h1"
        parts.append(f"<{heading}>{escape(section.title)}</{heading}>")
        parts += [_html_block(block) for block in section.blocks]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = escape(sections[0].title)
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}<title>{title}</title><style>{STYLE}</style></head>\n' \
           f"<body>\n{body}\n</body></html>\n"  # fmt: skip


def _html_block(block: str | Table | Picture) -> str:
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>"
    if isinstance(block, Table):
        head = "".join(f"<th>{escape(cell)}</th>" for cell in block.head)
        rows = "\n".join("<tr>" + "".join(map(_html_cell, row)) + "</tr>" for row in block.rows)
        return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
    dark = f'<source media="screen and (prefers-color-scheme: dark)" srcset="{_data_uri(block.dark)}">'
    image = f'<img src="{_data_uri(block.light)}" alt="{escape(block.name)}">'
    return f"<figure><picture>{dark}{image}</picture><figcaption>{escape(block.caption)}</figcaption></figure>"


def _html_cell(cell: str) -> str:
    marked = f' class="{cell}"' if cell in ("reproduced", "refuted") else ""
    return f"<td{marked}>{escape(cell)}</td>"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def markdown(sections: Sequence[Section]) -> str:
    """The same as :func:`html`, with the figures as files in ``figures``.

    >>> print(markdown([Section("Title", [Table(["a", "b"], [["1", "2"]])])]))
    # Title
    <BLANKLINE>
    | a | b |
    | --- | --- |
    | 1 | 2 |
    <BLANKLINE>
    """
    parts = []
    for number, section in enumerate(sections):
        parts.append(f"{'##' if number else '#'} {section.title}")
        parts += [_markdown_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: str | Table | Picture) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Table):
        lines = [block.head, ["---"] * len(block.head), *block.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"![{block.name}](figures/{block.name}.png)\n\n{block.caption}"


def write_page(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write ``report.html``, ``report.md`` and ``figures/*.png``; the paths of the first two."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Picture):
                write_atomically(folder / "figures" / f"{block.name}.png", block.light)
    pages = {folder / "report.html": html(sections), folder / "report.md": markdown(sections)}
    for path, text in pages.items():
        write_atomically(path, text.encode())
    return list(pages)
