"""Initial sparsities, phases and fractions of epochs: the sparsity of every event, as an arithmetic and in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pruningawaretraining import Pruning
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.errors import ConfigError

FOUR = [
    {"start": 0, "end": 4, "every": 2, "initial": 0.4, "sparsity": 0.6},
    {"start": 4, "end": 8, "every": 2, "initial": 0.6, "sparsity": 0.75},
    {"start": 8, "end": 9, "initial": 0.75, "sparsity": 0.9},
]

EVENTS: list[tuple[dict[str, Any], int | None, dict[int, float]]] = [
    ({"start": 0, "end": 3}, None, {0: 0.225, 1: 0.45, 2: 0.675, 3: 0.9}),
    ({"start": 0, "end": 3, "initial": 0.4}, None, {0: 0.4, 1: 0.4 + 0.5 / 3, 2: 0.4 + 1 / 3, 3: 0.9}),
    ({"start": 0, "end": 3, "initial": 0.0}, None, {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9}),
    ({"start": 2, "end": 7, "every": 2, "initial": 0.4}, None, {2: 0.4, 4: 0.6, 6: 0.8, 7: 0.9}),
    ({"start": 2, "end": 7, "every": 2}, None, {2: 0.3, 4: 0.6, 6: 0.9}),
    ({"start": 1, "end": 3, "initial": 0.7, "schedule": "cubic"}, None, {1: 0.7, 2: 0.875, 3: 0.9}),
    ({"start": 3, "end": 3, "initial": 0.9}, None, {3: 0.9}),
    ({"start": 0, "end": 3, "initial": "present"}, None, {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9}),
    ({"start": 1, "end": 2, "every": 0.5, "initial": 0.1}, 4, {4: 0.1, 6: 0.5, 8: 0.9}),
    ({"start": 1, "end": 2, "every": 0.5, "initial": 0.1, "steps_per_epoch": 6}, 4, {6: 0.1, 9: 0.5, 12: 0.9}),
    (
        {"start": 0, "end": 2.75, "every": 0.25, "initial": 0.7},
        None,
        {0: 0.7, 1: 0.7 + 0.2 / 2.75, 2: 0.7 + 0.4 / 2.75, 3: 0.9},
    ),
    ({"start": 0.5, "end": 1, "every": 0.1, "initial": 0.4}, 5, {3: 0.5, 4: 0.7, 5: 0.9}),
    ({"start": 0, "end": 1, "every": 0.5}, 4, {0: 0.3, 2: 0.6, 4: 0.9}),
    ({"phases": FOUR}, None, {0: 0.4, 2: 0.5, 4: 0.6, 6: 0.675, 8: 0.75, 9: 0.9}),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "steps", "expected"), EVENTS, ids=range(len(EVENTS)))
def test_events_and_their_sparsities(keys: dict[str, Any], steps: int | None, expected: dict[int, float]) -> None:
    times = Rule(**{"target": {"sparsity": 0.9}, **keys}).timeline(steps)
    assert {now: times.sparsity(now) for now in times.events()} == pytest.approx(expected, abs=1e-9)
    assert [now for now in range(times.first - 2, times.last + 1) if times.is_event(now)] == list(expected)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 5))


def sparsity_of(weight: torch.Tensor) -> float:
    return float((weight == 0).float().mean())


def levels(rule: dict[str, Any], epochs: int, model: nn.Module | None = None) -> list[dict[str, float]]:
    """The sparsity of every weight after ``prune`` of each epoch, two steps an epoch."""
    model = model or small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruning(model, {"rules": [{"pattern": "unstructured", **rule}]}, optimizer=optimizer)
    found = []
    for epoch in range(epochs):
        pruner.prune(model, epoch)
        found.append({name: sparsity_of(weight) for name, weight in model.named_parameters() if weight.dim() == 2})
        for _ in range(2):
            optimizer.zero_grad()
            functional.cross_entropy(model(torch.randn(8, 16)), torch.arange(8) % 5).backward()
            optimizer.step()
    return found


def test_phases_in_training_reach_their_sparsities_with_nested_masks() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rule = {"pattern": "unstructured", "scope": "local", "phases": FOUR, "target": {"sparsity": 0.9}}
    pruner = Pruning(model, {"rules": [rule]}, optimizer=optimizer)
    reached, phases, before = [], [], torch.ones(40, 16, dtype=torch.bool)
    for epoch in range(10):
        pruner.prune(model, epoch)
        keep = pruner.masks["0.weight"].view(40, 16)
        assert not (keep & ~before).any(), "what is masked stays so"
        before = keep
        reached.append(sparsity_of(model[0].weight))
        phases.append(pruner.phase)
        functional.cross_entropy(model(torch.randn(8, 16)), torch.arange(8) % 5).backward()
        optimizer.step()
    assert reached == pytest.approx([0.4, 0.4, 0.5, 0.5, 0.6, 0.6, 0.675, 0.675, 0.75, 0.9], abs=1 / 640)
    assert phases == ["prune"] * 9 + ["finetune"]


def test_a_phase_may_prune_some_layers_of_its_rule() -> None:
    phases = [
        {"start": 0, "end": 1, "initial": 0.4, "sparsity": 0.5},
        {"start": 2, "end": 2, "initial": 0.8, "sparsity": 0.8, "layers": ["2"]},
    ]
    rule = {"phases": phases, "target": {"sparsity": 0.8}, "scope": "local", "layers": ["0", "2"]}
    found = levels(rule, 3)
    assert [one["0.weight"] for one in found] == pytest.approx([0.4, 0.5, 0.5], abs=1e-6)
    assert [one["2.weight"] for one in found] == pytest.approx([0.4, 0.5, 0.8], abs=1e-6)
    wrong = [{**phases[0]}, {**phases[1], "layers": ["4"]}]
    with pytest.raises(ConfigError, match=r"rules\[0\].phases\[1\].layers: \['4'\] selects none of the layers"):
        levels({**rule, "phases": wrong}, 1)


def test_the_end_of_a_phase_and_the_start_of_the_next_fall_together() -> None:
    phases = [
        {"start": 0, "end": 1, "initial": 0.4, "sparsity": 0.6},
        {"start": 1, "end": 2, "initial": 0.7, "sparsity": 0.8, "layers": ["2"]},
    ]
    found = levels({"phases": phases, "target": {"sparsity": 0.8}, "scope": "local", "layers": ["0", "2"]}, 3)
    assert [one["0.weight"] for one in found] == pytest.approx([0.4, 0.6, 0.6], abs=1e-6)
    assert [one["2.weight"] for one in found] == pytest.approx([0.4, 0.7, 0.8], abs=1e-6)


def test_a_phase_by_curvature_leaves_the_other_layers() -> None:
    model = small()
    phases = [
        {"start": 0, "end": 0, "initial": 0.5, "sparsity": 0.5},
        {"start": 1, "end": 1, "initial": 0.75, "sparsity": 0.75, "layers": ["2"]},
    ]
    rule = {
        "pattern": "unstructured",
        "criterion": {"type": "cap", "num_grads": 8, "micro_batch": 2, "fisher_block_size": 8},
        "layers": ["0", "2"],
        "scope": "local",
        "phases": phases,
        "target": {"sparsity": 0.75},
    }
    data = [(torch.randn(8, 16), torch.arange(8) % 5) for _ in range(2)]
    pruner = Pruning(model, {"rules": [rule]})
    pruner.calibrate_with(data, functional.cross_entropy)
    pruner.prune(model, 0)
    first = model[0].weight.detach().clone()
    pruner.prune(model, 1)
    assert sparsity_of(model[0].weight) == 0.5
    assert sparsity_of(model[2].weight) == 0.75
    assert torch.equal(model[0].weight, first)
    assert pruner.sparsity == pytest.approx((0.5 * 640 + 0.75 * 2000) / 2640)


def test_fractions_of_epochs_are_steps_of_the_loader(caplog: pytest.LogCaptureFixture) -> None:
    rule = {"pattern": "unstructured", "start": 0, "end": 1, "every": 0.5, "initial": 0.4, "target": {"sparsity": 0.9}}
    reached = {}
    for loader in ([0] * 4, None):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = Pruning(model, {"rules": [{**rule, "scope": "local"}]}, optimizer=optimizer)
        pruner.on_train_begin(loader)
        found = []
        for epoch in range(2):
            pruner.prune(model, epoch)
            for step in range(4):
                pruner.on_step_begin(step)
                found.append(round(sparsity_of(model[0].weight), 3))
                functional.cross_entropy(model(torch.randn(8, 16)), torch.arange(8) % 5).backward()
                optimizer.step()
        reached[loader is None] = found
    assert reached[False] == pytest.approx([0.4, 0.4, 0.65, 0.65, 0.9, 0.9, 0.9, 0.9], abs=1 / 640)
    assert reached[True] == pytest.approx([0.4] * 4 + [0.9] * 4, abs=1 / 640)
    (warning,) = [one.message for one in caplog.records if one.levelname == "WARNING"]
    assert warning.startswith("rules[0]: its events at fractions of epochs wait for whole epochs")


def test_channels_start_from_an_initial_sparsity_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3))
    rule = {"initial": 0.2, "start": 0, "end": 2, "target": {"sparsity": 0.6}, "layers": ["0"]}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=torch.randn(1, 8))
    widths = []
    for epoch in range(3):
        pruner.prune(model, epoch)
        widths.append(int((model[0].weight != 0).any(1).sum()))
    assert widths == [16, 12, 8]
    assert model[0].out_features == 8
    for keys in ({"initial": "present"}, {"initial": None, "start": 0, "end": None}):
        phases = [{"start": 0, "end": 1, "sparsity": 0.6, "layers": ["0"]}]
        given = {**rule, **keys, **({} if keys["initial"] else {"phases": phases})}
        with pytest.raises(ConfigError, match=r"rules\[0\].initial: 'present', and phases with layers"):
            Pruning(
                nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3)),
                {"rules": [given]},
                example_inputs=torch.randn(1, 8),
            )


def test_a_resumed_run_goes_on_in_its_phase() -> None:
    rule = {"pattern": "unstructured", "scope": "local", "phases": FOUR, "target": {"sparsity": 0.9}}
    model, other = small(), small()
    pruner, resumed = (Pruning(one, {"rules": [rule]}) for one in (model, other))
    for epoch in range(7):
        pruner.prune(model, epoch)
    resumed.load_state_dict(pruner.state_dict())
    other.load_state_dict(model.state_dict())
    for epoch in range(7, 10):
        pruner.prune(model, epoch)
        resumed.prune(other, epoch)
        assert sparsity_of(other[0].weight) == sparsity_of(model[0].weight)
    assert sparsity_of(other[0].weight) == pytest.approx(0.9)
