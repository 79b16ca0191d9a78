"""What the site has beyond ``docs``: the README as its first page, the files that pages link to, and commands' help.

mkdocs calls the functions by their names. A page that lies elsewhere in the repository, or a figure's data, stands
once, where the repository has it; its links are rewritten for its place in the site. Run it from the repository's root
as ``python -m mkdocs``: the commands whose help is shown are found from there.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
#: Pages of the site that lie outside ``docs``, by their place in the repository.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
HELP = re.compile(r"^<!-- help: (\S+)(?: (--\S+))? -->$", re.M)


def place_in_repository(uri: str) -> str:
    """Where a file of the site lies, from the repository's root."""
    if (ROOT / "docs" / uri).exists():
        return f"docs/{uri}"
    return next((place for place, page in PAGES.items() if page == uri), uri)


def place_in_site(path: str) -> str:
    """Where a file of the repository stands in the site."""
    return PAGES.get(path, path.removeprefix("docs/"))


def linked(uri: str, text: str) -> list[str]:
    """The files of the repository that a page links to.

    >>> linked("convert.md", "see [it](../benchmarks/results/cpu_convert.json) and [that](conv3x3.md#speed)")
    ['benchmarks/results/cpu_convert.json', 'docs/conv3x3.md']
    """
    folder = posixpath.dirname(place_in_repository(uri))
    return [posixpath.normpath(posixpath.join(folder, link)) for link in LINK.findall(text)]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the linked files that lie outside ``docs``."""
    for place, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / place)))
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        page = waiting.pop()
        for path in linked(page.src_uri, Path(page.abs_src_path).read_text()):
            uri = place_in_site(path)
            if (ROOT / path).is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
                if uri.endswith(".md"):
                    waiting.append(files.get_file_from_path(uri))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """Rewrite links for the site, and put commands' help where it is asked for."""
    uri = page.file.src_uri
    folder = posixpath.dirname(place_in_repository(uri))

    def moved(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        return posixpath.relpath(place_in_site(path), posixpath.dirname(uri) or ".")

    return HELP.sub(lambda found: f"```text\n{help_of(found[1], found[2] or '--help')}```", LINK.sub(moved, text))


def help_of(module: str, flag: str) -> str:
    """What ``python -m MODULE --help`` prints, or with another flag."""
    said = io.StringIO()
    before, sys.argv = sys.argv, [f"python -m {module}", flag]
    os.environ["COLUMNS"] = "84"
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            importlib.import_module("ran_ext.__main__" if module == "ran_ext" else module).main([flag])
    finally:
        sys.argv = before
    return said.getvalue()
