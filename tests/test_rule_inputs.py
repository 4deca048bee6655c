"""What rules are given is looked at: options, optimizers, statistics and weights that cannot mean what they say."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_books import INPUTS, RULES, assert_masked, begun, build, step
from torch import nn
from torch.utils.checkpoint import checkpoint

from pruningawaretraining import PruneOptimizer, Pruning
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.registry import lookup, names

NUMBERS = (float("inf"), float("-inf"), float("nan"))


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize(
    ("pattern", "regularizer", "option"),
    [
        ("channel", "growing_l2", "strength"),
        ("channel", "growing_l2", "alpha"),
        ("channel", "group_lasso", "strength"),
        ("slice", "slice_penalty", "strength"),
    ],
)
def test_an_option_that_is_not_finite_is_refused(pattern: str, regularizer: str, option: str, value: float) -> None:
    rule = {**RULES[pattern], "regularizer": {"type": regularizer, option: value}}
    with pytest.raises(ConfigError, match=rf"regularizer\.{option}: -?(inf|nan) is not a finite number"):
        Pruning(build(), {"rules": [rule]}, example_inputs=INPUTS)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = build(), build()
    stranger = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="optimizer: SGD holds no parameter of the Sequential"):
        Pruning(model, {"rules": [RULES["2:4"]]}, example_inputs=INPUTS, optimizer=stranger)
    pruner = Pruning(model, {"rules": [RULES["2:4"]]}, example_inputs=INPUTS)
    with pytest.raises(ConfigError, match="optimizer: SGD holds no parameter of the Sequential"):
        pruner.attach(stranger)
    pruner.attach(torch.optim.SGD(model[0].parameters(), lr=0.1))  # a part is enough


def test_an_optimizer_made_before_a_removal_is_still_the_models() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruning(model, {"rules": [{**RULES["channel"], "end": 0}]}, example_inputs=INPUTS)
    assert pruner.prune(model, 0) == "removed"
    pruner.attach(optimizer)
    step(model, optimizer)
    assert {id(one) for one in optimizer.param_groups[0]["params"]} == {id(one) for one in model.parameters()}


@pytest.mark.parametrize("criterion", ["taylor", "magnitude", "snip_momentum", "random"])
@pytest.mark.parametrize("pattern", RULES)
def test_weights_that_are_not_finite_are_named_and_nothing_is_pruned(pattern: str, criterion: str) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rule = {**RULES[pattern], "criterion": criterion, "start": 1}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=INPUTS, optimizer=optimizer)
    step(model, optimizer)
    with torch.no_grad():
        model[2][0].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"r: 2\.0\.weight is not finite"):
        pruner.prune(model, 1)
    assert pruner.sparsity == 0


LISTENING = ["taylor", "snip", "snip_momentum", "movement", "retrain_free"]


@pytest.mark.parametrize("criterion", LISTENING)
@pytest.mark.parametrize("pattern", RULES)
def test_nothing_is_pruned_by_gradients_that_were_never_finite(
    pattern: str, criterion: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = {**RULES[pattern], "criterion": criterion, "start": 1}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=INPUTS, optimizer=optimizer)
    weights = {name: one.clone() for name, one in model.state_dict().items()}
    for _ in range(4):
        optimizer.zero_grad()
        (model(INPUTS).square().mean() * float("nan")).backward()
        optimizer.step()
        model.load_state_dict(weights)
    with contextlib.suppress(ModelError):  # of channels, which cannot wait
        pruner.prune(model, 1)
    assert "r.criterion: the gradients of 4 of 4 steps were not finite and count for nothing" in caplog.text
    assert pruner.sparsity == 0 and all(one.equal(weights[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("criterion", LISTENING)
def test_gradients_that_are_mostly_not_finite_are_said(criterion: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rule = {**RULES["channel"], "criterion": criterion, "start": 1}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=INPUTS, optimizer=optimizer)
    weights = {name: one.clone() for name, one in model.state_dict().items()}
    for number in range(5):
        optimizer.zero_grad()
        (model(INPUTS).square().mean() * (float("nan") if number else 1.0)).backward()
        optimizer.step()
        model.load_state_dict(weights)  # as a scaler does that skips the step
    pruner.prune(model, 1)
    assert "r.criterion: the gradients of 4 of 5 steps were not finite and count for nothing" in caplog.text


@pytest.mark.parametrize("pattern", RULES)
def test_what_was_frozen_at_the_event_is_masked_once_it_trains(pattern: str) -> None:
    model = build()
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    pruner = Pruning(model, {"rules": [RULES[pattern]]}, example_inputs=INPUTS, optimizer=optimizer)
    for epoch in range(6):
        pruner.prune(model, epoch)
    assert not any(one.requires_grad for one in model[2].parameters())
    for parameter in model[2].parameters():
        parameter.requires_grad_(True)
    model(INPUTS).square().mean().backward()
    checked = 0
    for masks in pruner.engine.masks:
        for member, keep_W in masks.grouping.expand(masks.keep_G.float(), 1.0):
            gone_W = (keep_W == 0).expand(member.parameter.shape)
            assert not bool(member.parameter.grad[gone_W].any()), member.name
            checked += int(gone_W.sum()) if member.name.startswith("2.") else 0
    assert checked
    optimizer.step()
    assert_masked(pruner, model)


class Checkpointed(nn.Sequential):
    reentrant: bool | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None or not self.training:
            return super().forward(x)
        first, rest = self[0], nn.Sequential(*list(self)[1:])
        return rest[-1](checkpoint(lambda y: rest[:-1](first(y)), x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_are_counted_once_under_checkpointing(reentrant: bool) -> None:
    found = []
    for kind in (None, reentrant):
        model = Checkpointed(*build())
        model.reentrant = kind
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        rule = {**RULES["unstructured"], "criterion": "wanda", "start": 1}
        pruner = Pruning(model, {"rules": [rule]}, example_inputs=INPUTS, optimizer=optimizer)
        inputs = INPUTS.clone().requires_grad_(True)
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        feed = pruner.engine.rules[0].feed
        assert feed.collector is not None
        found.append({name: one.count.item() for name, one in feed.collector.moments.items()})
    assert found[0] == found[1]


def test_parts_of_an_event_follow_the_scores_of_the_event(tmp_path: Path) -> None:
    """Scores that go on changing with the training are not those that order the parts of an event."""
    rule = {
        **RULES["unstructured"],
        **{"criterion": {"type": "snip_momentum", "momentum": 0.1}, "progressive": 8, "unit": "step"},
        **{"start": 2, "every": 8, "end": 10},
    }

    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Pruning]:
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, optimizer, Pruning(model, {"rules": [rule]}, example_inputs=INPUTS, optimizer=optimizer)

    def train(run: tuple[nn.Module, torch.optim.Optimizer, Pruning], first: int, last: int) -> None:
        for number in range(first, last):
            run[2].on_step_begin()
            run[1].zero_grad()
            run[0](torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(number))).square().mean().backward()
            run[1].step()

    straight, broken = begin(), begin()
    train(straight, 0, 8)
    train(broken, 0, 4)
    states = [one.state_dict() for one in broken]
    again = begin()
    for one, state in zip(reversed(again), reversed(states), strict=True):
        one.load_state_dict(state)
    train(again, 4, 8)
    assert 0 < straight[2].sparsity < 0.5
    for name, keep in straight[2].masks.items():
        assert torch.equal(keep, again[2].masks[name]), name


# --- PruneOptimizer's keys ------------------------------------------------------------------------------------------


class Counting(torch.optim.SGD):
    """Counts its steps in the param group, as schedule-free and D-adapted optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1, k: int = 0, gamma: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        self.defaults |= {"k": k, "gamma": gamma}
        for group in self.param_groups:
            group.setdefault("k", k)
            group.setdefault("gamma", gamma)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            assert group["gamma"] == 1e-3
            group["k"] += 1
        return super().step(closure)


def grouped(weight: nn.Parameter, **options: Any) -> dict[str, Any]:
    common = {"params": [weight], "group_type": "KElementGrouper", "prox_type": "NMSparseConstraint", "n_nonzero": 2}
    return {**common, **options}


def test_options_have_their_own_names_beside_those_of_the_base_optimizer() -> None:
    weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    optimizer = PruneOptimizer(Counting([grouped(weight, prox_k=4)], lr=0.01))
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert bool(((weight.view(-1, 4) != 0).sum(1) == 2).all())
    group = optimizer.param_groups[0]
    assert (group["k"], group["gamma"], group["prox_k"]) == (3, 1e-3, 4)
    assert group["prox_gamma"] == pytest.approx(0.03)
    again = PruneOptimizer(Counting([grouped(nn.Parameter(torch.zeros(8, 8)), prox_k=4)], lr=0.01))
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["prox_gamma"] == pytest.approx(0.03)


def test_a_key_that_the_base_optimizer_has_too_is_refused() -> None:
    weight = nn.Parameter(torch.ones(8, 8))
    with pytest.raises(ConfigError, match=r"param_groups\[0\]\.k: it is a key of Counting.* Allowed: prox_k"):
        PruneOptimizer(Counting([grouped(weight, k=4)]))
    optimizer = PruneOptimizer(torch.optim.SGD([grouped(weight, k=4)], lr=0.1))
    assert "prox_gamma" not in optimizer.param_groups[0]


def test_an_average_by_another_name_is_masked() -> None:
    class Ema(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.ema_model = model

    model, _, pruner = begun("2:4")
    average = Ema(build())
    pruner.attach_ema(average)
    assert_masked(pruner, average.ema_model)


ABSURD = [
    (name, field.name, value)
    for name in names("regularizer")
    for field in dataclasses.fields(lookup("regularizer", name))
    if isinstance(field.default, float)
    for value in (-1.0, 1e7, 1e30)
]


@pytest.mark.parametrize(("name", "option", "value"), ABSURD)
def test_no_option_of_a_regulariser_is_absurd(name: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{option}: {re.escape(repr(value))} must be from 0 to"):
        lookup("regularizer", name)(**{option: value})


def test_the_steepest_growth_is_finite() -> None:
    with pytest.raises(ValueError, match=r"alpha: 9\.0 times gamma 8\.0 must be at most 64"):
        lookup("regularizer", "growing_l2")(alpha=9.0, gamma=8.0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    regularizer = {"type": "growing_l2", "alpha": 64.0, "strength": 1.0}
    pruner = Pruning(model, {"rules": [{"regularizer": regularizer, "start": 1}]}, example_inputs=torch.randn(1, 4))
    model(torch.randn(2, 4)).sum().backward()
    pruner.channel_regularize(model)
    pruner.channel_regularize(model)
    assert all(bool(torch.isfinite(one.grad).all()) for one in model.parameters())
