"""Groupers and proximal maps: literal tables, and the two views of a grouper against each other.

Shape suffixes: ``_W`` any weight, ``_G`` groups.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.proximal import (
    AttentionHeadGrouperDim0,
    AttentionHeadGrouperDim1,
    ConvFilterGrouper,
    CoupledGrouper,
    Dim0Grouper,
    Dim1Grouper,
    ElemGrouper,
    Grouper,
    KElementGrouper,
    LayerGrouper,
    PruneOptimizer,
    head_grouping,
)
from pruningawaretraining.proximal.low_rank import thresholds
from pruningawaretraining.proximal.maps import removed_count

GROUPERS: list[tuple[Grouper, tuple[int, ...]]] = [
    (Dim0Grouper(), (6, 4)),
    (Dim0Grouper(), (5,)),
    (Dim0Grouper(), (4, 3, 2, 2)),
    (Dim1Grouper(), (6, 4)),
    (Dim1Grouper(), (4, 3, 2, 2)),
    (ElemGrouper(), (3, 4)),
    (LayerGrouper(), (3, 4, 2)),
    (KElementGrouper(4), (3, 8)),
    (KElementGrouper(4), (3, 10)),
    (KElementGrouper(4), (2, 3, 3, 3)),
    (KElementGrouper(2), (2, 6, 3, 3)),
    (KElementGrouper(3), (7,)),
    (ConvFilterGrouper(), (4, 3, 2, 2)),
    (ConvFilterGrouper(), (4, 3, 5)),
    (AttentionHeadGrouperDim0(2), (8, 6)),
    (AttentionHeadGrouperDim0(2), (24, 8)),
    (AttentionHeadGrouperDim0(4, npack=2), (16, 5)),
    (AttentionHeadGrouperDim1(2), (6, 8)),
    (AttentionHeadGrouperDim1(2, npack=3), (6, 12)),
]

LAYOUTS = ["contiguous", "channels_last", "transposed", "strided"]


def laid_out(weight_W: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channels_last" and weight_W.dim() == 4:
        return weight_W.clone(memory_format=torch.channels_last)
    if layout == "transposed" and weight_W.dim() > 1:
        return weight_W.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([weight_W, weight_W], -1)[..., 0]
    return weight_W.clone()


def after(weight_W: Tensor, gamma: float = 1.0, steps: int = 1, **options: Any) -> Tensor:
    """The weight after a step of size ``gamma`` with zero gradients: the map at threshold lambda * tau * gamma."""
    parameter = nn.Parameter(weight_W)
    groups = [{"params": [parameter], "reg_lambda": 1.0, **options}]
    optimizer = PruneOptimizer(torch.optim.SGD(groups, lr=gamma / steps))
    for _ in range(steps):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("grouper", "shape"), GROUPERS)
def test_blocks_and_labels_say_the_same(grouper: Grouper, shape: tuple[int, ...], layout: str) -> None:
    weight_W = laid_out(torch.randn(shape, generator=torch.Generator().manual_seed(1)), layout)
    grouping = grouper.grouping("weight", weight_W)
    by_labels_G = grouping.reduce([weight_W.square()])
    values_G = torch.zeros(grouper.group_shape(shape))
    covered = 0
    for block in grouper.blocks(weight_W):
        assert block.view.untyped_storage().data_ptr() == weight_W.untyped_storage().data_ptr()
        block.groups_of(values_G).copy_(block.view.square().sum(block.dims) if block.dims else block.view.square())
        covered += block.view.numel()
    assert covered == weight_W.numel()
    assert grouping.size == grouper.n_groups(shape) == values_G.numel()
    torch.testing.assert_close(values_G.flatten(), by_labels_G)
    assert int(grouping.counts().max()) <= grouper.group_size(shape)
    spread = grouping.expand(torch.arange(grouping.size).float())[0][1].expand(shape)
    index_G = torch.arange(grouping.size).float().view(grouper.group_shape(shape))
    found = torch.zeros_like(weight_W)
    for block in grouper.blocks(found):
        block.view.copy_(block.broadcast(index_G).expand(block.view.shape))
    assert torch.equal(found, spread)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{"group_type": "ElemGrouper"}, {"group_type": "KElementGrouper", "k": 1}], ids=str)
def test_single_elements_of_any_precision_are_ranked(options: dict[str, Any], dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.tensor([[3.0, -1.0], [2.0, -4.0]], dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    half = {"prox_type": "MinSparsityConstraint", "min_sparsity": 0.5}
    PruneOptimizer(torch.optim.SGD([{"params": [weight], **options, **half}], lr=0.1)).step()
    assert weight.tolist() == [[3.0, 0.0], [0.0, -4.0]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("grouper", "shape"), GROUPERS)
def test_group_lasso_is_its_formula_for_every_grouper(grouper: Grouper, shape: tuple[int, ...], layout: str) -> None:
    plain_W = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    grouping = grouper.grouping("weight", plain_W)
    norms_G = grouping.reduce([plain_W.double().square()]).sqrt()
    threshold = 0.6 * math.sqrt(grouper.group_size(shape))
    factors_G = (1 - threshold / norms_G).clamp(min=0)
    expected_W = plain_W * grouping.expand(factors_G)[0][1]
    result_W = after(laid_out(plain_W, layout), 0.6, group_type=grouper, prox_type="ProxGroupLasso")
    torch.testing.assert_close(result_W, expected_W.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("grouper", "shape"), GROUPERS)
def test_hard_maps_zero_the_smallest_groups(grouper: Grouper, shape: tuple[int, ...]) -> None:
    plain_W = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    grouping = grouper.grouping("weight", plain_W)
    norms_G = grouping.reduce([plain_W.square()]).sqrt()
    count = math.ceil(0.4 * grouping.size - 1e-6)
    keep_G = torch.ones(grouping.size)
    keep_G[norms_G.argsort()[:count]] = 0
    result_W = after(plain_W.clone(), group_type=grouper, prox_type="MinSparsityConstraint", min_sparsity=0.4)
    assert torch.equal(result_W, plain_W * grouping.expand(keep_G)[0][1])


ROWS = [[3.0, 4.0], [0.0, 0.0], [0.6, 0.8], [-6.0, 8.0]]


@pytest.mark.parametrize(
    ("options", "gamma", "expected"),
    [
        ({"prox_type": "ProxGroupLasso"}, 0.0, ROWS),
        ({"prox_type": "ProxGroupLasso"}, math.sqrt(2), [[1.8, 2.4], [0, 0], [0, 0], [-4.8, 6.4]]),
        ({"prox_type": "ProxGroupLasso", "reg_lambda": 0.5}, math.sqrt(2), [[2.4, 3.2], [0, 0], [0, 0], [-5.4, 7.2]]),
        ({"prox_type": "ProxLasso"}, 1.0, [[2, 3], [0, 0], [0, 0], [-5, 7]]),
        ({"prox_type": "ProxLasso", "group_type": "ElemGrouper"}, 0.7, [[2.3, 3.3], [0, 0], [0, 0.1], [-5.3, 7.3]]),
        ({"prox_type": "ProxGroupLasso", "group_type": "ElemGrouper"}, 1.0, [[2, 3], [0, 0], [0, 0], [-5, 7]]),
        ({"prox_type": "MinSparsityConstraint", "min_sparsity": 0.5}, 1.0, [[3, 4], [0, 0], [0, 0], [-6, 8]]),
        ({"prox_type": "MinSparsityConstraint", "min_sparsity": 0.51}, 1.0, [[0, 0], [0, 0], [0, 0], [-6, 8]]),
        ({"prox_type": "MinSparsityConstraint", "min_sparsity": 0.0}, 1.0, ROWS),
        ({"prox_type": "MinSparsityConstraint", "min_sparsity": 1.0}, 1.0, [[0, 0]] * 4),
        ({"prox_type": "NMSparseConstraint", "n_nonzero": 1}, 1.0, [[0, 4], [0, 0], [0, 0.8], [0, 8]]),
        ({"prox_type": "NMSparseConstraint", "n_nonzero": 0}, 1.0, [[0, 0]] * 4),
        ({"prox_type": "NMSparseConstraint", "n_nonzero": 2}, 1.0, ROWS),
        (
            {"prox_type": "ProxGroupLasso", "gamma_index_slope": 0.5},
            2 * math.sqrt(2),  # thresholds 1, 5/3, 7/3, 3
            [[2.4, 3.2], [0, 0], [0, 0], [-4.2, 5.6]],
        ),
        (
            {"prox_type": "ProxLasso", "gamma_index_slope": 3.0},
            2.0,  # multipliers max(0, -1), 0, 1, 2
            [[3, 4], [0, 0], [0, 0], [-2, 4]],
        ),
    ],
)
def test_maps_by_hand(options: dict[str, Any], gamma: float, expected: list[list[float]]) -> None:
    options = {"group_type": "Dim0Grouper", **options}
    torch.testing.assert_close(after(torch.tensor(ROWS), gamma, **options), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("score", "zeroed"),
    [("l2", [0, 1, 2]), ("rms", [0, 2, 4]), ("param_cost", [0, 2, 4])],
)
def test_the_global_budget_ranks_all_weights_together(score: str, zeroed: list[int]) -> None:
    """Rows 0 and 1 have one element, rows 2 to 5 four, in a weight of their own."""
    small = nn.Parameter(torch.tensor([[0.1], [0.9]]))
    large = nn.Parameter(torch.tensor([[0.5] * 4, [0.8] * 4, [0.6] * 4, [2.0] * 4]))
    options = {"group_type": "Dim0Grouper", "prox_type": "GlobalMinSparsityConstraint", "min_sparsity": 0.5}
    optimizer = PruneOptimizer(
        torch.optim.SGD([{"params": [small, large], "score_type": score, **options}], lr=0.0),
    )
    small.grad, large.grad = torch.zeros_like(small), torch.zeros_like(large)
    optimizer.step()
    rows = torch.cat([small.detach().abs().sum(1), large.detach().abs().sum(1)])
    assert torch.nonzero(rows == 0).flatten().tolist() == zeroed


@pytest.mark.parametrize(
    ("row", "k", "n", "expected"),
    [
        ([1, -4, 3, 2], 4, 2, [0, -4, 3, 0]),
        ([1, 1, 1, 1], 4, 2, [1, 1, 0, 0]),
        ([2, 1, 2, 2], 4, 2, [2, 0, 2, 0]),
        ([0, 0, 0, 0], 4, 2, [0, 0, 0, 0]),
        ([1, 2, 2, 3], 4, 1, [0, 0, 0, 3]),
        ([1, 2, 2, 3], 4, 3, [0, 2, 2, 3]),
        ([1, 5, 2, 4, 3, 9], 4, 2, [0, 5, 0, 4, 3, 9]),
        ([1, 5, 2, 4, 3, 9], 4, 1, [0, 5, 0, 0, 0, 9]),
        ([5, 5, 5, 5, 5, 5, 5, 5, 5, 6], 10, 2, [5, 0, 0, 0, 0, 0, 0, 0, 0, 6]),
    ],
)
def test_n_of_m_by_hand(row: list[float], k: int, n: int, expected: list[float]) -> None:
    options = {"group_type": "KElementGrouper", "k": k, "prox_type": "NMSparseConstraint", "n_nonzero": n}
    assert after(torch.tensor([row], dtype=torch.float32), **options).tolist() == [expected]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("k", "n"), [(4, 2), (4, 1), (8, 4), (16, 5)])
def test_n_of_m_keeps_exactly_n_along_the_input_channels(k: int, n: int, layout: str) -> None:
    generator = torch.Generator().manual_seed(4)
    plain_W = torch.randint(1, 4, (5, 16, 3, 3), generator=generator).float()  # full of ties
    plain_W *= torch.randint(0, 2, plain_W.shape, generator=generator) * 2 - 1
    options = {"group_type": "KElementGrouper", "k": k, "prox_type": "NMSparseConstraint", "n_nonzero": n}
    result_W = after(laid_out(plain_W, layout), **options)
    groups = result_W.unflatten(1, (16 // k, k))
    assert bool(((groups != 0).sum(2) == n).all())
    kept, gone = groups.abs().where(groups != 0, 9).amin(2), plain_W.unflatten(1, (16 // k, k)).abs()
    assert bool((gone.where(groups == 0, 0).amax(2) <= kept).all())


@pytest.mark.parametrize(
    ("fraction", "groups", "count"),
    [(0.07, 100, 7), (0.29, 100, 29), (0.57, 100, 57), (0.1, 3, 1), (0.0, 5, 0), (1.0, 5, 5), (0.5, 5, 3)],
)
def test_counts_are_free_of_float_error(fraction: float, groups: int, count: int) -> None:
    assert removed_count(fraction, groups) == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"prox_type": "ProxGroupLasso"},
        {"prox_type": "ProxLasso"},
        {"prox_type": "NMSparseConstraint", "group_type": "KElementGrouper", "k": 4, "n_nonzero": 2},
        {"prox_type": "MinSparsityConstraint", "min_sparsity": 0.5},
        {"prox_type": "ProxNuclearNorm", "group_type": "SVDGrouper"},
    ],
)
def test_other_precisions_round_only_the_result(dtype: torch.dtype, options: dict[str, Any]) -> None:
    options = {"group_type": "Dim0Grouper", **options}
    plain_W = torch.randn(8, 16, generator=torch.Generator().manual_seed(5)).to(dtype)
    exact = after(plain_W.double().clone(), 0.4, **options)
    result = after(plain_W.clone(), 0.4, **options)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-5)


# Singular values


@pytest.mark.parametrize(
    ("slope", "expected"),
    [(0.5, [0.25, 5 / 12, 7 / 12, 0.75]), (1.0, [0.0, 1 / 3, 2 / 3, 1.0]), (3.0, [0.0, 0.0, 1.0, 2.0])],
)
def test_the_spread_of_thresholds_is_that_of_torchao(slope: float, expected: list[float]) -> None:
    assert thresholds(slope, 4, torch.zeros(1)).tolist() == pytest.approx(expected, abs=1e-6)


def low_rank(rows: int, columns: int, values: list[float]) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator))[0]
    return (left * torch.tensor(values)) @ right.T


@pytest.mark.parametrize(
    ("options", "gamma", "expected"),
    [
        ({"prox_type": "ProxNuclearNorm"}, 1.5, [2.5, 1.5, 0, 0]),
        ({"prox_type": "ProxNuclearNorm", "gamma_index_slope": 1.0}, 3.0, [4, 2, 0, 0]),  # thresholds 0, 1, 2, 3
        ({"prox_type": "MinRankConstraint", "min_sparsity": 0.5}, 1.5, [4, 3, 0, 0]),
        ({"prox_type": "MinRankConstraint", "min_sparsity": 0.6}, 1.5, [4, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (6, 4, 1, 1), (4, 2, 3)])
def test_singular_values_by_hand(
    options: dict[str, Any], gamma: float, expected: list[float], shape: tuple[int, ...]
) -> None:
    weight_W = low_rank(shape[0], math.prod(shape[1:]), [4.0, 3.0, 1.5, 1.0]).view(shape)
    result = after(weight_W, gamma, group_type="SVDGrouper", **options)
    found = torch.linalg.svdvals(result.flatten(1))[:4]
    torch.testing.assert_close(found.sort().values, torch.tensor(expected).float().sort().values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pack_dim", [0, 1])
def test_packed_matrices_are_cut_one_by_one(pack_dim: int) -> None:
    packs = [low_rank(4, 4, [4.0, 3.0, 1.0, 0.5]), low_rank(4, 4, [8.0, 6.0, 2.0, 0.5])]
    options = {"group_type": "PackedSVDGrouper", "npack": 2, "pack_dim": pack_dim, "prox_type": "ProxNuclearNorm"}
    result = after(torch.cat(packs, pack_dim), 1.0, **options)
    for pack, values in zip(result.chunk(2, pack_dim), ([3, 2, 0, 0], [7, 5, 1, 0]), strict=True):
        torch.testing.assert_close(torch.linalg.svdvals(pack), torch.tensor(values).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("healing", [None, 2])
@pytest.mark.parametrize(
    "prox", [{"prox_type": "MinRankConstraint", "min_sparsity": 0.5}, {"prox_type": "ProxNuclearNorm"}]
)
def test_factors_are_the_weight(prox: dict[str, Any], healing: int | None) -> None:
    weight = nn.Parameter(low_rank(8, 6, [6.0, 5.0, 4.0, 0.3, 0.2, 0.1]).bfloat16().float())
    groups = [{"params": [weight], "group_type": "SVDGrouper", "reg_lambda": 1.0, **prox}]
    optimizer = PruneOptimizer(torch.optim.SGD(groups, lr=0.25), healing_start_step=healing)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        weight.grad = 0.01 * torch.randn(weight.shape, generator=generator)
        optimizer.step()
        if step >= 1:
            (factors,) = optimizer.low_rank_factors(weight)
            assert factors.rank == 3
            torch.testing.assert_close(factors.matrix, weight.detach(), rtol=1e-4, atol=1e-5)
    assert factors.size == 3 * (8 + 6)
    assert optimizer.relative_factored_frac == pytest.approx(3 * 14 / 48)
    assert optimizer.relative_sparsity == pytest.approx(1 - 3 * 14 / 48)


def test_factors_of_another_weight_are_refused() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    groups = [{"params": [weight], "group_type": "Dim0Grouper", "prox_type": "ProxGroupLasso"}]
    with pytest.raises(ConfigError, match="no param group with an SVD grouper"):
        PruneOptimizer(torch.optim.SGD(groups, lr=0.1)).low_rank_factors(weight)


# Heads


def coupled_heads(grouping: Grouping, params: list[nn.Parameter]) -> PruneOptimizer:
    options = {"group_type": CoupledGrouper(grouping), "prox_type": "MinSparsityConstraint", "min_sparsity": 0.5}
    return PruneOptimizer(torch.optim.SGD([{"params": params, **options}], lr=0.1))


@pytest.mark.parametrize(("kv_heads", "packed"), [(4, False), (2, False), (4, True), (2, True)])
def test_heads_are_coupled_over_query_key_value_and_output(kv_heads: int, packed: bool) -> None:
    """Heads of 3; each group's rows carry the number of the group, so the smallest groups are the first."""
    per_group = torch.tensor([4.0, 1.0, 3.0, 2.0])[:kv_heads]
    shared = per_group.repeat_interleave(3)
    query = per_group.repeat_interleave(12 // kv_heads)
    rows = {"q": query, "k": shared, "v": shared}
    if packed:
        rows = {"qkv": torch.cat([query, shared, shared])}
    params = {name: nn.Parameter(values.unsqueeze(1).repeat(1, 5)) for name, values in rows.items()}
    params["bias"] = nn.Parameter(torch.cat([query, shared, shared]) if packed else shared)
    out = nn.Parameter(query.repeat(5, 1))
    given = {"out": out}
    grouping = head_grouping(params, given, 4, kv_heads, packed=("qkv", "bias") if packed else ())
    everything = [*params.values(), out]
    optimizer = coupled_heads(grouping, everything)
    for parameter in everything:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = per_group > per_group.median()
    for name, values in rows.items():
        alive = torch.isin(values, per_group[kept])
        assert torch.equal(params[name].detach()[:, 0] != 0, alive)
    assert torch.equal(out.detach()[0] != 0, torch.isin(query, per_group[kept]))


@pytest.mark.parametrize(
    ("rows", "columns", "heads", "kv", "message"),
    [
        ((12, 5), (5, 12), 4, 3, "num_kv_heads"),
        ((11, 5), (5, 12), 4, None, "11 rows"),
        ((12, 5), (5, 13), 4, None, "columns"),
    ],
)
def test_weights_that_fit_no_heads_are_refused(
    rows: tuple[int, int], columns: tuple[int, int], heads: int, kv: int | None, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        head_grouping({"q": torch.zeros(rows)}, {"o": torch.zeros(columns)}, heads, kv)
