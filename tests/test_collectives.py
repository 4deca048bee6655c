"""A step that does not prune takes no collective of ours; what a criterion shares goes in one flat all-reduce."""

from __future__ import annotations

import pytest
from collectives_worker import count
from fsdp_worker import SHARDS_ON_CPU
from on_ranks import on_ranks

LISTENING = ("reconstruction", "variance", "variance_magnitude", "variance_next", "wanda")


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    return on_ranks(2, tmp_path_factory.mktemp("counts"), count)[0]


def test_no_step_of_a_criterion_takes_a_collective(counts):
    found = {name: steps for name, (steps, _) in counts.items() if not name.startswith("sharded")}
    assert len(found) > 40 and set(found.values()) == {0}


def test_an_event_takes_one_broadcast_and_one_all_reduce_of_what_each_has_heard(counts):
    for name, (_, event) in counts.items():
        if not name.startswith("sharded"):
            assert event == (2 if name.split()[0] in LISTENING else 1), name


@pytest.mark.skipif(not SHARDS_ON_CPU, reason="this PyTorch's fully_shard cannot run on the CPU")
def test_sharded_norms_and_gradient_scores_take_one_all_reduce_a_step(counts):
    assert counts["sharded magnitude"][0] == 0
    assert counts["sharded growing_l2"][0] == 3
    assert counts["sharded taylor"][0] == 3
