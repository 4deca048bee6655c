"""Blocks shared over two ranks: each keeps about half, both decide the same, and the same as one rank alone."""

from __future__ import annotations

import pytest
import torch
from on_ranks import on_ranks
from second_order_fixture import batches, cross_entropy, rule, small_net
from second_order_ranks import prune

from pruningawaretraining.session.one_shot import one_shot

CRITERIA = {
    "cap": {"type": "cap", "num_grads": 32, "micro_batch": 1, "damp": 1e-3, "fisher_block_size": 24},
    "few gradients": {"type": "obs", "num_grads": 16, "micro_batch": 2, "damp": 1e-3, "fisher_block_size": 24},
    "streamed": {"type": "cap", "num_grads": 32, "micro_batch": 1, "damp": 1e-3, "max_memory": 40_000},
    "fast_cap": {"type": "fast_cap", "num_grads": 32, "micro_batch": 1},
    "sparse_gpt": {"type": "sparse_gpt", "num_grads": 8},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(2, tmp_path_factory.mktemp("ranks"), prune, CRITERIA)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_rank_decides_the_same(ranks, name):
    first, second = (one["models"][name] for one in ranks)
    for sparsity, state in first.items():
        assert all(torch.equal(value, second[sparsity][key]) for key, value in state.items())


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "streamed"])
def test_two_ranks_do_what_one_does_on_all_the_data(ranks, name):
    """The order of gradients differs, so the sums do by rounding."""
    spec = CRITERIA[name]
    alone = one_shot(small_net(), rule("unstructured", spec), batches(8, 4), cross_entropy, [0.5, 0.8])
    for sparsity, model in alone.items():
        shared = ranks[0]["models"][name][sparsity]
        for key, value in model.state_dict().items():
            assert torch.allclose(value, shared[key], atol=1e-4), (name, sparsity, key)


def test_each_rank_keeps_about_half_of_the_blocks(ranks):
    first, second = (one["owned"][0] for one in ranks)
    assert min(first, second) > 0.35 * (first + second)
