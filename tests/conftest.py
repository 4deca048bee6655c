from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("law_checks")


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "where tests/gpu runs: cuda (the default; skipped without one), cuda:1 ..., or cpu for a small dry run"
    parser.addoption("--device", default="cuda", help=help_text)
