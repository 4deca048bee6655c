"""Scores and a fraction in, keep masks out."""

from __future__ import annotations

import pytest
import torch

from pruningawaretraining.allocation.ranking import Allocator, Limits
from pruningawaretraining.errors import TargetError
from pruningawaretraining.groups.grouping import Grouping, GroupSet


def sets(*sizes: int, signatures: str = "", width: int = 1) -> Grouping:
    """A grouping without members: allocation only looks at the sets."""
    found, start = [], 0
    for number, size in enumerate(sizes):
        signature = signatures[number] if signatures else str(number)
        found.append(GroupSet(f"layer{number}", start, start + size, width, signature))
        start += size
    return Grouping("channel", (), tuple(found))


def kept(grouping: Grouping, scores: list[float], fraction: float, limits: Limits, scope: str) -> str:
    keep_G = Allocator(grouping, torch.tensor(scores), limits, scope).at(fraction)
    return " ".join("".join("x" if k else "." for k in keep_G[one.start : one.stop].tolist()) for one in grouping.sets)


A = [1.0, 2, 3, 4]
B = [5.0, 6, 7, 8]


@pytest.mark.parametrize(
    ("fraction", "limits", "scope", "expected"),
    [
        (0.0, Limits(), "global", "xxxx xxxx"),
        (0.25, Limits(), "global", "..xx xxxx"),
        (0.5, Limits(), "global", "...x .xxx"),  # one group of a set always stays; the rest is taken elsewhere
        (0.5, Limits(), "local", "..xx ..xx"),
        (0.5, Limits(max_sparsity=0.5), "global", "..xx ..xx"),
        (0.25, Limits(min_sparsity=0.25), "global", ".xxx .xxx"),
        (1.0, Limits(), "global", "...x ...x"),
        (1.0, Limits(max_sparsity=0.5), "local", "..xx ..xx"),
        (0.25, Limits(multiple=4), "global", "xxxx xxxx"),  # 2 kept would round to 0: never below one multiple
        (0.25, Limits(multiple=2), "global", "..xx xxxx"),
        (0.125, Limits(multiple=2), "global", "..xx xxxx"),
        (0.2499, Limits(), "global", ".xxx xxxx"),  # counts are rounded down
        (0.07 * 100 / 56, Limits(), "global", ".xxx xxxx"),  # 0.07 * 100 is 7.000000000000001
    ],
)
def test_kept_groups(fraction: float, limits: Limits, scope: str, expected: str) -> None:
    assert kept(sets(4, 4), A + B, fraction, limits, scope) == expected


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("scope", ["global", "local", "isomorphic"])
def test_counts_are_exact_when_all_scores_are_equal(scope: str, fraction: float) -> None:
    grouping = sets(40, 60, 100, signatures="aab")
    keep_G = Allocator(grouping, torch.ones(200), scope=scope).at(fraction)
    assert int((~keep_G).sum()) == round(fraction * 200)


def test_isomorphic_ranks_within_a_topology() -> None:
    grouping = sets(4, 4, 4, signatures="aba")
    assert kept(grouping, A + A + B, 0.5, Limits(), "isomorphic") == "...x ..xx .xxx"


def test_masks_given_before_stay_and_masks_are_nested() -> None:
    grouping = sets(6, 6)
    scores = torch.rand(12, generator=torch.Generator().manual_seed(0))
    removed = torch.zeros(12, dtype=torch.bool)
    for fraction in (0.2, 0.4, 0.6, 0.8):
        keep_G = Allocator(grouping, torch.rand(12), removed_G=removed).at(fraction)
        assert not bool((keep_G & removed).any())
        removed = ~keep_G
    nested = [Allocator(grouping, scores).at(f) for f in (0.2, 0.5, 0.8)]
    assert all(bool((small <= large).all()) for large, small in zip(nested, nested[1:], strict=False))


def test_multiples_count_channels_not_groups() -> None:
    grouping = sets(8, width=4)  # a group is four channels: a multiple of 8 channels is two groups
    assert kept(grouping, [1.0, 2, 3, 4, 5, 6, 7, 8], 0.375, Limits(multiple=8), "global") == "....xxxx"
    assert kept(grouping, [1.0, 2, 3, 4, 5, 6, 7, 8], 0.375, Limits(multiple=2), "global") == "...xxxxx"


def price(keep_G: torch.Tensor) -> float:
    """Groups cost 1, 2, 3 ... in order."""
    return float((torch.arange(1, len(keep_G) + 1) * keep_G).sum())


def test_cost_targets_give_back_what_fits() -> None:
    grouping = sets(4)
    allocator = Allocator(grouping, torch.tensor([4.0, 1.0, 2.0, 3.0]))  # goes in the order 2, 3, 4, 1
    assert [price(allocator.at(f)) for f in (0, 0.25, 0.5, 0.75)] == [10, 8, 5, 1]
    assert allocator.to_cost(price, 5).tolist() == [True, False, False, True]
    assert allocator.to_cost(price, 4).tolist() == [True, False, True, False]  # 1 is kept, then 3 fits
    assert allocator.to_cost(price, 7.5).tolist() == [True, True, False, True]


def test_an_unreachable_cost_says_what_is_reachable() -> None:
    allocator = Allocator(sets(4), torch.tensor([4.0, 1.0, 2.0, 3.0]), Limits(max_sparsity=0.5))
    with pytest.raises(TargetError, match=r"rule\.target\.macs: 0\.1 of the dense cost .* at least 0\.5000"):
        allocator.to_cost(price, 1.0, key="rule.target.macs")


@pytest.mark.parametrize("scores", [torch.ones(3), torch.tensor([1.0, float("nan"), 1, 1])])
def test_bad_scores_are_refused(scores: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="need 4 numbers without NaN"):
        Allocator(sets(4), scores)


def test_a_cost_that_rises_where_groups_go_is_met_where_it_can_be() -> None:
    allocator = Allocator(sets(8), torch.arange(8.0))

    def uneven(keep_G: torch.Tensor) -> float:
        kept = int(keep_G.sum())
        return float(kept if kept % 4 == 0 else 10 + kept)

    assert uneven(allocator.smallest()) == 11.0
    assert int(allocator.to_uneven_cost(uneven, 5).sum()) == 4
    assert int(allocator.to_uneven_cost(uneven, 9).sum()) == 8
    with pytest.raises(TargetError, match="at least"):
        allocator.to_uneven_cost(uneven, 3)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_scores_do_not_empty_a_set(value: float) -> None:
    """What limits protect stays, also where a criterion puts everything last or first."""
    grouping = sets(4, 4)
    for scores in (torch.full((8,), value), torch.cat([torch.full((4,), value), torch.ones(4)])):
        keep = Allocator(grouping, scores, Limits(max_sparsity=0.75)).at(0.5)
        assert int(keep.sum()) == 4 and int(keep[:4].sum()) >= 1 and int(keep[4:].sum()) >= 1
        assert int(Allocator(grouping, scores).smallest().sum()) == 2


ROUNDED = [(41, 0.5, 20), (43, 0.5, 21), (7, 0.5, 3), (10, 0.29, 2), (10, 0.3, 3)]


@pytest.mark.parametrize(("size", "fraction", "gone"), ROUNDED)
@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_sparsity_is_rounded_down_to_whole_groups(size: int, fraction: float, gone: int, scope: str) -> None:
    found = kept(sets(size), [float(number) for number in range(size)], fraction, Limits(), scope)
    assert found == "." * gone + "x" * (size - gone)
