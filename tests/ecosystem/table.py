"""docs/tools.md, written from what a run of the table's tests found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ecosystem.harness import EQUAL, LEFT_OUT, NOTHING, SUBJECTS, TOOLS, Tool

HEAD = """# Under the tools of the field

Every module and network of `ran_ext`, under every tool below, against its twin in plain PyTorch under the same tool:
outputs, gradients, buffers and counts. This page is written by the tests themselves (`tests/ecosystem`, in the
environment of `tests/ecosystem/requirements.txt`):

```bash
.ci/ecosystem           # makes the environment, tests, compares with this page; ran_compact stands for all networks
.ci/ecosystem --write   # tests every cell, writes this page
```

`=`: equal to the twin. A number: the sentence below, either an error's own words or what to know of equal results.
`·`: nothing there for the tool to act on. Blank: not tried, since it takes long and its parts are. "folded" is
`fold_for_inference(ran_compact)`, which is for evaluation.
Versions: {versions}.
"""
PAGE = Path(__file__).parents[2] / "docs" / "tools.md"
VERSIONS = ("torch", "torchvision", "timm", "peft", "accelerate", "lightning", "captum", "onnxruntime", "torchao")


def pinned() -> dict[str, str]:
    lines = Path(__file__).with_name("requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def rare_cells(text: str) -> dict[tuple[str, str], str]:
    """What a page says of the cells that are not tried each time."""
    notes = dict(re.findall(r"^\[(\d+)\] (.*?) *$", text, re.MULTILINE))
    rows = {cells[0]: cells[1:] for line in text.splitlines() if len(cells := line.strip("| ").split(" | ")) > 1}
    return {
        (tool.name, subject): notes.get(found.strip("[]"), found)
        for tool in TOOLS.values()
        for subject, found in zip(SUBJECTS, rows.get(tool.name, []), strict=False)
        if tool.is_rare(subject)
    }


def page(cells: Mapping[tuple[str, str], str]) -> str:
    """The page, with ``FAILED`` where a cell has no entry."""
    notes: dict[str, int] = {}

    def entry(tool: Tool, subject: str) -> str:
        if not tool.acts_on(SUBJECTS[subject]):
            return NOTHING
        if subject in tool.slow:
            return LEFT_OUT
        found = cells.get((tool.name, subject), "FAILED")
        return found if found in (EQUAL, "FAILED") else f"[{notes.setdefault(found, len(notes) + 1)}]"

    pins = pinned()
    lines = [HEAD.format(versions=", ".join(f"{name} {pins[name]}" for name in VERSIONS))]
    groups = dict.fromkeys(tool.group for tool in TOOLS.values())
    for group in groups:
        lines += [f"## {group}", "", "| | " + " | ".join(SUBJECTS) + " |", "|---|" + ":-:|" * len(SUBJECTS)]
        for tool in (tool for tool in TOOLS.values() if tool.group == group):
            lines.append(f"| {tool.name} | " + " | ".join(entry(tool, subject) for subject in SUBJECTS) + " |")
        lines.append("")
    lines += [f"[{number}] {text}  " for text, number in notes.items()]
    return "\n".join(lines).rstrip() + "\n"
