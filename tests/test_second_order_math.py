"""Second-order algebra against formulas written out: rank-1 updates, brute force, full matrices."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pruningawaretraining.criteria.second_order.fisher import (
    GramFisher,
    LowRankFisher,
    Storage,
    factor,
    joint_update,
    make_fisher,
    parts,
)
from pruningawaretraining.criteria.second_order.greedy import greedy_order, obs_scores, obs_update
from pruningawaretraining.criteria.second_order.methods import lowest_of_each, merge_cumulative, merge_running_max
from pruningawaretraining.criteria.second_order.sweep import Grid, Quota, damped, sweep
from pruningawaretraining.errors import ModelError

EXACT = Storage(dtype=torch.float64)
DAMP = 1e-3


def gradients(blocks: int, count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(blocks, count, width, generator=generator, dtype=torch.float64) @ mixing


def all_alive(blocks: int, width: int) -> Tensor:
    return torch.ones(blocks, width, dtype=torch.bool)


def by_rank_one_updates(rows_MD: Tensor, damp: float) -> Tensor:
    """F^-1 as published: it starts at I / damp, and each gradient updates it (Sherman and Morrison)."""
    count, width = rows_MD.shape
    inverse = torch.eye(width, dtype=torch.float64) / damp
    for row in rows_MD:
        v = inverse @ row
        inverse = inverse - torch.outer(v, v) / (count + row @ v)
    return inverse


@pytest.mark.parametrize(("count", "width"), [(40, 12), (12, 12), (5, 12), (1, 7)])
def test_gram_woodbury_and_rank_one_updates_agree(count, width):
    rows = gradients(3, count, width)
    expected = torch.stack([by_rank_one_updates(one, DAMP) for one in rows])
    gram, low = GramFisher(3, width, DAMP, EXACT), LowRankFisher(3, width, DAMP, count, EXACT)
    for start in range(0, count, 4):  # in chunks, the last one short
        gram.add(rows[:, start : start + 4])
        low.add(rows[:, start : start + 4])
    for fisher in (gram, low):
        actual = fisher.inverses(slice(0, 3), all_alive(3, width))
        assert torch.allclose(actual, expected, rtol=1e-7, atol=1e-7 / DAMP)


def test_masked_weights_are_decoupled():
    rows = gradients(1, 30, 6)
    alive = torch.tensor([[True, True, False, True, False, True]])
    live = rows[0][:, alive[0]]
    expected = torch.linalg.inv(live.T @ live / 30 + DAMP * torch.eye(4))
    for fisher in (GramFisher(1, 6, DAMP, EXACT), LowRankFisher(1, 6, DAMP, 30, EXACT)):
        fisher.add(rows)
        inverse = fisher.inverses(slice(0, 1), alive)[0]
        assert torch.allclose(inverse[alive[0]][:, alive[0]], expected)
        dead = ~alive[0]
        assert torch.equal(inverse[dead][:, dead], torch.eye(2, dtype=torch.float64))
        assert not inverse[dead][:, alive[0]].any()


@pytest.mark.parametrize(("num_grads", "expected"), [(7, LowRankFisher), (8, GramFisher), (9, GramFisher)])
def test_the_smaller_form_is_stored(num_grads, expected):
    assert isinstance(make_fisher(2, 8, DAMP, num_grads), expected)


def test_one_block_as_wide_as_the_weight_is_the_full_fisher():
    rows = gradients(1, 50, 16)
    full = rows[0].T @ rows[0] / 50 + DAMP * torch.eye(16)
    whole, halves = GramFisher(1, 16, DAMP, EXACT), GramFisher(2, 8, DAMP, EXACT)
    whole.add(rows)
    halves.add(rows[0].reshape(50, 2, 8).transpose(0, 1))
    assert torch.allclose(whole.squares(slice(0, 1), all_alive(1, 16))[0], full)
    both = halves.squares(slice(0, 2), all_alive(2, 8))
    assert torch.allclose(both, torch.stack([full[:8, :8], full[8:, 8:]]))


@pytest.mark.parametrize("in_parallel", [1, 2, 5, None])
def test_parts_cover_all_blocks_once(in_parallel):
    covered = [block for part in parts(5, 8, in_parallel) for block in range(part.start, part.stop)]
    assert covered == [0, 1, 2, 3, 4]


def test_a_singular_block_is_dampened_more_and_that_is_said(caplog):
    lower = factor(torch.stack([torch.ones(3, 3), torch.eye(3)]).double() - 1e-9 * torch.eye(3), 1e-12)
    assert torch.isfinite(lower).all()
    assert "not positive definite" in caplog.text


def test_gradients_that_are_not_finite_are_refused():
    with pytest.raises(ModelError, match="not finite"):
        factor(torch.full((1, 2, 2), torch.nan, dtype=torch.float64), DAMP)


# --- OBS and CAP against brute force ----------------------------------------------------------------------------


def quadratic(width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A positive definite matrix and weights."""
    rows = gradients(1, 3 * width, width, seed)[0]
    generator = torch.Generator().manual_seed(seed + 1)
    weights = torch.randn(width, generator=generator, dtype=torch.float64)
    return rows.T @ rows / len(rows) + 0.1 * torch.eye(width), weights


def loss(square: Tensor, change: Tensor) -> float:
    return float(change @ square @ change) / 2


def best_with_zeros(square: Tensor, weights: Tensor, pruned: tuple[int, ...]) -> Tensor:
    """The constrained minimum by its Lagrange conditions, written out with F^-1."""
    inverse, at = torch.linalg.inv(square), list(pruned)
    return weights - inverse[:, at] @ torch.linalg.solve(inverse[at][:, at], weights[at])


@pytest.mark.parametrize("seed", range(4))
def test_obs_score_is_the_loss_of_the_best_weights_without_one(seed):
    square, weights = quadratic(6, seed)
    scores = obs_scores(weights[None], torch.linalg.inv(square)[None])[0]
    expected = [loss(square, best_with_zeros(square, weights, (one,)) - weights) for one in range(6)]
    assert scores.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("group", [2, 3, 4])
def test_block_score_is_the_loss_of_the_best_weights_without_the_block(group):
    square, weights = quadratic(12)
    scores = obs_scores(weights[None], torch.linalg.inv(square)[None], group)[0]
    tiles = [tuple(range(start, start + group)) for start in range(0, 12, group)]
    expected = [loss(square, best_with_zeros(square, weights, tile) - weights) for tile in tiles]
    assert scores.tolist() == pytest.approx(expected)


def test_obs_update_of_one_weight_is_exact_and_of_several_their_sum():
    square, weights = quadratic(5)
    inverse = torch.linalg.inv(square)
    one = obs_update(weights[None], inverse[None], torch.tensor([[False, True, False, False, False]]))[0]
    assert torch.allclose(one, best_with_zeros(square, weights, (1,)), atol=1e-12)
    mask = torch.tensor([True, False, False, True, False])
    both = obs_update(weights[None], inverse[None], mask[None])[0]
    expected = weights - inverse @ torch.where(mask, weights / inverse.diagonal(), 0.0)
    assert torch.allclose(both[~mask], expected[~mask])
    assert both[mask].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("pruned", [(0,), (1, 4), (0, 2, 3), (0, 1, 2, 3, 4)])
def test_joint_update_is_the_constrained_minimum(pruned):
    square, weights = quadratic(5)
    mask = torch.zeros(5, dtype=torch.bool)
    mask[list(pruned)] = True
    actual = joint_update(square[None].clone(), weights[None], mask[None])[0]
    assert torch.allclose(actual, best_with_zeros(square, weights, pruned), atol=1e-10)
    assert not actual[mask].any()


def test_joint_update_is_the_same_in_both_forms_of_the_fisher():
    rows, weights = gradients(2, 5, 9), gradients(2, 1, 9, 3)[:, 0]
    alive = all_alive(2, 9)
    alive[1, 4] = False
    prune = torch.zeros(2, 9, dtype=torch.bool)
    prune[0, :4] = prune[1, 6:] = True
    gram, low = GramFisher(2, 9, DAMP, EXACT), LowRankFisher(2, 9, DAMP, 5, EXACT)
    for fisher in (gram, low):
        fisher.add(rows)
    first, second = (fisher.joint_update(slice(0, 2), weights * alive, prune, alive) for fisher in (gram, low))
    assert torch.allclose(first, second, atol=1e-8)


def published_trace(square: Tensor, weights: Tensor) -> list[tuple[int, float, Tensor]]:
    """CAP as published, one weight at a time: (index, marginal loss, weights after it)."""
    inverse, weights, left, trace = torch.linalg.inv(square), weights.clone(), set(range(len(weights))), []
    while left:
        costs = {one: float(weights[one] ** 2 / inverse[one, one]) / 2 for one in left}
        pick = min(costs, key=lambda one: (costs[one], one))
        column = inverse[:, pick].clone()
        weights = weights - column * weights[pick] / column[pick]
        inverse = inverse - torch.outer(column, column) / column[pick]
        weights[pick] = 0.0
        left.remove(pick)
        trace.append((pick, costs[pick], weights.clone()))
    return trace


@pytest.mark.parametrize("seed", range(4))
def test_greedy_order_and_the_joint_solve_equal_the_published_trace(seed):
    square, weights = quadratic(14, seed)
    trace = published_trace(square, weights)
    order = greedy_order(weights[None].clone(), torch.linalg.inv(square)[None], torch.ones(1, 14, dtype=torch.bool))
    assert order.tiles_BS[0].tolist() == [pick for pick, _, _ in trace]
    assert order.losses_BS[0].tolist() == pytest.approx([cost for _, cost, _ in trace], rel=1e-6, abs=1e-12)
    mask = torch.zeros(14, dtype=torch.bool)
    for pick, _, expected in trace:
        mask[pick] = True
        actual = joint_update(square[None].clone(), weights[None], mask[None])[0]
        assert torch.allclose(actual, expected, atol=1e-7)


def test_greedy_finds_the_best_pair_where_correlation_decides():
    """Two weights that stand in for each other: each alone is free, both together are not."""
    square = torch.tensor([[1.0, 0.999, 0.0], [0.999, 1.0, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    weights = torch.ones(3, dtype=torch.float64)
    inverse = torch.linalg.inv(square)
    alone = torch.argsort(obs_scores(weights[None], inverse[None])[0])[:2].tolist()
    order = greedy_order(weights[None].clone(), inverse[None].clone(), torch.ones(1, 3, dtype=torch.bool))
    together = order.tiles_BS[0, :2].tolist()
    losses = {
        pair: loss(square, best_with_zeros(square, weights, pair) - weights)
        for pair in itertools.combinations(range(3), 2)
    }
    assert sorted(alone) == [0, 1]
    assert losses[tuple(sorted(together))] == pytest.approx(min(losses.values()))  # two of the three pairs are tied
    assert losses[0, 1] > 1.5 * min(losses.values())


@pytest.mark.parametrize(("group", "run", "most"), [(2, 0, 0), (3, 0, 0), (1, 4, 2), (1, 4, 3), (1, 3, 1), (1, 6, 5)])
def test_greedy_losses_add_up_to_the_loss_of_the_joint_solve(group, run, most):
    square, weights = quadratic(12)
    tiles = 12 // group
    order = greedy_order(
        weights[None].clone(), torch.linalg.inv(square)[None], torch.ones(1, tiles, dtype=torch.bool), group, run, most
    )
    mask = torch.zeros(tiles, dtype=torch.bool)
    spent = 0.0
    for tile, cost in zip(order.tiles_BS[0].tolist(), order.losses_BS[0].tolist(), strict=True):
        mask[tile] = True
        spent += cost
        after = joint_update(square[None].clone(), weights[None], mask.repeat_interleave(group)[None])[0]
        assert loss(square, after - weights) == pytest.approx(spent)
    if run:
        assert mask.reshape(-1, run).sum(1).tolist() == [most] * (12 // run)


def test_dead_tiles_go_last_and_cost_infinity():
    square, weights = quadratic(8)
    open_tiles = torch.tensor([[True, False, True, True, False, True, True, True]])
    order = greedy_order(weights[None].clone(), torch.linalg.inv(square)[None], open_tiles)
    assert sorted(order.tiles_BS[0, 6:].tolist()) == [1, 4]
    assert order.losses_BS[0].isinf().tolist() == [False] * 6 + [True] * 2


def test_what_is_masked_already_counts_towards_n_of_m():
    square, weights = quadratic(8)
    open_tiles = torch.tensor([[False, False, True, True, False, True, True, True]])
    order = greedy_order(weights[None].clone(), torch.linalg.inv(square)[None], open_tiles, 1, 4, 2)
    going = order.tiles_BS[0][torch.isfinite(order.losses_BS[0])].tolist()
    assert len(going) == 1 and going[0] in (5, 6, 7)


MERGES = [
    ([1.0, 2.0, 0.5, 3.0], [1.0, 3.0, 3.5, 6.5], [1.0, 2.0, 2.0, 3.0]),
    ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    ([2.0, 1.0, torch.inf], [2.0, 3.0, torch.inf], [2.0, 2.0, torch.inf]),
]


@pytest.mark.parametrize(("losses", "cumulative", "running"), MERGES)
def test_both_merges_never_fall(losses, cumulative, running):
    assert merge_cumulative(torch.tensor([losses]))[0].tolist() == cumulative
    assert merge_running_max(torch.tensor([losses]))[0].tolist() == running


@pytest.mark.parametrize(
    ("scores", "number", "expected"),
    [
        ([3.0, 1.0, 2.0, 4.0], 2, [False, True, True, False]),
        ([1.0, 1.0, 1.0, 1.0], 3, [True, True, True, False]),
        ([-torch.inf, 5.0, 1.0, 0.0], 2, [True, False, False, True]),
    ],
)
def test_lowest_of_each_run(scores, number, expected):
    assert lowest_of_each(torch.tensor(scores), number).tolist() == expected


# --- the column sweep -------------------------------------------------------------------------------------------


def test_the_sweep_leaves_each_row_at_the_optimum_of_what_it_could_still_change():
    """The last column of two: the kept first one takes the error of nothing, the second the error of the first."""
    square = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    matrix = torch.tensor([[0.1, 5.0], [4.0, 0.1]], dtype=torch.float64)
    mask = torch.ones(2, 2, dtype=torch.bool)
    weights, keep = sweep(matrix, square, mask, mask, Grid(), Quota(0.5))
    assert keep.tolist() == [[False, True], [True, False]]
    # Without the first weight the best second one is w_2 + F_21 / F_22 w_1.
    assert weights.tolist() == [[0.0, pytest.approx(5.0 + 0.1 / 3)], [4.0, 0.0]]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.33, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("columns", [7, 130, 300])
def test_the_sweep_prunes_exactly_as_many_as_asked_even_when_all_are_equal(fraction, columns):
    square = damped(torch.eye(columns), 0.01)
    mask = torch.ones(3, columns, dtype=torch.bool)
    weights, keep = sweep(torch.ones(3, columns), square, mask, mask, Grid(), Quota(fraction))
    assert int((~keep).sum()) == int(fraction * 3 * columns + 1e-6)
    assert torch.equal(weights != 0, keep)


@pytest.mark.parametrize(("keep_n", "of"), [(2, 4), (1, 4), (3, 4), (1, 2), (5, 8), (1, 3)])
def test_the_sweep_keeps_n_of_m(keep_n, of):
    rows = gradients(1, 100, 24)[0]
    mask = torch.ones(5, 24, dtype=torch.bool)
    _, keep = sweep(
        gradients(1, 5, 24, 2)[0], damped(rows.T @ rows, 0.01), mask, mask, Grid(1, 1, keep_n, of), Quota(1)
    )
    assert (keep.reshape(5, -1, of).sum(-1) == keep_n).all()


def test_the_sweep_equals_one_exact_removal_after_the_other():
    """Each removal is the optimum over what is right of it: ``- w_j / H_00 H_0`` with H the inverse of F[j:, j:]."""
    rows, expected = gradients(1, 100, 20)[0], gradients(1, 4, 20, 2)[0]
    square = damped(rows.T @ rows, 0.01)
    mask = torch.ones(4, 20, dtype=torch.bool)
    actual, keep = sweep(expected, square, mask, mask, Grid(), Quota(0.6))
    for row, column in itertools.product(range(4), range(20)):
        if not keep[row, column]:
            inverse = torch.linalg.inv(square[column:, column:])
            expected[row, column:] -= expected[row, column] / inverse[0, 0] * inverse[0]
    assert torch.allclose(actual, torch.where(keep, expected, 0.0), atol=1e-9)
