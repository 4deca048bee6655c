"""Events in whole epochs of files of other systems: what drives them where the loop does not call ``prune``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining import Pruning

STEPS, EPOCHS = 4, 5
MODIFIER = {"!tag": "!GMPruningModifier", "params": "__ALL_PRUNABLE__", "init_sparsity": 0.2, "final_sparsity": 0.8,
            "start_epoch": 0, "end_epoch": 3, "update_frequency": 1.0, "inter_func": "linear"}  # fmt: skip
RECIPE: dict[str, Any] = {"modifiers": [MODIFIER]}
AT_ONCE: dict[str, Any] = {"modifiers": [{**MODIFIER, "init_sparsity": 0.8, "end_epoch": 0}]}
SECTION = {"pruners": [{"target_sparsity": 0.8, "start_epoch": 0, "end_epoch": 3}]}
INTEL: dict[str, Any] = {"pruning": {"approach": {"weight_compression": SECTION}}}
NATIVE: dict[str, Any] = {
    "rules": [{"pattern": "unstructured", "target": {"sparsity": 0.8}, "start": 0, "end": 3}]
}  # fmt: skip

Hook = Callable[[Pruning, nn.Module, int], object]


def nothing(*_: Any) -> None:
    """A loop that says nothing of epochs."""


def calls_prune(pruner: Pruning, model: nn.Module, epoch: int) -> None:
    pruner.prune(model, epoch)


def begins(pruner: Pruning, _: nn.Module, epoch: int) -> None:
    pruner.on_epoch_begin(epoch)


def begins_and_prunes(pruner: Pruning, model: nn.Module, epoch: int) -> None:
    pruner.on_epoch_begin(epoch)
    pruner.prune(model, epoch)


def train(
    config: Mapping[str, Any],
    before: Hook = nothing,
    after: Hook = nothing,
    loader: Any = range(STEPS),
    step_hooks: bool = False,
    model: nn.Module | None = None,
) -> list[float]:
    """The sparsity after the first step of every epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10)) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner, found = Pruning(model, config, optimizer=optimizer), []
    pruner.on_train_begin(loader)
    for epoch in range(EPOCHS):
        before(pruner, model, epoch)
        for step in range(STEPS):
            if step_hooks:
                pruner.on_step_begin(step)
            optimizer.zero_grad()
            model(torch.randn(3, 10)).square().mean().backward()
            optimizer.step()
            if step == 0:
                weights = torch.cat([one.weight.flatten() for one in model if isinstance(one, nn.Linear)])
                found.append(round(float((weights == 0).double().mean()), 3))
        after(pruner, model, epoch)
    return found


TABLE: list[tuple[str, dict[str, Any], dict[str, Any], list[float]]] = [
    ("recipe, counted", RECIPE, {}, [0.0, 0.4, 0.6, 0.8, 0.8]),
    ("recipe, counted with step hooks", RECIPE, {"step_hooks": True}, [0.0, 0.4, 0.6, 0.8, 0.8]),
    ("recipe at once, by itself", AT_ONCE, {}, [0.8, 0.8, 0.8, 0.8, 0.8]),
    ("recipe, on_epoch_begin", RECIPE, {"before": begins, "loader": None}, [0.2, 0.4, 0.6, 0.8, 0.8]),
    ("recipe, both hooks", RECIPE, {"before": begins_and_prunes}, [0.2, 0.4, 0.6, 0.8, 0.8]),
    ("recipe, prune at the begin", RECIPE, {"before": calls_prune}, [0.2, 0.4, 0.6, 0.8, 0.8]),
    ("recipe, prune at the end", RECIPE, {"after": calls_prune}, [0.0, 0.2, 0.4, 0.6, 0.8]),
    ("recipe, prune at the end, step hooks", RECIPE, {"after": calls_prune, "step_hooks": True},
     [0.0, 0.2, 0.4, 0.6, 0.8]),
    ("recipe, on_epoch_begin, prune at the end", RECIPE, {"before": begins, "after": calls_prune},
     [0.2, 0.4, 0.6, 0.8, 0.8]),
    ("intel, counted", INTEL, {}, [0.0, 0.4, 0.6, 0.8, 0.8]),
    ("intel, on_epoch_begin", INTEL, {"before": begins, "loader": None}, [0.2, 0.4, 0.6, 0.8, 0.8]),
    ("intel, prune at the end", INTEL, {"after": calls_prune}, [0.0, 0.2, 0.4, 0.6, 0.8]),
    ("native, nothing", NATIVE, {"before": begins}, [0.0, 0.0, 0.0, 0.0, 0.0]),
    ("native, prune at the end", NATIVE, {"after": calls_prune}, [0.0, 0.2, 0.4, 0.6, 0.8]),
]  # fmt: skip


@pytest.mark.parametrize(("config", "loop", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_sparsity_of_every_epoch(config: dict[str, Any], loop: dict[str, Any], expected: list[float]) -> None:
    assert train(config, **loop) == pytest.approx(expected, abs=0.005)


def test_steps_of_an_epoch_in_a_rule_count_too() -> None:
    with_steps = {"rules": [{**NATIVE["rules"][0], "steps_per_epoch": STEPS}]}
    assert train(with_steps, after=calls_prune, loader=None) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8], abs=0.005)


@pytest.mark.parametrize(
    ("config", "loop", "expected"),
    [
        (RECIPE, {}, "modifiers[0]: prune(model, epoch) and on_epoch_begin(epoch) are not called: epochs are counted"),
        (RECIPE, {"loader": None, "step_hooks": True}, "modifiers[0]: its events are in whole epochs and wait for"),
        (INTEL, {"loader": None, "step_hooks": True}, "weight_compression.pruners[0]: its events are in whole epochs"),
        (NATIVE, {}, "rules[0]: an epoch is over and prune(model, epoch) was not called"),
        (NATIVE, {"loader": None, "before": begins}, "rules[0]: an epoch is over and prune(model, epoch) was not"),
        (NATIVE, {"loader": None, "step_hooks": True}, "rules[0]: an epoch is over and prune(model, epoch) was not"),
    ],
)
def test_a_call_that_is_missing_is_named_once_in_time(
    config: dict[str, Any], loop: dict[str, Any], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    train(config, **loop)
    told = [one.getMessage() for one in caplog.records if "prune(model, epoch)" in one.getMessage()]
    assert len(told) == 1
    assert expected in told[0]


@pytest.mark.parametrize("config", [RECIPE, INTEL, NATIVE])
@pytest.mark.parametrize("loop", [{"before": calls_prune}, {"after": calls_prune}])
def test_loops_that_call_prune_are_told_nothing(
    config: dict[str, Any], loop: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    train(config, **loop)
    assert not [one.getMessage() for one in caplog.records if "prune(model, epoch)" in one.getMessage()]


def resumed(
    weights: Mapping[str, torch.Tensor] | None, state: dict[str, Any] | None, steps: int
) -> tuple[Pruning, nn.Linear, list[float]]:
    """Train a fresh model from a checkpoint, if there is one; with the sparsity after every step."""
    model, found = nn.Linear(10, 20), list[float]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruning(model, RECIPE, optimizer=optimizer)
    if weights is not None and state is not None:
        pruner.load_state_dict(state)
        model.load_state_dict(weights)
    pruner.on_train_begin(range(STEPS))
    for _ in range(steps):
        model(torch.randn(3, 10)).square().mean().backward()
        optimizer.step()
        found.append(float((model.weight == 0).double().mean()))
    return pruner, model, found


def test_a_resumed_loop_that_prunes_at_the_end_goes_on_as_before() -> None:
    torch.manual_seed(0)
    weights, state, found = None, None, []
    for epoch in range(4):
        pruner, model, sparsities = resumed(weights, state, STEPS)
        found.append(sparsities[-1])
        pruner.prune(model, epoch)
        weights, state = {name: one.clone() for name, one in model.state_dict().items()}, pruner.state_dict()
    assert found == pytest.approx([0.0, 0.2, 0.4, 0.6], abs=0.005)


def test_a_resumed_loop_goes_on_counting() -> None:
    torch.manual_seed(0)
    weights, state, found = None, None, list[float]()
    for _ in range(2):
        pruner, model, sparsities = resumed(weights, state, 2 * STEPS)
        found += sparsities
        weights, state = {name: one.clone() for name, one in model.state_dict().items()}, pruner.state_dict()
    assert found[::STEPS] == pytest.approx([0.0, 0.4, 0.6, 0.8], abs=0.005)
