"""What pieces of users' own declare is checked where they are registered or built: one line names piece and problem,
and rules that have nothing to do with them stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning, load_config, register, registry
from pruningawaretraining.config.options import TILES
from pruningawaretraining.errors import ConfigError, ExtensionError, ModelError
from pruningawaretraining.groups.channel_norms import GroupIndex
from pruningawaretraining.masks.dynamics import Dynamic
from pruningawaretraining.masks.penalties import Regularizer
from pruningawaretraining.patterns.elements import build_grouping, layer_weights

X = torch.linspace(-1, 1, 12).reshape(2, 6)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    for kind in registry.KINDS:
        registry.names(kind)
    before = {kind: dict(table) for kind, table in registry._ENTRIES.items()}
    yield
    for kind, table in registry._ENTRIES.items():
        table.clear()
        table.update(before.get(kind, {}))


def rule(**fields: Any) -> dict[str, Any]:
    return {"rules": [{"target": {"sparsity": 0.5}, "end": 2, **fields}]}


# --- declarations ---------------------------------------------------------------------------------------------------

DECLARED: dict[str, tuple[str, dict[str, Any], str]] = {
    "support is a text": ("pattern", {"support": "coupled", "build": len},
                          "pattern 'own': its support is 'coupled'. Allowed: a Support"),
    "support forgotten": ("pattern", {"chosen": len, "head_units": len},
                          "pattern 'own': it has no method 'build', and no support that says its groups can be "
                          "removed. Allowed: support = COUPLED for removable groups, or build(model, layers, exclude)"),
    "tiles without a size": ("pattern", {"support": TILES, "build": len},
                             "pattern 'own': its support is for tiles, and it has no 'tile'. Allowed: (rows, columns)"),
    "no method of a pattern": ("pattern", {}, "pattern 'own': it has no method 'build'"),
    "dialect does not recognise": ("dialect", {"keys": (), "yaml_tags": (), "recognises": None, "translate": len},
                                   "dialect 'own': its recognises is None. Allowed: a method"),
    "dialect does not translate": ("dialect", {"keys": (), "yaml_tags": (), "recognises": len},
                                   "dialect 'own': its translate is None. Allowed: a method"),
    "keys of a dialect": ("dialect", {"keys": "mine", "yaml_tags": (), "recognises": len, "translate": len},
                          "dialect 'own': its keys is 'mine'. Allowed: a tuple of texts"),
    "acts elsewhere": ("regularizer", {"acts": "grads", "prepare": len},
                       "regularizer 'own': its acts is 'grads'; did you mean 'gradients'? "
                       "Allowed: gradients, loss, weights"),
    "no method of a regulariser": ("regularizer", {},
                                   "regularizer 'own': it has none of the methods prepare, penalty, after_step"),
    "another method": ("regularizer", {"acts": "loss", "prepare": len},
                       "regularizer 'own': its acts is 'loss', and it has no method 'penalty'"),
    "nested is a text": ("dynamic", {"nested": "no"}, "dynamic 'own': its nested is 'no'. Allowed: True, False"),
}  # fmt: skip


def made(kind: str, members: dict[str, Any]) -> Any:
    return dataclass(frozen=True)(type("Own", (Dynamic,) if kind == "dynamic" else (), members))


@pytest.mark.parametrize("case", list(DECLARED))
def test_a_wrong_declaration_is_refused_when_it_is_registered(case: str) -> None:
    kind, members, said = DECLARED[case]
    with pytest.raises(ConfigError) as caught:
        register(kind, "own")(made(kind, members))
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    assert "own" not in registry.names(kind)
    load_config({"global_sparsity": 0.5})  # dialects of others still work
    with pytest.raises(ConfigError, match="allocation: 'uniform' is not supported by the pattern 'slice'"):
        load_config(rule(pattern="slice", allocation="uniform"))


@pytest.mark.parametrize("kind", ["pattern", "criterion", "regularizer", "dynamic"])
def test_a_class_without_dataclass_is_refused_by_name(kind: str) -> None:
    methods = {name: lambda self, *_: None for name in ("build", "score", "penalty")}
    register(kind, "own")(type("Own", (Dynamic,) if kind == "dynamic" else (), methods))
    with pytest.raises(ConfigError) as caught:
        Pruning(net(), rule(**{"pattern": "unstructured", kind: "own"}))
    assert f"{kind}: 'own' is a class without @dataclass. Allowed: @dataclass(frozen=True)" in str(caught.value)


def test_decorators_may_stand_in_either_order() -> None:
    @dataclass(frozen=True)
    @register("criterion", "own")
    class Own:
        share: float = 1.0

        def score(self, grouping: Any, statistics: Any) -> Tensor:
            return torch.arange(grouping.size, dtype=torch.float32) * self.share

    model = net()
    Pruning(model, rule(pattern="unstructured", criterion="own", end=0)).prune(epoch=0)
    assert int((model[0].weight == 0).sum()) == 84  # the first 84 of 168 groups: 96 in this layer


# --- schedules ------------------------------------------------------------------------------------------------------

EARLIEST = "schedule 'own': it returned "
SCHEDULES: dict[str, tuple[Callable[..., float], str]] = {
    "falls": (lambda t, start, final: final * (4 * t * (1 - t)) if t < 1 else final,
              "0.5 at progress 0.5 and 0.46875 at progress 0.625 (from 0 to 0.5). Expected: values that never fall"),
    "never final": (lambda t, start, final: start + (final - start) * t / 2,
                    "0.25 at progress 1 (from 0 to 0.5). Expected: exactly final at progress 1"),
    "beyond": (lambda t, start, final: min(1.0, 2 * t * final),
               "1.0 at progress 1 (from 0 to 0.5). Expected: exactly final at progress 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(SCHEDULES))
@pytest.mark.parametrize("pattern", ["channel", "unstructured"])
def test_a_schedule_that_falls_or_is_never_final_is_refused_when_a_rule_is_built(case: str, pattern: str) -> None:
    schedule, said = SCHEDULES[case]
    register("schedule", "own")(schedule)
    with pytest.raises(ExtensionError) as caught:
        Pruning(net(), rule(pattern=pattern, schedule="own"), example_inputs=X)
    assert str(caught.value) == EARLIEST + said


@pytest.mark.parametrize("name", registry.names("schedule"))
def test_schedules_of_the_library_pass(name: str) -> None:
    Pruning(net(), rule(schedule=name), example_inputs=X)


# --- what pieces return -----------------------------------------------------------------------------------------------


def with_factor(factor: Callable[[Tensor], Tensor]) -> Any:
    @dataclass(frozen=True)
    class Own:
        acts: ClassVar[str] = "gradients"

        def prepare(self, grouping: Any, saving_G: Any = None) -> Regularizer:
            index = GroupIndex(grouping, ("out", "in"))
            return Regularizer(index, torch.ones(grouping.size), lambda norms_G, index, keep_G: factor(norms_G))

    return Own


def step(model: nn.Module, config: dict[str, Any], times: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruning(model, config, example_inputs=X, optimizer=optimizer)
    for _ in range(times):
        optimizer.zero_grad()
        model(X).sum().backward()
        optimizer.step()
    assert not pruner.sparsity


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (lambda norms_G: torch.ones(1), "it returned a Tensor of shape (1,), torch.float32, cpu. Expected: a vector"),
        (lambda norms_G: torch.ones(()), "it returned a Tensor of shape (), torch.float32, cpu. Expected: a vector"),
        (lambda norms_G: 1.0, "it returned 1.0 (float). Expected: a vector of 20 factors"),
        (lambda norms_G: torch.full_like(norms_G, math.nan), "it returned 20 of 20 factors that are not finite."),
        (lambda norms_G: (norms_G - norms_G.max()).reciprocal(), "it returned 1 of 20 factors that are not finite"),
    ],
)  # fmt: skip
def test_factors_of_a_regulariser_are_looked_at_before_weights_change(factor: Any, said: str) -> None:
    register("regularizer", "own")(with_factor(factor))
    model = net()
    before = [one.detach().clone() for one in model.parameters()]
    with pytest.raises(ExtensionError) as caught:
        step(model, rule(regularizer="own", start=2))
    assert str(caught.value).startswith(f"regularizer 'own': {said}")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_weights_that_training_has_ruined_are_not_blamed_on_the_regulariser() -> None:
    register("regularizer", "own")(with_factor(torch.sqrt))
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    step(model, rule(regularizer="own", start=2))


class Everything(Dynamic):
    """Masks everything."""

    def choose(self, event: Any, pick: Any) -> Tensor:
        return torch.zeros_like(event.keep_G)


class TooMany(Dynamic):
    """Keeps one group of each set."""

    def choose(self, event: Any, pick: Any) -> Tensor:
        keep_G = torch.zeros_like(event.keep_G)
        keep_G[[one.start for one in event.grouping.sets]] = True
        return keep_G


@pytest.mark.parametrize(
    ("kind", "end", "said"),
    [
        (Everything, 2, "it returned masks that keep nothing of '0'. Expected: at least one group of every layer"),
        (Everything, 0, "it returned masks that keep nothing of '0'."),
        (TooMany, 0, "it returned 3 groups that are kept. Expected: at least 81 at the last event"),
    ],
)
def test_a_dynamic_that_masks_too_much_is_refused(kind: type, end: int, said: str) -> None:
    register("dynamic", "own")(dataclass(frozen=True)(type("Own", (kind,), {})))
    model = net()
    pruner = Pruning(model, rule(pattern="unstructured", dynamic="own", end=end))
    before = [one.detach().clone() for one in model.parameters()]
    with pytest.raises(ExtensionError) as caught:
        pruner.prune(epoch=0)
    assert str(caught.value).startswith(f"dynamic 'own': {said}")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


# --- messages ---------------------------------------------------------------------------------------------------------


def test_labels_out_of_range_are_named_with_their_dimension() -> None:
    @register("pattern", "own")
    @dataclass(frozen=True)
    class Own:
        def build(self, model: nn.Module, layers: Any = None, exclude: Any = ()) -> Any:
            labels = lambda weight: ((torch.arange(weight.parameter.shape[0]) - 1, 4), (None, 1))  # noqa: E731
            return build_grouping("own", layer_weights(model, ["0"], exclude), labels)

    with pytest.raises(ExtensionError, match=r"labels from -1 to 14 of 0.weight along dimension 0, where 0 to 4 are "):
        Pruning(net(), rule(pattern="own"))


@pytest.mark.parametrize(
    ("model", "exclude", "said"),
    [
        (nn.Sequential(nn.ReLU()), [], "layers: Sequential has no convolution or linear layer"),
        (net(), ["0", "2", "4"], "layers: nothing is left of the 3 convolutions and linear layers of Sequential "
                                 "without exclude: ['0', '2', '4']"),
    ],
)  # fmt: skip
def test_a_selection_of_nothing_says_why(model: nn.Module, exclude: list[str], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        layer_weights(model, None, exclude)
    assert str(caught.value).startswith(said) and "None" not in str(caught.value)
