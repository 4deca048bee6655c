"""The page of counts: rows come from what the tests counted, and what did not run keeps its row."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("reliability", ROOT / "scripts" / "reliability.py")
assert spec is not None and spec.loader is not None
reliability = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reliability)

PAGE = "A\n<!-- begin: fuzzers -->\n<!-- end: fuzzers -->\nB\n<!-- begin: kills -->\n<!-- end: kills -->\nC\n"
CONFIGS = {"name": "configs", "taken": 10, "refused": 6990, "slowest": 0.34}


def test_rows_are_replaced_by_name() -> None:
    page = reliability.updated(PAGE, [CONFIGS, {"name": "kills", "random": {"dense": 3}, "precise": 8}], "today")
    assert "| configs | 7,000 | 10 | 6,990 | 0.3 s | today |\n" in page
    assert "| dense | 3 | today |\n| at a chosen moment | 8 | today |\n<!-- end: kills -->\nC\n" in page
    again = reliability.updated(
        page, [{**CONFIGS, "taken": 1}, {"name": "states", "refused": 5, "slowest": 1}], "later"
    )
    assert "| configs | 6,991 | 1 | 6,990 | 0.3 s | later |\n| states | 5 | 0 | 5 | 1.0 s | later |\n" in again
    assert "| dense | 3 | today |\n" in again and "| configs | 7,000" not in again
    assert reliability.updated(again, [], "never") == again


def test_the_page_has_both_tables() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert {match[2] for match in reliability.MARK.finditer(page)} == set(reliability.HEADS)
