"""Hooks of mkdocs: the README is the first page, and files of the repository that pages link to come along.

So the same Markdown reads well in the repository and on the site, and a strict build finds every broken link.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r'(\]\(|src=")([^)#"\s]+)(#[^)"\s]*)?(\)|")')
SETUP = re.compile(r"^<!-- setup\n.*?^-->\n", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
README = "README.md"


def on_files(files: Any, config: Any) -> Any:
    """Add the README as index.md, and the files outside docs/ that pages link to."""
    texts = {file.src_uri: file.content_string for file in files if file.src_uri.endswith(".md")}
    texts["index.md"] = (ROOT / README).read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_from_root(texts["index.md"])))
    known = {file.src_uri for file in files}
    for page, text in texts.items():
        base = "" if page == "index.md" else posixpath.join("docs", posixpath.dirname(page))
        for _, target, _, _ in LINK.findall(FENCE.sub("", text)):
            path = posixpath.normpath(posixpath.join(base, target))
            if _outside(path) and (ROOT / path).is_file() and path not in known:
                known.add(path)
                files.append(File.generated(config, path, abs_src_path=os.fspath(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at the site: to the README as index.md, to other files of the repository where they are now."""
    source = page.file.src_uri
    if source == "index.md":  # done in on_files
        return SETUP.sub("", markdown)
    if "/" not in source and not (ROOT / "docs" / source).is_file():  # lies beside the README
        return SETUP.sub("", _from_root(markdown))
    base = posixpath.join("docs", posixpath.dirname(source))

    def moved(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups()
        path = posixpath.normpath(posixpath.join(base, target))
        if ":" in target or path.startswith("docs/"):
            return match.group()
        return f"{opening}{_on_site(path, posixpath.dirname(source))}{anchor or ''}{closing}"

    return SETUP.sub("", LINK.sub(moved, markdown))


def _outside(path: str) -> bool:
    return not path.startswith(("docs/", "..", "http")) and path != README


def _on_site(path: str, folder: str) -> str:
    """Where a path of the repository is on the site, seen from a page's folder."""
    there = "index.md" if path == README or (ROOT / path).is_dir() else path
    return posixpath.relpath(there, folder or ".")


def _from_root(text: str) -> str:
    """The links of a page at the root of the repository, such as the README, seen from docs/."""

    def moved(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups()
        if ":" in target:
            return match.group()
        path = "index.md" if target == README or (ROOT / target).is_dir() else target.removeprefix("docs/")
        return f"{opening}{path}{anchor or ''}{closing}"

    return LINK.sub(moved, text)
