"""Families: one run stops at a list of targets; each member holds the laws of a run made for it alone."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_latency_target import MadeUp
from torch import Tensor, nn

from pruningawaretraining import Pruning, count_macs, load_pruned, one_shot, registry
from pruningawaretraining.config import load_config
from pruningawaretraining.config.plan import rule_lines
from pruningawaretraining.errors import CheckpointError, ConfigError, TargetError
from pruningawaretraining.session.members import Member

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])
FRACTIONS = [0.7, 0.5, 0.33]
RULE = {"start": 1, "end": 7, "hold": 2, "target": {"macs": FRACTIONS}}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


class Loop:
    """A user's own loop, which may be stopped after any epoch and gone on with."""

    def __init__(self, rule: dict[str, Any], tmp_path: Path | None = None) -> None:
        self.model, self.folder, self.told = build(), tmp_path, list[tuple[Member, float]]()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.pruner = Pruning(self.model, {"rules": [rule]}, example_inputs=IMAGES[:1], optimizer=self.optimizer)
        self.pruner.on_member = self.tell

    def tell(self, member: Member) -> None:
        assert self.pruner.member == member
        self.told.append((member, self.pruner.macs.fraction))
        if self.folder is not None:
            member.save(self.folder)

    def epoch(self, number: int) -> str | None:
        for _ in range(2):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(IMAGES), LABELS).backward()
            self.optimizer.step()
        return self.pruner.prune(self.model, number)


# --- the config -----------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "not decreasing": ({"target": {"macs": [0.5, 0.7]}}, r"target\.macs: 0\.7 does not follow 0\.5 in a list"),
    "twice": ({"target": {"macs": [0.5, 0.5]}}, r"target\.macs: 0\.5 does not follow 0\.5"),
    "one": ({"target": {"latency": [1.0, 0.5]}}, r"target\.latency: 1\.0 in a list is not allowed\. .*\(0, 1\)"),
    "above": ({"target": {"parameters": [1.5, 0.5]}}, r"target\.parameters: 1\.5 in a list"),
    "zero": ({"target": {"peak_memory": [0.5, 0]}}, r"target\.peak_memory: 0 in a list"),
    "text": ({"target": {"macs": ["0.5"]}}, r"target\.macs: '0\.5' in a list"),
    "empty": ({"target": {"macs": []}}, r"target\.macs: a list of 0 is not allowed"),
    "registered": ({"target": {"costs": {"half": [0.3, 0.4]}}}, r"target\.costs\.half: 0\.4 does not follow 0\.3"),
    "lengths": (
        {"target": {"macs": [0.7, 0.5], "parameters": [0.6]}},
        r"target\.parameters: 1 numbers, and macs has",
    ),
    "too early": ({"end": 4}, r"end: 4 is too early for 3 members, 2 epochs apart\. Allowed: 5 or later"),
    "no end": ({"end": None}, r"end: None is too early for 3 members"),
    "no list": ({"target": {"macs": 0.5}}, r"hold: 2 requires a target with a list"),
    "part": ({"hold": 1.5}, r"hold: 1\.5 is not allowed where every is 1"),
    "negative": ({"hold": -1}, r"hold: -1 is not allowed"),
    "final": ({"final_sparsity": 0.9}, r"final_sparsity: 0\.9 does not go with a list of targets"),
    "at_init": ({"at_init": True}, r"at_init: True does not go with a list"),
    "sparsity": ({"target": {"sparsity": [0.5, 0.3]}}, r"target\.sparsity: 0\.3 does not follow 0\.5 in a list"),
    "all of it": ({"target": {"sparsity": [0.5, 1.0]}}, r"target\.sparsity: 1\.0 in a list"),
    "milliseconds": ({"target": {"latency_ms": [2.0, 3.0]}}, r"target\.latency_ms: 3\.0 does not follow 2\.0"),
    "no time": ({"target": {"latency_ms": [2.0, 0.0]}}, r"target\.latency_ms: 0\.0 in a list .* above 0"),
    "initial": (
        {"pattern": "unstructured", "initial": 0.1, "target": {"sparsity": [0.3, 0.5, 0.7]}},
        r"initial: 0\.1 does not go with a list",
    ),
    "pattern": ({"pattern": "unstructured"}, r"target\.macs: .* is not supported by the pattern 'unstructured'"),
}


def half(name: str, module: nn.Module, macs: float) -> float:
    return macs / 2


@pytest.fixture
def registered() -> Iterator[None]:
    registry.register("cost", "half")(half)
    yield
    del registry._ENTRIES["cost"]["half"]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", BAD)
def test_bad_families_are_refused_in_one_line(name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(ConfigError, match=message) as caught:
        load_config({"rules": [{**RULE, **changes}]})
    assert "\n" not in str(caught.value)


def test_only_one_rule_may_have_a_family() -> None:
    rules = [{**RULE, "layers": ["0"]}, {**RULE, "layers": ["3"]}]
    with pytest.raises(ConfigError, match=r"rules\[1\]\.target: rules\[0\] has a list already"):
        load_config({"rules": rules})
    assert load_config({"rules": [rules[0], {**rules[1], "enabled": False}]}).rules[0].target.names[0] == "0.70"


SPANS: dict[str, tuple[dict[str, Any], list[tuple[float, float]]]] = {
    "even": ({"start": 2, "end": 12, "hold": 2}, [(2, 4), (6, 8), (10, 12)]),
    "the first ones get more": ({"start": 2, "end": 11, "hold": 2}, [(2, 4), (6, 8), (10, 11)]),
    "one event each": ({"start": 0, "end": 6, "hold": 3}, [(0, 0), (3, 3), (6, 6)]),
    "every second": ({"start": 0, "end": 12, "hold": 3, "every": 2}, [(0, 2), (5, 7), (10, 12)]),
    "no hold": ({"start": 0, "end": 5, "hold": None}, [(0, 1), (2, 3), (4, 5)]),
    "parts of epochs": ({"start": 0, "end": 2, "hold": 0.5, "every": 0.25}, [(0, 0.5), (1, 1.25), (1.75, 2)]),
    "steps": ({"start": 10, "end": 50, "hold": 5, "every": 10, "unit": "step"}, [(10, 20), (30, 40), (50, 50)]),
}


@pytest.mark.parametrize("name", SPANS)
def test_members_share_the_events_evenly_with_hold_between_them(name: str) -> None:
    changes, expected = SPANS[name]
    rule = load_config({"rules": [{**RULE, **changes}]}).rules[0]
    assert [one.start for one in rule.members()] == pytest.approx([first for first, _ in expected])
    assert [one.end for one in rule.members()] == pytest.approx([last for _, last in expected])
    assert [one.target.macs for one in rule.members()] == FRACTIONS
    assert rule.timeline(8).first == rule.members()[0].timeline(8).first
    assert rule.timeline(8).last == rule.members()[-1].timeline(8).last


def test_check_shows_the_members() -> None:
    rule = load_config({"rules": [{**RULE, "target": {"macs": FRACTIONS, "parameters": 0.9}}]}).rules[0]
    assert [line for line in rule_lines(rule, 0, None, None) if "member" in line] == [
        "  member  0.70: macs <= 0.7, parameters <= 0.9 in epoch 2, events from 1; held until epoch 4",
        "  member  0.50: macs <= 0.5, parameters <= 0.9 in epoch 5, events from 4; held until epoch 7",
        "  member  0.33: macs <= 0.33, parameters <= 0.9 in epoch 7, events from 7; then until the end",
    ]


def test_a_config_goes_through_files_unchanged() -> None:
    config = load_config({"rules": [RULE]})
    assert load_config(json.loads(config.model_dump_json())) == config


# --- the laws, in a user's own loop ---------------------------------------------------------------------------------

COSTS: dict[str, list[float]] = {
    "macs": [0.8, 0.6, 0.5],
    "parameters": [0.8, 0.6, 0.5],
    "peak_memory": [0.8, 0.6, 0.5],
    "half": [0.8, 0.6, 0.5],
    "latency": [0.95, 0.9, 0.8],  # the made-up machine has a constant part
    "latency_ms": [1.45, 1.35, 1.25],
}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("application", ["mask", "remove"])
@pytest.mark.parametrize("cost", COSTS)
def test_every_member_meets_its_target_and_nothing_can_be_given_back(
    cost: str, application: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 4, at the event that reaches a member, for each group that this event took."""
    monkeypatch.setattr("pruningawaretraining.engine.targets._runtime_meter", lambda target, model: MadeUp())
    numbers, timed = COSTS[cost], cost.startswith("latency")
    loop = Loop({**RULE, "end": 9, "target": {cost: numbers}, "application": application})
    coupled, members, looked = loop.pruner.engine.coupled, list[str](), 0
    assert coupled is not None
    (one,) = coupled.rules
    for epoch in range(11):
        before_D = coupled.keep_D.clone()
        loop.epoch(epoch)
        if loop.pruner.member is None or loop.pruner.member.name in members:
            continue
        members.append(loop.pruner.member.name)
        (goal,) = coupled.targets.goals(one, one.members[len(members) - 1])
        dense, reached, slack = goal.cost.dense, goal.cost(coupled.keep_D), 0.0
        if timed:  # it holds where it is measured
            dense, reached, slack = (*(one.state.latencies[-1][key] for key in ("dense_ms", "measured_ms")), 0.01)
        assert goal.budget == pytest.approx(numbers[len(members) - 1] * (1 if cost == "latency_ms" else dense))
        assert reached <= goal.budget * (1 + slack)
        for group in torch.nonzero(before_D & ~coupled.keep_D).flatten().tolist() if not timed else ():
            more_D = coupled.keep_D.clone()
            more_D[group] = True
            assert goal.cost(more_D) > goal.budget, group
            looked += 1
        assert len(coupled.live_D) == int(coupled.keep_D.sum())  # a member is removed, not masked
    assert members == [f"{one:.2f}ms" if cost == "latency_ms" else f"{one:.2f}" for one in numbers]
    assert looked > 0 or timed


SPARSE: dict[str, tuple[Any, list[float]]] = {
    "channel": ("channel", [0.25, 0.5, 0.75]),
    "unstructured": ("unstructured", [0.25, 0.5, 0.75]),
    "4x1": ("4x1", [0.25, 0.5, 0.75]),
    "slice": ({"type": "slice", "block_size": 4}, [0.25, 0.5, 0.75]),
    "2:4": ("2:4", [0.125, 0.25, 0.5]),
}


@pytest.mark.parametrize("name", SPARSE)
def test_a_family_of_sparsities_is_nested_and_each_member_has_its_own(name: str, tmp_path: Path) -> None:
    """Zeros of a member are zeros of the next ones; on the way the schedule goes from member to member."""
    pattern, asked = SPARSE[name]
    layers = {} if name == "channel" else {"layers": ["3"]}
    loop = Loop({**RULE, **layers, "end": 9, "pattern": pattern, "target": {"sparsity": asked}}, tmp_path)
    (one,), seen = loop.pruner.engine.rules, list[float]()
    for epoch in range(11):
        loop.epoch(epoch)
        seen.append(loop.pruner.sparsity)
    loop.pruner.on_train_end()
    a, b, c = asked
    steps = [0, a / 3, 2 * a / 3, a, a, (a + b) / 2, b, b, (b + c) / 2, c, c]  # events 1-3, 5-6, 8-9
    slack = 1 / int(one.grouping.set_sizes.min()) + 1e-6 if name != "channel" else 0.05
    assert one.timelines[0].events() == [1, 2, 3] and one.timelines[2].events() == [8, 9]
    assert seen == pytest.approx(steps, abs=slack)
    assert [member.name for member, _ in loop.told] == [f"sparsity-{value:.2f}" for value in asked] or name == "2:4"
    assert [dict(member.target) for member, _ in loop.told] == [{"sparsity": value} for value in asked]
    if name == "channel":
        widths = [load_pruned(build(), tmp_path / member.file)[3].weight.shape[0] for member, _ in loop.told]
        assert widths == sorted(widths, reverse=True) and len(set(widths)) == 3
        return
    zeros = [load_pruned(build(), tmp_path / member.file)[3].weight == 0 for member, _ in loop.told]
    assert [float(zero.float().mean()) for zero in zeros] == pytest.approx(asked, abs=slack)
    assert all(bool((after | ~before).all()) for before, after in zip(zeros[:-1], zeros[1:], strict=True))


def test_removal_keeps_the_optimizer_alive_at_every_member() -> None:
    """Law 7: all parameters are in the optimizer, with their states sliced and not begun anew."""
    loop, seen = Loop({**RULE, "end": 9}), list[str]()
    for epoch in range(11):
        loop.epoch(epoch)
        parameters = list(loop.model.parameters())
        assert {id(p) for group in loop.optimizer.param_groups for p in group["params"]} == {id(p) for p in parameters}
        for parameter in parameters:
            state = loop.optimizer.state[parameter]
            assert state["exp_avg"].shape == parameter.shape and float(state["step"]) == 2 * (epoch + 1)
        if loop.pruner.member is not None:
            seen.append(loop.pruner.member.name)
    assert list(dict.fromkeys(seen)) == ["0.70", "0.50", "0.33"]


def test_a_member_is_told_once_its_hold_is_over_and_saved_on_request(tmp_path: Path) -> None:
    loop = Loop({**RULE, "end": 9}, tmp_path)
    trained: dict[str, Tensor] = {}
    phases, found = [], []
    for epoch in range(12):
        if (member := loop.pruner.member) is not None:
            loop.model.eval()
            trained[member.name] = loop.model(IMAGES).detach()
            loop.model.train()
        found.append(loop.epoch(epoch))
        phases.append(loop.pruner.phase)
        assert len(loop.told) == sum(epoch >= end for end in (5, 8))
    loop.pruner.on_train_end()
    loop.pruner.on_train_end()
    assert phases[:3] == ["regularize", "prune", "prune"] and phases[3:5] == ["finetune"] * 2
    assert [number for number, one in enumerate(found) if one == "removed"] == [3, 6, 9]
    assert [member.name for member, _ in loop.told] == ["0.70", "0.50", "0.33"]
    assert [dict(member.target) for member, _ in loop.told] == [{"macs": one} for one in FRACTIONS]
    assert [member.file for member, _ in loop.told] == [path.name for path in sorted(tmp_path.iterdir())][::-1]
    for member, kept in loop.told:
        loaded = load_pruned(build(), tmp_path / member.file)
        assert count_macs(loaded, IMAGES[:1]) / count_macs(build(), IMAGES[:1]) == pytest.approx(kept)
        assert kept <= member.target["macs"]
    last = load_pruned(build(), tmp_path / "pruned-0.33.safetensors").eval()
    assert torch.allclose(last(IMAGES), loop.model.eval()(IMAGES), atol=1e-6)


def test_penalties_rest_while_a_member_is_fine_tuned() -> None:
    loop = Loop({**RULE, "end": 9, "regularizer": {"type": "growing_l2", "strength": 1e-2}})
    acting = []
    for epoch in range(9):
        loop.epoch(epoch)
        acting.append(bool(loop.pruner.engine.gradient_penalties()))
    assert acting == [True, True, True, False, False, True, False, False, True]


RESUMED: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude"},
    "taylor": {"criterion": "taylor"},
    "sparsities": {"pattern": "unstructured", "layers": ["3"], "target": {"sparsity": [0.25, 0.5, 0.75]}},
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("stopped", range(10))
def test_resumed_in_the_middle_equals_uninterrupted(stopped: int, name: str) -> None:
    """Law 5, between any two epochs: on the way to a member, in its hold, and after it."""
    rule = {**RULE, "end": 9, **RESUMED[name]}
    whole, first = Loop(rule), Loop(rule)
    for epoch in range(11):
        whole.epoch(epoch)
    for epoch in range(stopped):
        first.epoch(epoch)
    saved = copy.deepcopy([first.pruner.state_dict(), first.model.state_dict(), first.optimizer.state_dict()])
    again = Loop(rule)
    for part, state in zip((again.pruner, again.model, again.optimizer), saved, strict=True):
        part.load_state_dict(state)
    assert again.pruner.member == first.pruner.member
    for epoch in range(stopped, 11):
        again.epoch(epoch)
    assert [one for one, _ in first.told + again.told] == [one for one, _ in whole.told]
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected) and expected.keys() == found.keys()


def test_states_of_another_family_are_refused() -> None:
    loop = Loop({**RULE, "end": 9})
    for epoch in range(10):
        loop.epoch(epoch)
    state = loop.pruner.state_dict()
    with pytest.raises(CheckpointError, match=r"has met 3 of 1 targets"):
        Loop({"start": 1, "end": 3, "target": {"macs": 0.3}}).pruner.load_state_dict(state)
    state["channels"]["rules"][0]["holds"] = 3
    with pytest.raises(CheckpointError, match="holds: 3 is not true or false"):
        Loop({**RULE, "end": 9}).pruner.load_state_dict(state)


def test_a_failing_hook_is_seen_and_nothing_has_changed() -> None:
    """Law 8."""
    loop = Loop({**RULE, "end": 9})

    def fail(member: Member) -> None:
        raise OSError("disk full")

    for epoch in range(5):
        loop.epoch(epoch)
    loop.pruner.on_member = fail
    before = loop.pruner.macs
    with pytest.raises(OSError, match="disk full"):
        loop.epoch(5)
    assert loop.pruner.macs == before and loop.pruner.member is not None
    loop.pruner.on_member = loop.tell
    loop.pruner.prune(loop.model, 5)
    assert [member.name for member, _ in loop.told] == ["0.70"] and loop.pruner.macs.fraction < before.fraction


def test_a_family_goes_on_from_the_file_of_a_member(tmp_path: Path) -> None:
    first = Loop({**RULE, "end": 9}, tmp_path)
    for epoch in range(6):
        first.epoch(epoch)
    model = load_pruned(build(), tmp_path / "pruned-0.70.safetensors")
    pruner = Pruning(model, {"rules": [{**RULE, "end": 5}]}, example_inputs=IMAGES[:1])
    names = []
    pruner.on_member = lambda member: names.append(member.name)
    for epoch in range(8):
        pruner.prune(model, epoch)
    pruner.on_train_end()
    assert names == ["0.50", "0.33"]
    assert 0.2 < count_macs(model, IMAGES[:1]) / count_macs(build(), IMAGES[:1]) <= 0.33


def test_a_family_of_zeros_goes_on_from_the_file_of_a_member(tmp_path: Path) -> None:
    rule = {**RULE, "pattern": "unstructured", "layers": ["3"], "target": {"sparsity": [0.25, 0.5, 0.75]}}
    first = Loop({**rule, "end": 9}, tmp_path)
    for epoch in range(9):
        first.epoch(epoch)
    model = load_pruned(build(), tmp_path / "pruned-sparsity-0.50.safetensors")
    there = model[3].weight == 0
    pruner = Pruning(model, {"rules": [{**rule, "end": 5}]}, example_inputs=IMAGES[:1])
    names, found = [], []
    pruner.on_member = lambda member: names.append(member.name)
    for epoch in range(8):
        pruner.prune(model, epoch)
        found.append(pruner.sparsity)
    pruner.on_train_end()
    assert names == ["sparsity-0.75"]
    assert found == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.75, 0.75], abs=0.01)
    assert bool((model[3].weight[there] == 0).all())


def test_a_training_that_ends_early_names_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop({**RULE, "end": 9})
    for epoch in range(5):
        loop.epoch(epoch)
    with caplog.at_level(logging.WARNING):
        loop.pruner.on_train_end()
    assert [member.name for member, _ in loop.told] == ["0.70"]
    assert "the training ended before 0.50, 0.33: its last event would have been in epoch 9" in caplog.text


def test_the_smallest_member_must_be_in_reach() -> None:
    with pytest.raises(TargetError, match=r"rules\[0\]\.target\.macs: 0\.05 of the dense cost is out of reach"):
        Loop({**RULE, "target": {"macs": [0.7, 0.05]}, "max_sparsity": 0.5})


def test_one_shot_has_no_family() -> None:
    with pytest.raises(ConfigError, match=r"rule\.target\.macs: \[0\.7, 0\.5\] is a family of one training"):
        one_shot(build(), {"target": {"macs": [0.7, 0.5]}, "end": 1}, [(IMAGES, LABELS)], nn.functional.cross_entropy)


def test_members_are_reached_in_steps_as_well() -> None:
    loop = Loop({"unit": "step", "start": 2, "end": 12, "hold": 3, "every": 1, "target": {"macs": FRACTIONS}})
    for epoch in range(8):
        loop.epoch(epoch)
    loop.pruner.on_train_end()
    assert [member.name for member, _ in loop.told] == ["0.70", "0.50", "0.33"]
    assert all(kept <= member.target["macs"] for member, kept in loop.told)
