"""Blocks shared over two ranks: each keeps about half, both decide the same, and the same as one rank alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from second_order_fixture import batches, cross_entropy, rule, small_net

from pruningawaretraining.session.one_shot import one_shot

TESTS = Path(__file__).parent
CRITERIA = {
    "cap": {"type": "cap", "num_grads": 32, "micro_batch": 1, "damp": 1e-3, "fisher_block_size": 24},
    "few gradients": {"type": "obs", "num_grads": 16, "micro_batch": 2, "damp": 1e-3, "fisher_block_size": 24},
    "streamed": {"type": "cap", "num_grads": 32, "micro_batch": 1, "damp": 1e-3, "max_memory": 40_000},
    "fast_cap": {"type": "fast_cap", "num_grads": 32, "micro_batch": 1},
    "sparse_gpt": {"type": "sparse_gpt", "num_grads": 8},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    script = [str(TESTS / "second_order_ranks.py"), str(folder), json.dumps(CRITERIA)]
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


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
