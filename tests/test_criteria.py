"""Criteria and regularisers on a model small enough to compute by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruningawaretraining.costs.macs import macs_cost, macs_per_layer
from pruningawaretraining.criteria.base import Statistics
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.patterns.channel import Channel
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.registry import build, names


def chain() -> tuple[nn.Sequential, ChannelGroups]:
    """conv (2 channels) -> norm -> linear; weights are 1 and 2, 3 and 4, 5 and 6 by channel."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
        model[0].bias.fill_(9.0)
        model[1].weight.copy_(torch.tensor([-3.0, 4.0]))
        model[4].weight.copy_(torch.tensor([[5.0, 6.0]]))
    return model, Channel().build(model, torch.ones(2, 1, 1, 1))


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ({"type": "magnitude", "normalize": "none"}, [35 / 3, 56 / 3]),  # (1 + 9 + 25) / 3 members, biases left out
        ({"type": "magnitude", "p": 1, "normalize": "none"}, [9 / 3, 12 / 3]),
        ("magnitude", [70 / 91, 112 / 91]),
        ({"type": "magnitude", "normalize": "max"}, [35 / 56, 1.0]),
        ({"type": "l1", "normalize": "none"}, [3.0, 4.0]),
        ("lamp", [35 / 91, 1.0]),
        ("bn_scale", [3.0, 4.0]),
        ("BNScalePruner", [3.0, 4.0]),
    ],
)
def test_scores(criterion: object, expected: list[float]) -> None:
    grouping = chain()[1].grouping
    scores = build("criterion", criterion).score(grouping, Statistics())
    assert scores.tolist() == pytest.approx(expected)


def two_layers() -> tuple[nn.Module, ChannelGroups, Statistics]:
    """Hidden layers of 4 and 2 channels; the first source costs 12 MACs, the second 8."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 5))
    inputs = torch.ones(1, 3)
    found = Channel().build(model, inputs)
    return model, found, Statistics(macs=macs_cost(found.grouping, macs_per_layer(model, inputs)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mode": "sum", "alpha": 0.5}, [0.5 * 1 + 0.5 * 0] * 4 + [0.5 * 1 + 0.5 * 1] * 2),
        ({"mode": "sum", "alpha": 1.0}, [1.0] * 6),
        ({"mode": "mul", "beta": 1}, [8 / 12] * 4 + [1.0] * 2),
        ({"mode": "Mul", "beta": 2}, [(8 / 12) ** 0.5] * 4 + [1.0] * 2),
        ({"mode": "per_mac"}, [1 / (3 + 2)] * 4 + [1 / (4 + 5)] * 2),
    ],
)
def test_scores_weighed_by_macs(options: dict[str, object], expected: list[float]) -> None:
    model, found, statistics = two_layers()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    scores = build("criterion", {"type": "mac_aware", **options}).score(found.grouping, statistics)
    assert scores.tolist() == pytest.approx(expected)


def test_sets_without_a_norm_stay_last_when_weighed_by_macs() -> None:
    _, found, statistics = two_layers()
    spec = {"type": "mac_aware", "base": "bn_scale", "mode": "per_mac"}
    assert build("criterion", spec).score(found.grouping, statistics).tolist() == [torch.inf] * 6


def test_random_scores_are_the_same_every_time() -> None:
    grouping = two_layers()[1].grouping
    first, second = (build("criterion", {"type": "random", "seed": 1}).score(grouping, Statistics()) for _ in range(2))
    other = build("criterion", {"type": "random", "seed": 2}).score(grouping, Statistics())
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_criteria_refuse_what_they_cannot_use() -> None:
    for spec, message in (
        ({"type": "magnitude", "p": 0}, "p: 0 must be above 0"),
        ({"type": "magnitude", "normalize": "meen"}, "did you mean 'mean'"),
        ({"type": "magnitude", "power": 2}, "power"),
        ({"type": "mac_aware", "mode": "sun"}, "did you mean 'sum'"),
        ({"type": "mac_aware", "base": "magnitud"}, "did you mean 'magnitude'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build("criterion", spec)


def gradients(model: nn.Module, regularizer: object, found: ChannelGroups, **options: object) -> list[torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build("regularizer", regularizer).prepare(found.grouping, options.get("saving"))(options.get("keep"))
    return [parameter.grad.flatten() for parameter in model.parameters()]


def test_growing_l2_is_strongest_on_the_smallest_channel() -> None:
    model, found = chain()
    weight, bias, norm, norm_bias, linear, linear_bias = gradients(
        model, {"type": "growing_l2", "strength": 0.1, "alpha": 4}, found
    )
    assert weight.tolist() == pytest.approx([0.1 * 16 * 1, 0.1 * 1 * 2])
    assert norm.tolist() == pytest.approx([0.1 * 16 * -3, 0.1 * 4])
    assert linear.tolist() == pytest.approx([0.1 * 16 * 5, 0.1 * 6])
    assert not any(bool(one.any()) for one in (bias, norm_bias, linear_bias))


def test_growing_l2_exponent_and_a_set_of_equals() -> None:
    model, found = chain()
    weaker = gradients(model, {"type": "growing_l2", "strength": 1, "gamma": 0.5}, found)[0]
    assert weaker.tolist() == pytest.approx([4.0, 2.0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    assert gradients(model, {"type": "growing_l2", "strength": 1}, found)[0].tolist() == [1.0, 1.0]  # not NaN


def test_group_lasso_divides_by_the_groups_norm_and_survives_zero() -> None:
    model, found = chain()
    weight, _, norm, _, linear, _ = gradients(model, {"type": "group_lasso", "strength": 0.5}, found)
    assert weight.tolist() == pytest.approx([0.5 * 1 / 35**0.5, 0.5 * 2 / 56**0.5])
    assert linear.tolist() == pytest.approx([0.5 * 5 / 35**0.5, 0.5 * 6 / 56**0.5])
    with torch.no_grad():
        for tensor in (model[0].weight, model[1].weight, model[4].weight):
            tensor.zero_()
    assert not any(bool(one.any()) for one in gradients(model, "group_lasso", found))


def test_bn_scale_is_l1_where_one_norm_is_behind_a_channel() -> None:
    model, found = chain()
    weight, _, norm, _, linear, _ = gradients(model, {"type": "bn_scale", "strength": 0.5}, found)
    assert norm.tolist() == pytest.approx([-0.5, 0.5])
    assert not weight.any()
    assert not linear.any()


def test_a_penalty_in_proportion_to_macs() -> None:
    model, found, statistics = two_layers()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    assert statistics.macs is not None
    saving = statistics.macs.saving_G(torch.ones(6))
    assert saving.tolist() == [5.0] * 4 + [9.0] * 2
    first = gradients(model, {"type": "growing_l2", "strength": 0.0, "mac_strength": 1.0}, found, saving=saving)[0]
    assert first.tolist() == pytest.approx([5 / saving.mean().item()] * 12)


def test_masked_channels_do_not_stretch_the_growing_factor() -> None:
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0], [1.0], [2.0]]))
        model[1].weight.copy_(torch.tensor([[0.0, 1.0, 2.0]]))
    found = Channel().build(model, torch.ones(1, 1))
    keep = torch.tensor([False, True, True])
    assert gradients(model, {"type": "growing_l2", "strength": 1}, found, keep=keep)[0].tolist() == [0.0, 16.0, 2.0]


@pytest.mark.parametrize("name", names("regularizer"))
def test_regularisers_refuse_negative_strength(name: str) -> None:
    with pytest.raises(ConfigError, match="strength"):
        build("regularizer", {"type": name, "strength": -1.0})
