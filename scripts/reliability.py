"""Runs the large fuzzers and the kill test, and writes what they counted into docs/reliability.md.

    python scripts/reliability.py [PYTEST ARGUMENTS]

Without arguments everything in ``tests/test_fuzz.py`` and ``tests/test_kill.py`` that is marked slow runs. With
arguments, such as ``-k configs``, only the rows of what ran are replaced. Nothing is written when a test fails.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
TESTS = ("tests/test_fuzz.py", "tests/test_kill.py")
MARK = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)
COUNTS = "RELIABILITY_COUNTS"
HEADS = {
    "fuzzers": ("tried", "examples", "taken", "refused with one message", "slowest", "measured"),
    "kills": ("killed", "processes", "measured"),
}


def fuzzer_row(found: Mapping[str, Any], where: str) -> list[str]:
    """A row of the table of fuzzers."""
    taken, refused = int(found.get("taken", 0)), int(found.get("refused", 0))
    return [found["name"], f"{taken + refused:,}", f"{taken:,}", f"{refused:,}", f"{found['slowest']:.1f} s", where]


def kill_rows(found: Mapping[str, Any], where: str) -> list[list[str]]:
    """The rows of the table of kills: one for each thing that a run was doing."""
    moments = {**found["random"], "at a chosen moment": found["precise"]}
    return [[name, f"{count:,}", where] for name, count in moments.items()]


def known_rows(page: str, table: str) -> dict[str, list[str]]:
    """The rows of a table of the page, each under its first cell."""
    block = next((match[0] for match in MARK.finditer(page) if match[2] == table), "")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if "|" in line]
    return {cells[0]: cells for cells in lines[2:]}


def updated(page: str, found: Sequence[Mapping[str, Any]], where: str) -> str:
    """The page with the rows of what was found put in place of those of the same name."""
    rows = {table: known_rows(page, table) for table in HEADS}
    for one in found:
        if one["name"] == "kills":
            rows["kills"] = {cells[0]: cells for cells in kill_rows(one, where)}
        else:
            rows["fuzzers"][one["name"]] = fuzzer_row(one, where)

    def table(match: re.Match[str]) -> str:
        head = HEADS[match[2]]
        lines = [head, ["---"] * len(head), *rows[match[2]].values()]
        return match[1] + "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + match[3]

    return MARK.sub(table, page)


def main(arguments: Sequence[str]) -> int:
    """Run, count, write; the exit code of pytest."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", *TESTS, *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, COUNTS: folder, "OMP_NUM_THREADS": "1"}, check=False
        )
        if done.returncode:
            return done.returncode
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).iterdir())]
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    where = f"{day}, Python {platform.python_version()}, PyTorch {torch.__version__.partition('+')[0]}"
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), found, where), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(found)} counts")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
