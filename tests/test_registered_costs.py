"""Registered costs: their names are keys of targets, counted layer by layer, met from the right side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from torch import nn

from pruningawaretraining import Pruning, count_macs, register, registry
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.costs.macs import macs_cost, macs_per_layer
from pruningawaretraining.costs.weighted import weighted
from pruningawaretraining.errors import ConfigError, ExtensionError, TargetError
from pruningawaretraining.experiment.models import DigitsResNet
from pruningawaretraining.patterns.channel import Channel

X = torch.randn(1, 1, 8, 8)


def energy_of(name: str, module: nn.Module, macs: float) -> float:
    """MACs, those of convolutions three times."""
    return 3.0 * macs if isinstance(module, nn.Conv2d) else macs


@pytest.fixture
def energy() -> Iterator[None]:
    register("cost", "energy")(energy_of)
    yield
    del registry._ENTRIES["cost"]["energy"]


def rule(**target: Any) -> dict[str, Any]:
    return {"rules": [{"criterion": "magnitude", "target": target, "start": 0, "end": 0, "application": "remove"}]}


def counted(model: nn.Module, factor: Callable[[nn.Module], float]) -> float:
    """The cost of a model by its own layers, counted anew."""
    macs = macs_per_layer(model, X)
    return sum(factor(one) * macs[name] for name, one in model.named_modules() if not list(one.children()))


@pytest.mark.parametrize("fraction", [0.3, 0.6])
@pytest.mark.usefixtures("energy")
def test_a_target_of_a_registered_cost_is_met_and_nothing_can_be_given_back(fraction: float) -> None:
    torch.manual_seed(0)
    model = DigitsResNet(widths=(8, 16), blocks=1)
    grouping = Channel().build(model, X).grouping
    cost = macs_cost(grouping, weighted(model, macs_per_layer(model, X), energy_of))
    dense = counted(model, lambda one: 3.0 if isinstance(one, nn.Conv2d) else 1.0)
    pruner = Pruning(model, rule(energy=fraction), example_inputs=X)
    pruner.before_removal = lambda: masks.append(torch.cat([pruner.masks[one.name] for one in grouping.sets]))
    masks: list[torch.Tensor] = []
    pruner.prune(model, 0)
    kept = counted(model, lambda one: 3.0 if isinstance(one, nn.Conv2d) else 1.0)
    (keep_G,) = masks
    assert cost(keep_G) == pytest.approx(kept) and kept <= fraction * dense == fraction * cost.dense
    for group in torch.nonzero(~keep_G).flatten().tolist():
        more_G = keep_G.clone()
        more_G[group] = True
        assert cost(more_G) > fraction * dense


@pytest.mark.usefixtures("energy")
def test_costs_hold_together_and_survive_a_dump() -> None:
    config = PruningConfig.model_validate(rule(energy=0.7, parameters=0.5))
    assert config.rules[0].target.costs == {"energy": 0.7}
    assert PruningConfig.model_validate(config.model_dump(mode="json")) == config
    torch.manual_seed(0)
    model = DigitsResNet(widths=(8, 16), blocks=1)
    parameters = sum(one.numel() for one in model.parameters())
    dense = counted(model, lambda one: 3.0 if isinstance(one, nn.Conv2d) else 1.0)
    pruner = Pruning(model, config, example_inputs=X)
    pruner.prune(model, 0)
    assert sum(one.numel() for one in model.parameters()) <= 0.5 * parameters
    assert counted(model, lambda one: 3.0 if isinstance(one, nn.Conv2d) else 1.0) <= 0.7 * dense


@pytest.mark.usefixtures("energy")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"enrgy": 0.5}, "rules[0].target.enrgy: 'enrgy' is not known"),
        ({"costs": {"enrgy": 0.5}}, "rules[0].target.costs: 'enrgy' is not known; did you mean 'energy'"),
        ({"energy": 1.5}, "rules[0].target.costs.energy: 1.5 is not allowed. Allowed: a number in (0, 1]"),
    ],
)
def test_bad_costs_are_one_line(target: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PruningConfig.model_validate(rule(**target))
    assert str(caught.value).startswith(message)


@pytest.mark.usefixtures("energy")
def test_what_cannot_be_reached_is_refused_by_its_key() -> None:
    with pytest.raises(TargetError, match=r"rules\[0\]\.target\.energy"):
        Pruning(DigitsResNet(widths=(8, 16), blocks=1), rule(energy=1e-6), example_inputs=X)
    with pytest.raises(ConfigError, match=r"target\.costs: .*is not supported by the pattern 'unstructured'"):
        config = rule(energy=0.5)
        config["rules"][0].update(pattern="unstructured", application="mask")
        Pruning(DigitsResNet(widths=(8, 16), blocks=1), config, example_inputs=X)


def test_costs_of_containers_are_sums() -> None:
    model, inputs = zoo.architecture("groupnorm")
    macs = macs_per_layer(model, inputs)
    assert weighted(model, macs, lambda name, module, own: own) == {name: float(value) for name, value in macs.items()}
    assert macs[""] == count_macs(model, inputs)
    with pytest.raises(ExtensionError, match="it returned nan .float.. Expected: a finite number of 0 or more for"):
        weighted(model, macs, lambda name, module, own: float("nan"))


def test_only_layers_are_asked_for_their_cost() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.Flatten(), nn.Linear(144, 2)
    )
    asked: dict[str, float] = {}

    def cost(name: str, module: nn.Module, macs: float) -> float:
        asked[name] = macs
        return 1.0

    found = weighted(model, macs_per_layer(model, X), cost)
    assert asked == {"0.0": 36 * 36, "0.1": 0, "2": 288}
    assert found["0"] == 2 and found[""] == 3
