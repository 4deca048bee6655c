"""No decision changes unnoticed: masks of every pattern with every criterion are those of data/golden_masks.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import golden
import pytest
import torch

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.registry import names

TABLE = json.loads(golden.TABLE.read_text(encoding="utf-8"))
QUICK = ("magnitude", "taylor", "obs")
"""Criteria of every run of the tests; the others are slow together."""


BY_SOLVES = ("fast_cap",)
"""Criteria whose later masks follow the last bits of a solve, which differ between processors: how many weights of each
tensor are kept is compared, and not which."""


def comparable(key: str, row: Any) -> Any:
    """A row of the table without what depends on the processor."""
    if key.split()[1] not in BY_SOLVES:
        return row
    return {event: {name: kept.split()[0] for name, kept in masks.items()} for event, masks in row.items()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_registered_name_is_in_the_table() -> None:
    assert {" ".join(one) for one in golden.combinations()} == set(TABLE)


@pytest.mark.parametrize("pattern", golden.PATTERNS)
def test_masks_are_those_of_the_table(pattern: str) -> None:
    some = [one for one in golden.combinations() if one[0] == pattern and one[1] in QUICK and one[2] == "global"]
    assert {" ".join(one): golden.row(*one) for one in some} == {" ".join(one): TABLE[" ".join(one)] for one in some}


@pytest.mark.parametrize("pattern", golden.PATTERNS)
def test_what_does_not_go_together_is_refused_when_the_pruner_is_made(pattern: str) -> None:
    for criterion in names("criterion"):
        refused = not isinstance(TABLE[f"{pattern} {criterion} global"], dict)
        with pytest.raises(ConfigError, match="criterion: ") if refused else nullcontext():
            golden.pruner_of(golden.net_of(pattern), golden.PATTERNS[pattern], criterion)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", golden.PATTERNS)
def test_masks_of_all_criteria_and_scopes_are_those_of_the_table(pattern: str) -> None:
    every = [one for one in golden.combinations() if one[0] == pattern]
    found = {" ".join(one): comparable(" ".join(one), golden.row(*one)) for one in every}
    assert found == {key: comparable(key, value) for key, value in TABLE.items() if key.split()[0] == pattern}
