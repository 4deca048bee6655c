"""Costs of experts beside channels and heads: exact where they share weights."""

from __future__ import annotations

from typing import Any

import moe
import pytest
import torch
from moe import LooseBlock, MoeBlock
from torch import nn

from pruningawaretraining import Pruning, count_macs
from pruningawaretraining.costs.macs import macs_per_layer
from pruningawaretraining.costs.weighted import weighted
from pruningawaretraining.engine.latency_target import _anchors
from pruningawaretraining.masks.pruned_copy import pruned_copy

RULES: list[dict[str, Any]] = [
    {"pattern": "expert", "target": {"parameters": 0.9}},
    {"pattern": "channel", "target": {"macs": 0.9}},
]


@pytest.mark.parametrize("kind", [MoeBlock, LooseBlock])
def test_costs_of_experts_and_of_the_channels_that_they_read_are_those_of_the_removed_model(
    kind: type[nn.Module],
) -> None:
    """The stacked weights and the router lose experts in one dimension and channels in another."""
    model, x = moe.built(kind)
    coupled = Pruning(model, {"rules": RULES}, example_inputs=x).engine.coupled
    assert coupled is not None
    found = coupled.found
    assert [(one.name, one.size, one.least) for one in found.grouping.sets] == [
        ("embed", 6, 1), ("blocks.0", 8, 2), ("blocks.1", 8, 2)
    ]  # fmt: skip
    for seed in range(4):
        keep_D = torch.rand(found.grouping.size, generator=torch.Generator().manual_seed(seed)) > 0.4
        for one in found.grouping.sets:
            keep_D[one.start : one.start + one.least] = True
        removed = pruned_copy(model, found, keep_D)
        assert coupled.parameters_cost(keep_D) == sum(one.numel() for one in removed.parameters())
        assert coupled.macs_cost(keep_D) == count_macs(removed, x)
        for linear in (coupled.parameters_cost, coupled.macs_cost):
            for group in torch.nonzero(keep_D).flatten().tolist():
                less_D = keep_D.index_fill(0, torch.tensor([group]), False)
                assert float(linear.saving_G(keep_D)[group]) == pytest.approx(linear(keep_D) - linear(less_D))


def test_copies_that_are_measured_keep_as_many_experts_as_a_token_takes() -> None:
    model, x = moe.built(experts=3)
    rules = [RULES[0], {**RULES[1], "target": {"peak_memory": 0.9}}]
    coupled = Pruning(model, {"rules": rules}, example_inputs=x).engine.coupled
    assert coupled is not None
    sets = [one for one in coupled.dense_sets if one.name.startswith("blocks")]
    kept = {int(keep_D[one.start : one.stop].sum()) for keep_D in _anchors(coupled.found) for one in sets}
    assert kept == {2, 3}


def test_a_list_of_layers_has_no_macs_of_its_own() -> None:
    """Costs are asked about what computes: a list is never called, and what it holds is not of the module around it."""
    model, x = moe.built()
    per_layer = macs_per_layer(model, x)
    seen: dict[str, float] = {}

    def cost(name: str, module: nn.Module, macs: float) -> float:
        seen[name] = macs
        return 2 * macs

    costs = weighted(model, per_layer, cost)
    assert "blocks" not in seen and "" not in seen and all(macs >= 0 for macs in seen.values())
    assert costs[""] == 2 * count_macs(model, x) and costs["blocks.0"] == 2 * per_layer["blocks.0"]
