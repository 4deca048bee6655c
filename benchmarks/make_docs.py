"""Writes docs/benchmarks.md from benchmarks/results/*.json.

    python benchmarks/make_docs.py

Every benchmark does so when it saves its result; the command is for results that came from elsewhere or went. Tables
between ``<!-- result: NAME -->`` and ``<!-- end result -->`` in other pages are made anew too.

Every file there holds what ``common.save`` wrote: a title, a note, the rows, and the command, machine and versions of
the run. A benchmark without a result is listed as not run; a result without its script is shown all the same.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TARGET = HERE.parent / "docs" / "benchmarks.md"
NO_BENCHMARK = ("make_docs", "run_all")

INTRODUCTION = """# Benchmarks

Written from `benchmarks/results/` by every benchmark that ends, and by `python benchmarks/make_docs.py`; please do not
edit it by hand. Each section names the command that makes its table again. Figures in seconds or milliseconds belong to
the machine that is named below the table; ratios and errors carry over better. Competitors run in the same process, in
turns with ours.
"""


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, by file name.

    Raises:
        ValueError: a file that is no JSON, or without title or rows.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or not {"title", "rows"} <= result.keys():
            raise ValueError(f"{path}: no result of a benchmark: 'title' and 'rows' are needed")
        found.append({"name": path.stem, **result})
    return found


def scripts(folder: Path) -> dict[str, str]:
    """Name and first line of the description of every benchmark in a folder: the scripts that can be run."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path.stem not in NO_BENCHMARK and '__name__ == "__main__"' in source:
            text = ast.get_docstring(ast.parse(source)) or ""
            found[path.stem] = text.partition("\n")[0]
    return found


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order in which keys first appear, missing values empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(key)) for key in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = str(value)
    if isinstance(value, float):
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return " ".join(text.split()).replace("|", "\\|")


def section(result: Mapping[str, Any]) -> str:
    """One benchmark: title, command, table, note, and where it was run."""
    parts = [f"## {result['title']}"]
    if result.get("command"):
        parts.append(f"```bash\n{_from_root(str(result['command']))}\n```")
    parts.append(markdown_table(result["rows"]) if result["rows"] else "No rows.")
    parts += [str(result["note"])] if result.get("note") else []
    where = [str(result[key]) for key in ("date", "device", "machine") if result.get(key)]
    where += [f"Python {result['python']}"] if result.get("python") else []
    where += [f"{name} {version}" for name, version in (result.get("versions") or {}).items() if version != "absent"]
    parts += [f"<sub>{', '.join(where)}</sub>"] if where else []
    return "\n\n".join(parts) + "\n"


def _from_root(command: str) -> str:
    """The command as it is given at the root of the repository."""
    words = command.split(" ")
    if len(words) > 1 and "/" not in words[1] and (HERE / words[1]).is_file():
        words[1] = f"benchmarks/{words[1]}"
    return " ".join(words)


def document(results: Sequence[Mapping[str, Any]], known: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        results: what has been run.
        known: name -> first line of every benchmark; those that no result starts with are listed as not run.
    """
    parts = [INTRODUCTION, *(section(result) for result in results)]
    ran = [str(result["name"]) for result in results]
    missing = {name: line for name, line in known.items() if not any(one.startswith(name) for one in ran)}
    if missing:
        lines = [f"- `python benchmarks/{name}.py`: {line}" for name, line in missing.items()]
        parts.append("## Not run yet\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


EMBEDDED = re.compile(r"(<!-- result: (\w+) -->\n).*?(<!-- end result -->)", re.DOTALL)


def embedded(text: str, results: Sequence[Mapping[str, Any]]) -> str:
    """A page with the tables of results between its marks made anew; a mark without a result says so."""
    known = {str(one["name"]): one for one in results}

    def fill(match: re.Match[str]) -> str:
        one = known.get(match[2])
        return match[1] + ("Not measured yet.\n" if one is None else section(one).partition("\n\n")[2]) + match[3]

    return EMBEDDED.sub(fill, text)


def pages() -> dict[Path, str]:
    """Every page that shows results, as it should be."""
    results = read_results(RESULTS)
    found = {page: embedded(page.read_text(encoding="utf-8"), results) for page in sorted(TARGET.parent.glob("*.md"))}
    return {**found, TARGET: document(results, scripts(HERE))}


def write_pages() -> None:
    """Write the pages that are not what the results say."""
    for page, text in pages().items():
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
            sys.stdout.write(f"wrote {page.relative_to(HERE.parent)}\n")


if __name__ == "__main__":
    write_pages()
