"""Rules that begin to prune when their decisions are stable: when, how far, resumed, refused."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dynamic_laws import PATTERNS
from test_state import assert_same, begin, resume, seed_everything, through_a_file, train
from torch import nn

from pruningawaretraining import Pruning, load_config
from pruningawaretraining.config.plan import rule_lines
from pruningawaretraining.engine.stability import agreement
from pruningawaretraining.errors import ConfigError, PruningError

INPUTS = torch.ones(2, 3, 8, 8)
RULE = {"target": {"sparsity": 0.5}, "start": "stable", "stable": 0.9, "end": 8, "scope": "local"}


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 4, 1)
    )


def fill(model: nn.Module, seed: int) -> None:
    """The weights of a moment of a training, 0 where they are masked."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(torch.where(parameter == 0, 0.0, drawn))


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def pruner_of(model: nn.Module, **options: Any) -> Pruning:
    return Pruning(model, {"rules": [{**RULE, **options}]}, example_inputs=INPUTS)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 1, 0, 0], [1, 1, 0, 0], 1.0),
        ([1, 1, 0, 0], [0, 0, 1, 1], 0.0),
        ([1, 1, 1, 0], [1, 1, 0, 1], 0.0),  # nothing of what goes is the same
        ([1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], 2 / 3),  # of what stays; 3 / 4 of what goes
        ([1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], 1 / 2),
        ([1, 1, 1, 1], [1, 1, 1, 1], 1.0),  # nothing goes in either
    ],
)
def test_agreement_of_masks(one: list[int], other: list[int], expected: float) -> None:
    masks = torch.tensor(one).bool(), torch.tensor(other).bool()
    assert agreement(*masks) == agreement(*masks[::-1]) == pytest.approx(expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pruning_begins_when_decisions_agree(pattern: str) -> None:
    model = net()
    pruner = pruner_of(model, pattern=PATTERNS[pattern])
    happened, levels = [], []
    for epoch in range(9):
        fill(model, seed=min(epoch, 3))  # the look at 4 is the first that finds what the one before has found
        before = copy.deepcopy(model.state_dict())
        happened.append(pruner.prune(model, epoch))
        levels.append(pruner.sparsity)
        if epoch < 4:
            assert unchanged(model, before)
            assert pruner.phase == "regularize"
    assert [bool(one) for one in happened] == [False] * 4 + [True] * 5
    tolerance = 0.005 if pattern == "unstructured" else 0.03  # of few groups, in whole ones; 27 inputs are no windows
    assert levels[4:] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=tolerance)


def test_masks_that_never_agree_are_put_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    pruner = pruner_of(model, end=3, pattern="unstructured")
    for epoch in range(5):
        fill(model, seed=epoch)
        with caplog.at_level(logging.WARNING):
            pruner.prune(model, epoch)
        assert pruner.sparsity == (0 if epoch < 3 else pytest.approx(0.5, abs=1e-3))
    assert [record.getMessage() for record in caplog.records].count(
        "rules[0]: epoch 3: masks have not become stable by 'end': everything is pruned at once"
    ) == 1


def test_a_cost_target_is_met_from_stable_masks_on() -> None:
    model = net()
    pruner = pruner_of(model, end=6, target={"macs": 0.5}, scope="global")
    left = []
    for epoch in range(7):
        fill(model, seed=min(epoch, 1))
        pruner.prune(model, epoch)
        left.append(pruner.macs.fraction)
    assert left[:2] == [1, 1]
    for number, fraction in enumerate(left[2:], start=1):  # five events, from epoch 2 on
        assert fraction <= 1 - number / 5 * 0.5
    assert 0.4 < left[-1] <= 0.5


def test_looks_at_steps_and_every_few() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = {**RULE, "unit": "step", "every": 4, "end": 20, "pattern": "unstructured"}
    pruner = Pruning(model, {"rules": [rule]}, optimizer=optimizer)
    levels = []
    for step in range(22):
        fill(model, seed=int(step >= 3))
        model(INPUTS).sum().backward()
        optimizer.step()
        levels.append(round(pruner.sparsity, 2))
    changes = [step for step in range(1, 22) if levels[step] != levels[step - 1]]
    assert changes == [8, 12, 16, 19]  # looks at 0 and 4; the last event follows its step at once
    assert levels[-1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("stop", [1, 3])
def test_interrupted_equals_uninterrupted(pattern: str, stop: int, tmp_path: Path) -> None:
    rule = {**RULE, "pattern": PATTERNS[pattern], "stable": 0.7, "end": 5, "max_sparsity": 0.8}
    seed_everything()
    straight = begin({"rules": [rule]})
    train(straight, 0, 7)
    seed_everything()
    broken = begin({"rules": [rule]})
    train(broken, 0, stop)
    states = through_a_file([part.state_dict() for part in broken], tmp_path)
    train(broken, stop, 7)
    run = resume({"rules": [rule]}, states)
    train(run, stop, 7)
    assert_same(run, straight)
    assert run[2].sparsity == straight[2].sparsity > 0.2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"end": None}, "rules[0].stable: 0.9 requires end, by which pruning begins in any case"),
    ({"at_init": True}, "rules[0].at_init: True cannot be combined with stable. Allowed: False"),
    ({"mode": "lock", "target": {}, "pattern": "unstructured"}, "rules[0].mode: 'lock' cannot be combined with stable"),
    ({"start": "stabel"}, "rules[0].start: 'stabel' is not allowed. Allowed: a number"),
    ({"stable": 1.5}, "rules[0].stable: 1.5 is not allowed. Allowed: a number in (0, 1]"),
    (
        {"phases": [{"start": 0, "end": 3, "sparsity": 0.5}], "end": None, "start": 0, "pattern": "unstructured"},
        "rules[0].phases: 1 of them cannot be combined with stable. Allowed: []",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[next(iter(one)) for one, _ in REFUSED])
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"rules": [{**RULE, **options}]})
    assert str(caught.value).startswith(message)


def test_the_times_of_a_rule_that_has_begun_are_made_once_and_follow_the_steps_of_an_epoch() -> None:
    pruner = pruner_of(net(), end=6.5)
    (rule,) = pruner.engine.rules
    rule.state.opened = 4
    assert rule.times is rule.times and rule.times.first == 4
    rule.count(10)
    rule.state.opened = 41
    assert (rule.times.counts, rule.times.first, rule.times.last) == ("step", 41, 61)


def test_data_of_second_order_moves_weights_and_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    before = copy.deepcopy(model.state_dict())
    rule = {**RULE, "pattern": "unstructured", "criterion": "obs"}
    pruner = Pruning(model, {"rules": [rule]})
    with pytest.raises(PruningError, match=r"rules\[0\]\.stable: 0\.9 compares masks .* and 'obs' with data"):
        pruner.calibrate_with([(torch.randn(4, 8), torch.randint(2, (4,)))], nn.functional.cross_entropy)
    assert unchanged(model, before)


def test_start_in_words_is_a_spelling() -> None:
    rule = load_config({"rules": [{"target": {"sparsity": 0.5}, "start": "stable", "end": 4}]}).rules[0]
    assert (rule.start, rule.stable) == (0, 0.95)


def test_the_plan_says_that_pruning_waits() -> None:
    rule = load_config({"rules": [RULE]}).rules[0]
    lines = rule_lines(rule, 0, None, None)
    assert "  begins  when masks agree by 0.9 with those before; drawn as if at 0" in lines
