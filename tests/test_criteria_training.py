"""Criteria that learn from training, on weights and gradients small enough to compute by hand."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining.criteria.base import Statistics, collector_of
from pruningawaretraining.criteria.geometric import geometric_median
from pruningawaretraining.criteria.input_moments import ActivationCollector, Moments, along_inputs
from pruningawaretraining.criteria.retrain_free import RetrainFree, rearrange
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.patterns.block import Block, Unstructured
from pruningawaretraining.patterns.channel import Channel
from pruningawaretraining.registry import build

WEIGHT = [[1.0, -2.0], [3.0, 4.0]]
GRADIENTS = [[[1.0, 1.0], [-2.0, 0.5]], [[-1.0, 2.0], [1.0, -0.5]]]  # of two steps


def model_of(weight: list[list[float]]) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(len(weight[0]), len(weight), bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(weight))
    return model


def scores_after(criterion: Any, pattern: str, gradients: Any = GRADIENTS, scale: float = 1.0) -> list[float]:
    model = model_of(WEIGHT)
    grouping, built = build("pattern", pattern).build(model), build("criterion", criterion)
    collector = collector_of(built)
    assert collector is not None
    for gradient in gradients:
        model[0].weight.grad = torch.tensor(gradient) * scale
        collector.on_before_step(grouping, scale)
    scores: list[float] = built.score(grouping, Statistics(tensors=collector.tensors())).tolist()
    return scores


# |w g| of the two steps: [[1, 2], [6, 2]] and [[1, 4], [3, 2]]; w g: [[1, -2], [-6, 2]] and [[-1, -4], [3, -2]]
ELEMENT_SCORES = {
    "gradient": [1, 2, 1, 0.5],
    "snip": [1, 4, 3, 2],
    "snip_momentum": [1.9, 5.8, 8.4, 3.8],
    "movement": [0, 6, 3, 0],
    "taylor": [1.9, 5.8, 8.4, 3.8],
    "taylor_squared": [1.9, 0.9 * 4 + 16, 0.9 * 36 + 9, 0.9 * 4 + 4],
    "block_mask": [1.9, 5.8, 8.4, 3.8],
    "retrain_free": [2, 20, 45, 8],
}
BLOCK_SCORES = {  # of 2x1: columns
    "gradient": [1, 1.25],
    "snip": [2, 3],
    "snip_momentum": [0.9 * 3.5 + 2, 0.9 * 2 + 3],
    "movement": [1.5, 3],
    "taylor": [0.9 * 5 + 2, 0.9 * 0 + 6],
    "taylor_squared": [0.9 * 25 + 4, 36],
    "block_mask": [0.9 * 5 + 2, 6],
    "retrain_free": [25 + 4, 36],
}
REDUCED = [
    ({"type": "snip", "reduction": "sum"}, [4, 6]),
    ({"type": "snip", "reduction": "max"}, [3, 4]),
    ({"type": "snip_momentum", "reduction": "max"}, [8.4, 5.8]),  # the largest of moving scores, not the reverse
    ({"type": "snip_momentum", "momentum": 0.5}, [0.5 * 3.5 + 2, 0.5 * 2 + 3]),
    ({"type": "taylor", "reduction": "mean"}, [0.9 * 2.5 + 1, 3]),
]


@pytest.mark.parametrize("name", ELEMENT_SCORES)
def test_scores_of_single_weights(name: str) -> None:
    assert scores_after(name, "1x1") == pytest.approx(ELEMENT_SCORES[name])


@pytest.mark.parametrize("name", BLOCK_SCORES)
def test_scores_of_blocks(name: str) -> None:
    assert scores_after(name, "2x1") == pytest.approx(BLOCK_SCORES[name])


@pytest.mark.parametrize(("criterion", "expected"), REDUCED)
def test_reductions(criterion: Any, expected: list[float]) -> None:
    assert scores_after(criterion, "2x1") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2, 3]),
        ({"reduction": "sum"}, [4, 6]),
        ({"reduction": "max"}, [3, 4]),
        ({"p": 2}, [5, 10]),
        ({"half": True}, [2, 3]),
    ],
)
def test_weight(options: dict[str, Any], expected: list[float]) -> None:
    grouping = Block(2, 1).build(model_of(WEIGHT))
    scores = build("criterion", {"type": "weight", **options}).score(grouping, Statistics())
    assert scores.tolist() == expected
    assert scores.dtype == (torch.bfloat16 if "half" in options else torch.float32)


def test_the_mean_of_a_padded_block_is_over_what_is_there() -> None:
    grouping = Block(2, 1).build(model_of([[1.0], [3.0], [5.0]]))
    assert build("criterion", "weight").score(grouping, Statistics()).tolist() == [2, 5]


@pytest.mark.parametrize("name", ELEMENT_SCORES)
def test_a_loss_scale_makes_no_difference(name: str) -> None:
    assert scores_after(name, "1x1", scale=1024.0) == pytest.approx(ELEMENT_SCORES[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ELEMENT_SCORES)
def test_a_step_that_is_not_finite_leaves_no_trace(name: str, bad: float) -> None:
    broken = [GRADIENTS[0], [[bad, 0.0], [0.0, 0.0]], GRADIENTS[1]]
    assert scores_after(name, "1x1", broken) == pytest.approx(ELEMENT_SCORES[name])


def test_half_precision_scores_keep_their_range() -> None:
    tiny = [[[1e-9, 2e-9], [-1e-9, 3e-9]]]
    scores = scores_after({"type": "snip_momentum", "half": True}, "1x1", tiny)
    assert scores == pytest.approx([1e-9, 4e-9, 3e-9, 12e-9], rel=0.01)


def test_a_frozen_layer_is_pruned_last_and_raises_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    for name in ("snip", "snip_momentum", "taylor", "movement"):
        criterion, grouping = build("criterion", name), Unstructured().build(model)
        collector = collector_of(criterion)
        assert collector is not None
        model(torch.ones(1, 2)).sum().backward()
        collector.on_before_step(grouping)
        scores = criterion.score(grouping, Statistics(tensors=collector.tensors()))
        assert torch.isfinite(scores).tolist() == [True] * 4 + [False] * 4


def test_before_the_first_gradient_weights_are_ranked_by_size(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pruningawaretraining"):
        assert scores_after("snip_momentum", "1x1", []) == [1, 2, 3, 4]
    assert "no gradient has been seen yet" in caplog.text


def test_channels_score_by_their_coupled_weights() -> None:
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        model[2].weight.copy_(torch.tensor([[3.0, 4.0]]))
    grouping = Channel().build(model, torch.ones(1, 1)).grouping
    model(torch.ones(1, 1)).sum().backward()  # gradients [[3], [4]] and [[1, 2]]
    for name, expected in {"snip": [3, 8], "taylor": [6, 16], "movement": [-3, -8], "gradient": [2, 3]}.items():
        criterion = build("criterion", name)
        collector = collector_of(criterion)
        assert collector is not None
        collector.on_before_step(grouping)
        scores = criterion.score(grouping, Statistics(tensors=collector.tensors()))
        assert scores.tolist() == pytest.approx(expected), name


@pytest.mark.parametrize("criterion", [*ELEMENT_SCORES, {"type": "snip", "reduction": "max"}], ids=str)
def test_a_collector_goes_on_from_its_state(criterion: Any) -> None:
    model = model_of(WEIGHT)
    grouping, built = Unstructured().build(model), build("criterion", criterion)
    first, second = collector_of(built), collector_of(built)
    assert first is not None
    assert second is not None
    for step, gradient in enumerate([*GRADIENTS, GRADIENTS[0]]):
        model[0].weight.grad = torch.tensor(gradient)
        first.on_before_step(grouping)
        if step == 1:
            second.load_state_dict(first.state_dict())
    second.on_before_step(grouping)
    wanted, got = (built.score(grouping, Statistics(tensors=one.tensors())) for one in (first, second))
    assert torch.equal(wanted, got)
    with pytest.raises(CheckpointError, match="fit"):
        other = model_of([[1.0]])
        fresh = collector_of(built)
        assert fresh is not None
        other[0].weight.grad = torch.ones(1, 1)
        fresh.on_before_step(Unstructured().build(other))
        fresh.load_state_dict(first.state_dict())


# --- retrain-free: rearrangement ------------------------------------------------------------------

REARRANGED = [
    # gradients by group and batch, how many go, who stays
    ([[1.0, 0.0], [-1.1, 0.0], [0.0, 0.5]], 1, [1, 1, 0]),  # one: the least square
    ([[1.0, 0.0], [-1.1, 0.0], [0.0, 0.5]], 2, [0, 0, 1]),  # two: those that cancel out
    ([[1.0, 0.0], [1.1, 0.0], [0.0, 0.5]], 2, [0, 1, 0]),
    ([[1.0], [2.0], [-2.0], [0.5]], 2, [0, 1, 0, 1]),  # 1 - 2 leaves less than 0.5 - 2 or 0.5 + 1
    ([[1.0], [2.0]], 2, [0, 0]),
    ([[1.0], [2.0]], 0, [1, 1]),
]


@pytest.mark.parametrize(("gradients", "count", "expected"), REARRANGED)
def test_rearrangement(gradients: Any, count: int, expected: list[int]) -> None:
    by_group = torch.tensor(gradients)
    keep = torch.ones(len(by_group), dtype=torch.bool)
    keep[by_group.square().sum(1).argsort(stable=True)[:count]] = False
    assert rearrange(keep, by_group.T).int().tolist() == expected


def plain_rearrangement(keep: Tensor, by_group: Tensor) -> Tensor:
    """The same with the definition written out."""
    order = by_group.square().sum(1).argsort(stable=True).tolist()
    count = int((~keep).sum())
    going = order[:count]
    for candidate in order[count:]:
        going = [*going, candidate]
        rest = [by_group[[one for one in going if one != left]].sum(0).square().sum() for left in going]
        del going[int(torch.stack(rest).argmin())]
    out = torch.ones_like(keep)
    out[going] = False
    return out


def test_rearrangement_is_the_definition_and_lowers_the_summed_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 5, 11):
        by_group = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        keep = torch.ones(16, dtype=torch.bool)
        keep[by_group.square().sum(1).argsort()[:count]] = False
        found = rearrange(keep, by_group.T)
        assert torch.equal(found, plain_rearrangement(keep, by_group))
        assert int((~found).sum()) == count
        assert by_group[~found].sum(0).norm() <= by_group[~keep].sum(0).norm()


def test_rearrangement_leaves_what_was_masked_before() -> None:
    by_group = torch.tensor([[1.0], [2.0], [-2.0], [0.4]])
    keep, before = torch.tensor([False, True, True, False]), torch.tensor([True, True, True, False])
    assert rearrange(keep, by_group.T).tolist() == [False, True, False, True]  # 1 - 2 leaves least
    assert rearrange(keep, by_group.T, before).tolist() == [False, True, True, False]  # 0.4 goes: with 1, not -2
    generator = torch.Generator().manual_seed(1)
    for count in (3, 5, 11):
        by_group = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        gone = torch.randperm(16, generator=generator)[:3]
        before = torch.ones(16, dtype=torch.bool).index_fill(0, gone, False)
        order = torch.where(before, by_group.square().sum(1), -1.0).argsort()
        keep = torch.ones(16, dtype=torch.bool).index_fill(0, order[:count], False)
        found = rearrange(keep, by_group.T, before)
        assert not bool(found[gone].any()) and int((~found).sum()) == count
        assert by_group[~found].sum(0).norm() <= by_group[~keep].sum(0).norm()


def test_retrain_free_rearranges_within_layers_and_remembers_the_last_gradients() -> None:
    criterion = RetrainFree(samples=2)
    model = model_of([[1.0], [1.0], [1.0]])
    grouping, collector = Unstructured().build(model), criterion.collector()
    for gradient in ([9.0, 9.0, 9.0], [1.0, -1.1, 0.0], [0.0, 0.0, 0.5]):
        model[0].weight.grad = torch.tensor(gradient).view(3, 1)
        collector.on_before_step(grouping)
    statistics = Statistics(tensors=collector.tensors())
    assert criterion.score(grouping, statistics).tolist() == pytest.approx([82.0, 82.21, 81.25])
    keep = torch.tensor([False, True, False])
    assert criterion.refine(grouping, keep, statistics).int().tolist() == [0, 0, 1]


# --- activations ----------------------------------------------------------------------------------


def seen(model: nn.Module, grouping: Any, criterion: Any, *batches: Tensor) -> Tensor:
    collector = collector_of(criterion)
    assert collector is not None
    collector.attach(model, grouping)
    for batch in batches:
        model(batch)
    scores: Tensor = criterion.score(grouping, Statistics(tensors=collector.tensors()))
    collector.detach()
    return scores


INPUTS = torch.tensor([[3.0, 1.0], [4.0, 0.0]])  # norms 5 and 1


def test_wanda_multiplies_with_the_norm_of_the_inputs() -> None:
    model = model_of(WEIGHT)
    grouping = Unstructured().build(model)
    plain = build("criterion", {"type": "wanda", "by_row": False})
    assert seen(model, grouping, plain, INPUTS).tolist() == pytest.approx([5, 2, 15, 4])
    assert seen(model, grouping, plain, INPUTS[:1], INPUTS[1:]).tolist() == pytest.approx([5, 2, 15, 4])
    assert seen(model, grouping, build("criterion", "wanda"), INPUTS).tolist() == [0.5, 0, 0.5, 0]


def test_wanda_of_convolutions_and_groups() -> None:
    conv = nn.Conv2d(4, 4, 1, groups=2, bias=False)
    model = nn.Sequential(conv)
    with torch.no_grad():
        conv.weight.fill_(1.0)
    inputs = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    scores = seen(model, Unstructured().build(model), build("criterion", {"type": "wanda", "by_row": False}), inputs)
    assert scores.view(4, 2).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    transposed = nn.ConvTranspose2d(4, 2, 1)
    assert along_inputs(transposed, torch.arange(4.0)).shape == (4, 1, 1, 1)


def chain() -> tuple[nn.Sequential, Any]:
    """linear (2 channels) -> relu -> linear; the inputs below give activations [0, 2] and [2, 2]."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0], [0.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 2.0]))
        model[2].weight.copy_(torch.tensor([[3.0, 1.0], [4.0, 1.0]]))
    return model, Channel().build(model, torch.ones(1, 1)).grouping


ACTIVE = torch.tensor([[-1.0], [1.0]])  # after the ReLU: channel 0 has 0 and 2 (variance 1), channel 1 has 2 and 2


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("variance", [1.0, 0.0]),
        ("VBP", [1.0, 0.0]),
        ("variance_next", [5.0, 0.0]),
        ("variance_magnitude", [(4 + 25) / 2, 0.0]),
    ],
)
def test_variance_is_measured_where_the_consumers_read(criterion: str, expected: list[float]) -> None:
    model, grouping = chain()
    assert seen(model, grouping, build("criterion", criterion), ACTIVE).tolist() == pytest.approx(expected)


def test_moments_of_batches_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100, 3, generator=generator) * torch.tensor([1.0, 5.0, 0.1]) + 1000.0
    moments = Moments(torch.zeros(()), torch.zeros(3), torch.zeros(3))
    for batch in values.split(7):
        moments.add(batch, 1.0)
    assert torch.allclose(moments.mean_F, values.mean(0))
    assert torch.allclose(moments.variance_F, values.var(0, correction=0), rtol=1e-3)
    faded = Moments(torch.zeros(()), torch.zeros(3), torch.zeros(3))
    for batch in (values, values - 1000.0):
        faded.add(batch, 1e-6)
    assert torch.allclose(faded.mean_F, (values - 1000.0).mean(0), atol=1e-2)


def test_a_hooked_model_can_be_copied_and_saved() -> None:
    model, grouping = chain()
    collector = ActivationCollector()
    collector.attach(model, grouping)
    other = pickle.loads(pickle.dumps(model))
    copy.deepcopy(model)(ACTIVE)
    other(ACTIVE)
    assert collector.moments == {}
    model(ACTIVE)
    assert set(collector.moments) == {"0", "2"}
    collector.detach()
    assert not model[0]._forward_pre_hooks


def test_activations_listen_in_training_only_if_asked() -> None:
    model, grouping = chain()
    collector = ActivationCollector(in_eval=False)
    collector.attach(model.eval(), grouping)
    model(ACTIVE)
    assert collector.moments == {}
    model.train()(ACTIVE)
    restored = ActivationCollector()
    restored.attach(model, grouping)
    restored.load_state_dict(collector.state_dict())
    assert {key: value.tolist() for key, value in restored.tensors().items()} == {
        key: value.tolist() for key, value in collector.tensors().items()
    }


# --- geometric median -----------------------------------------------------------------------------


def test_geometric_median_of_channels_blocks_and_numbers() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]))
    criterion = build("criterion", "geometric_median")
    channels = Channel().build(model, torch.ones(1, 2)).grouping
    expected = [(5 + 10) / 3, (5 + 5) / 3, (10 + 5) / 3]
    assert criterion.score(channels, Statistics()).tolist() == pytest.approx(expected)
    rows = Block(1, 2).build(model, ["0"])
    assert criterion.score(rows, Statistics()).tolist() == pytest.approx(expected)
    numbers = Unstructured().build(model_of([[1.0, 5.0, 2.0, 2.0]]))
    assert criterion.score(numbers, Statistics()).tolist() == pytest.approx([6 / 4, 10 / 4, 4 / 4, 4 / 4])


def test_many_groups_are_compared_with_their_median() -> None:
    points = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [100.0, 100.0]])
    median = geometric_median(points, 200)
    assert float((points - median).norm(dim=1).sum()) <= float((points - points.mean(0)).norm(dim=1).sum())
    rows = Block(1, 2).build(model_of(points.tolist()))
    scores = build("criterion", {"type": "geometric_median", "exact": 2}).score(rows, Statistics())
    assert int(scores.argmax()) == 3


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ({"type": "snip_momentum", "momentum": 1.5}, "momentum: 1.5 must be in"),
        ({"type": "snip", "reduction": "average"}, "reduction: 'average' is not known"),
        ({"type": "weight", "p": 0}, "p: 0 must be above 0"),
        ({"type": "wanda", "momentum": 0}, "momentum: 0 must be in"),
        ({"type": "retrain_free", "samples": 0}, "samples: 0 must be 1 or more"),
    ],
)
def test_options_that_are_refused(criterion: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("criterion", criterion)
