"""Under fully_shard a training ends as on one process; what cannot be done is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from fsdp_worker import CASES, SHARDS_ON_CPU, refusals, train, train_all
from on_ranks import on_ranks
from test_ranks import check_same

pytestmark = pytest.mark.skipif(not SHARDS_ON_CPU, reason="this PyTorch's fully_shard cannot run on the CPU")


def differing(ranks: list[dict[str, Any]], left_out: tuple[str, ...] = ()) -> dict[str, str]:
    """The cases that do not end as on one process, with what differs."""
    found = {}
    for name, rule in CASES.items():
        try:
            if name not in left_out:
                check_same(train(rule), [one[name] for one in ranks], 1e-6)
        except AssertionError as error:
            found[name] = str(error)
    return found


def test_two_processes_end_as_one(tmp_path):
    assert differing(on_ranks(2, tmp_path, train_all)) == {}


@pytest.mark.slow
def test_four_processes_go_on_where_two_stopped(tmp_path):
    on_ranks(2, tmp_path, train_all, tmp_path)
    ended = on_ranks(4, tmp_path, train_all, tmp_path, True)
    assert differing(ended, left_out=("snip, largest",)) == {}, "scores of weights are not saved"


def test_what_cannot_be_done_is_refused_by_name(tmp_path):
    for found in on_ranks(2, tmp_path, refusals):
        assert "make the Pruning first, then fully_shard" in found["after"]
        assert "6.weight is under a tensor-parallel plan" in found["parallel"] and "'tp'" in found["parallel"]
        assert "application: 'remove' at every event cannot follow fully_shard" in found["every"]
        assert "target.macs: [0.8, 0.6] removes channels at every member" in found["family"]
        assert "pruner.gathered(build_model())" in found["removal"]
        assert "fully_shard has spread its parameters" in found["saved"]
