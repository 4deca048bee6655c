"""A schedule, a criterion, a pattern and a regulariser of one's own: at most fifteen lines each, and the engine takes
them as it takes its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning, one_shot, register, registry
from pruningawaretraining.config.options import COUPLED, Support
from pruningawaretraining.criteria.base import Needs
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.patterns.channel import chosen_layers
from pruningawaretraining.patterns.elements import build_grouping, layer_weights

LINES = 15


def halfway(progress: float, start: float, final: float) -> float:
    """Half of the sparsity at once, the rest at the end."""
    return final if progress >= 1 else (start + final) / 2


@dataclass(frozen=True)
class Smallest:
    """The smallest output weight of a group."""

    needs: ClassVar[Needs] = Needs(kinds=("channel",))

    def score(self, grouping: Any, statistics: Any) -> Tensor:
        found: Tensor = grouping.of_role("out").reduce_of(lambda weight: (weight.abs() < 0.1).float())
        return -found


@dataclass(frozen=True)
class Column:
    """All weights that one input of a linear layer meets."""

    def build(self, model: nn.Module, layers: Any = None, exclude: Any = ()) -> Any:
        return build_grouping("column", layer_weights(model, layers, exclude, ("Linear",)), self._labels)

    @staticmethod
    def _labels(weight: Any) -> Any:
        outputs, inputs = weight.parameter.shape
        return (None, 1), (torch.arange(inputs), inputs)


@dataclass(frozen=True)
class WideChannel:
    """Channels of layers that have many."""

    support: ClassVar[Support] = COUPLED
    least: int = 8

    def chosen(self, model: nn.Module, layers: Any, exclude: Any = (), key: str = "") -> set[str]:
        names = chosen_layers(model, layers, exclude, key)
        return {name for name in names if len(model.get_submodule(name).weight) >= self.least}  # type: ignore[arg-type]

    def head_units(self, model: nn.Module, chosen: set[str]) -> dict[str, str]:
        return {}


OWN = {
    ("schedule", "halfway"): halfway,
    ("criterion", "smallest"): Smallest,
    ("pattern", "column"): Column,
    ("pattern", "wide_channel"): WideChannel,
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for (kind, name), entry in OWN.items():
        register(kind, name)(entry)
    yield
    for kind, name in OWN:
        del registry._ENTRIES[kind][name]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2))


def pruner_of(model: nn.Module, **rule: Any) -> Pruning:
    return Pruning(model, {"rules": [{"target": {"sparsity": 0.5}, **rule}]}, example_inputs=torch.randn(2, 6))


@pytest.mark.parametrize("entry", list(OWN.values()), ids=lambda entry: entry.__name__)
def test_it_takes_few_lines(entry: Any) -> None:
    assert len(inspect.getsource(entry).splitlines()) <= LINES


def test_a_schedule_of_ones_own() -> None:
    model = net()
    pruner = pruner_of(model, pattern="unstructured", schedule="halfway", end=2)
    reached = []
    for epoch in range(3):
        pruner.prune(model, epoch)
        reached.append(round(pruner.sparsity, 2))
    assert reached == [0.25, 0.25, 0.5]


def test_a_criterion_of_ones_own_decides_and_refuses_what_it_cannot_score() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight[:8] = 0.01
    pruner = pruner_of(model, criterion="smallest", layers=["0"], application="mask")
    pruner.prune(model, 0)
    assert pruner.masks["0"].tolist() == [False] * 8 + [True] * 8
    with pytest.raises(ConfigError, match=r"'smallest' scores channels and heads, not the groups of '2:4'"):
        pruner_of(net(), criterion="smallest", pattern="2:4")


def test_a_weight_pattern_of_ones_own_is_masked() -> None:
    model = net()
    pruner_of(model, pattern="column", layers=["0"]).prune(model, 0)
    assert int((model[0].weight == 0).all(dim=0).sum()) == 3
    with pytest.raises(ConfigError, match=r"target.macs: 0.5 is not supported by the pattern 'column'"):
        pruner_of(net(), pattern="column", target={"macs": 0.5})


def test_a_structural_pattern_of_ones_own_is_removed() -> None:
    model = net()
    assert pruner_of(model, pattern="wide_channel").prune(model, 0) == "removed"
    assert [one.out_features for one in model if isinstance(one, nn.Linear)] == [8, 4, 2]


@pytest.mark.parametrize("pattern", ["slice", "column"])
def test_slices_and_own_patterns_in_one_shot(pattern: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 6))
    data = [(torch.randn(4, 3, 3, 3), torch.tensor([0, 1, 2, 3]))]
    before = model[0].weight.detach().clone()
    rule = {"pattern": pattern, "criterion": "wanda" if pattern == "slice" else "magnitude"}
    models = one_shot(model, rule, data, nn.functional.cross_entropy, [0.25, 0.5])
    layer = 0 if pattern == "slice" else 2
    zeros = {sparsity: float((found[layer].weight == 0).float().mean()) for sparsity, found in models.items()}
    assert zeros == pytest.approx({0.25: 0.25, 0.5: 0.5}, abs=0.03)
    assert torch.equal(model[0].weight, before)


def test_what_an_own_piece_does_not_declare_breaks_no_other_message() -> None:
    @dataclass(frozen=True)
    class Bare:
        def penalty(self, grouping: Any) -> Tensor:
            return torch.zeros(())

    register("regularizer", "bare")(Bare)
    register("cost", "energy")(lambda name, module, macs: 2.0 * macs)
    try:
        with pytest.raises(ConfigError, match=r"'bare' is not supported by the pattern 'channel'. Allowed: "):
            pruner_of(net(), regularizer="bare")
        pruner_of(net(), pattern="unstructured", regularizer="bare")
        with pytest.raises(ConfigError, match=r"target.energi: 'energi' is not known; did you mean 'energy'"):
            pruner_of(net(), target={"energi": 0.5})
    finally:
        del registry._ENTRIES["regularizer"]["bare"], registry._ENTRIES["cost"]["energy"]


def test_the_state_of_another_pattern_is_refused() -> None:
    model = net()
    state = pruner_of(model, pattern="unstructured", end=3)
    state.prune(model, 0)
    with pytest.raises(CheckpointError, match=r"rules\[0\] had the pattern 'unstructured' and has '2:4'"):
        pruner_of(net(), pattern="2:4").load_state_dict(state.state_dict())
