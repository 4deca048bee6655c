"""Peak memory and equal widths where channels, heads and residual blocks compete: exact costs, and law 4."""

from __future__ import annotations

import pytest
import torch
from test_structures import NETS, decided, groups_of, made, random_scores, some_masks
from torch import Tensor

from pruningawaretraining.allocation.uniform import kind_of, kinds_of
from pruningawaretraining.costs.memory import MemoryCost, peak_activation_bytes
from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.masks.pruned_copy import pruned_copy
from pruningawaretraining.patterns.structures import is_block


def memory_of(coupled: CoupledGroups) -> MemoryCost:
    cost = coupled.targets._cost("peak_memory")
    assert isinstance(cost, MemoryCost)
    return cost


def with_more(coupled: CoupledGroups, keep_D: Tensor, number: int) -> Tensor:
    """The masks with a block and all that is in it."""
    more_D, sets = keep_D.clone(), coupled.dense_sets
    inner = [n for n, block in coupled.rules[0].inside.items() if block == number]
    for one in (sets[n] for n in (number, *inner)):
        more_D[one.start : one.stop] = True
    return more_D


@pytest.mark.parametrize("net", NETS)
def test_peak_memory_is_that_of_the_removed_model(net: str) -> None:
    """Blocks that are out take their moments along, and what the others hold is exact at any widths."""
    coupled = groups_of(net, target={"peak_memory": 0.95})
    cost, x, blocks = memory_of(coupled), made(net)[1], 0
    for seed in range(4):
        keep_D = some_masks(coupled, seed)
        blocks += sum(is_block(one) and not keep_D[one.start] for one in coupled.dense_sets)
        copied = pruned_copy(coupled.model, coupled.found, keep_D)
        assert cost(keep_D) == peak_activation_bytes(copied, x)
    assert blocks > 1


@pytest.mark.parametrize("net", NETS)
def test_what_a_group_adds_to_the_peak_is_exact(net: str) -> None:
    coupled = groups_of(net, target={"peak_memory": 0.95})
    cost, looked = memory_of(coupled), 0
    keep_D = some_masks(coupled, 1)
    more_D = cost.marginal_G(keep_D)
    for group in torch.nonzero(~keep_D).flatten().tolist():
        assert float(more_D[group]) == cost(keep_D.index_fill(0, torch.tensor([group]), True)) - cost(keep_D)
        looked += float(more_D[group]) > 0
    assert looked and not more_D[keep_D].any()


@pytest.mark.parametrize(("net", "fraction"), [("one stage", 0.8), ("two stages", 0.7), ("heads", 0.9)])
def test_a_memory_target_is_met_and_nothing_can_be_given_back(net: str, fraction: float) -> None:
    coupled, looked = groups_of(net, target={"peak_memory": 0.95}), 0
    cost, inside = memory_of(coupled), coupled.rules[0].inside
    for seed in range(3):
        keep_D = decided(coupled, random_scores(coupled, seed), peak_memory=fraction)
        assert cost(keep_D) <= fraction * cost.dense
        for number, one in enumerate(coupled.dense_sets):
            if number in inside and not keep_D[coupled.dense_sets[inside[number]].start]:
                continue
            for group in (torch.nonzero(~keep_D[one.start : one.stop]).flatten() + one.start).tolist():
                more_D = with_more(coupled, keep_D, number) if is_block(one) else keep_D.index_fill(0, _at(group), True)
                assert cost(more_D) > fraction * cost.dense, one.name
                looked += 1
    assert looked > 1


def _at(group: int) -> Tensor:
    return torch.tensor([group])


ALL = ["channel", "head", "depth"]


@pytest.mark.parametrize(
    ("net", "pattern", "fraction"),
    [("heads", "channel", 0.9), ("two stages", "channel", 0.6), ("heads", ALL, 0.6), ("two stages", ALL, 0.6)],
)
def test_equal_widths_meet_a_target_and_no_kind_can_be_wider(net: str, pattern: object, fraction: float) -> None:
    """Law 4 within the constraint: one more group in every layer of a kind exceeds the budget."""
    rule = {"pattern": pattern, "widths": "uniform", **({} if isinstance(pattern, list) else {"criterion": "taylor"})}
    coupled, blocks = groups_of(net, **rule), 0
    linear, grouping = coupled.macs_cost, coupled.found.grouping
    for seed in range(3):
        keep_D = decided(coupled, random_scores(coupled, seed), macs=fraction)
        assert linear(keep_D) <= fraction * linear.dense
        widths: dict[object, set[int]] = {}
        for one in grouping.sets:
            kept = int(keep_D[one.start : one.stop].sum())
            if is_block(one):
                blocks += not kept
            elif kept:
                widths.setdefault(kind_of(one), set()).add(kept)
        assert all(len(found) == 1 for found in widths.values())
        for kind in kinds_of(grouping, keep_D):
            more = [
                one.start + int((~keep_D[one.start : one.stop]).int().argmax())
                for one in map(grouping.sets.__getitem__, kind)
            ]
            if any(bool(keep_D[group]) for group in more):
                continue  # a set of it is whole
            assert linear(keep_D.index_fill(0, torch.tensor(more), True)) > fraction * linear.dense
    assert blocks or not isinstance(pattern, list)
