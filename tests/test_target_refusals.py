"""Targets and allocations that do not go together, or not with a sharded model, are refused by name."""

from __future__ import annotations

import pytest
import torch
from test_latency_target import INPUT, MadeUp, Net, made_up, own_cache

from pruningawaretraining import Pruning
from pruningawaretraining.errors import ConfigError

__all__ = ["made_up", "own_cache"]


def test_sharded_models_have_no_latency(made_up: MadeUp) -> None:
    pruner = Pruning(Net(), {"rules": [{"target": {"latency": 0.8}}]}, example_inputs=INPUT)
    with pytest.raises(ConfigError, match=r"rules\[0\].target.latency: 0.8 is measured on copies .* fully_shard"):
        pruner.channel_pruner.rebind(None)


def test_allocations_with_a_sparsity_alone() -> None:
    torch.manual_seed(0)
    uniform = Pruning(Net(), {"rules": [{"target": {"sparsity": 0.5}, "allocation": "uniform"}]}, example_inputs=INPUT)
    uniform.prune(None, 0)
    assert [[row["size"], row["kept"]] for row in uniform.describe_sets()] == [[32, 16], [48, 24], [64, 32]]
    for name in ("macs", "parameters", "latency"):
        with pytest.raises(
            ConfigError, match=rf"rules\[0\].allocation: '{name}' weighs .* Allowed with it: ranking, unif"
        ):
            Pruning(Net(), {"rules": [{"target": {"sparsity": 0.5}, "allocation": name}]}, example_inputs=INPUT)
