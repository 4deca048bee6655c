"""Averages of trainers: looked through, attached later, cleared or named where a removal leaves them behind."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining import Pruning
from pruningawaretraining.errors import ConfigError, ModelError

INPUTS = torch.randn(1, 3, 8, 8)
HALF = {"rules": [{"target": {"sparsity": 0.5}, "scope": "local", "start": 0, "end": 0}]}
FROZEN = "does not follow the model any more"


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 2),
    )  # fmt: skip


class Cached:
    """No module, holds one, and caches lists of tensors at its first update, under a name of its own."""

    def __init__(self, model: nn.Module, name: str = "_pairs", inside: str = "ema", every: int = 1) -> None:
        setattr(self, inside, copy.deepcopy(model).requires_grad_(False))
        self.name, self.inside, self.every, self.calls = name, inside, every, 0
        setattr(self, name, None)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.calls += 1
        if self.calls % self.every:
            return
        if getattr(self, self.name) is None:
            others, average = model.state_dict(), getattr(self, self.inside).state_dict()
            pairs = [(value, others[key]) for key, value in average.items() if value.is_floating_point()]
            setattr(self, self.name, pairs)
        for value, other in getattr(self, self.name):
            value.lerp_(other, 0.5)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *averages: Any) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    for one in averages:
        one.update(model)


def trained(average: Any, model: nn.Module, before: int, after: int, give: Any = None) -> Pruning:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner = Pruning(model, HALF, example_inputs=INPUTS, optimizer=optimizer, ema=average if give is None else give)
    for _ in range(before):
        step(model, optimizer, average)
    assert pruner.prune(model, 0) == "removed"
    for _ in range(after):
        step(model, optimizer, average)
    return pruner


@pytest.mark.parametrize("inside", ["ema", "module", "ema_model"])
def test_an_object_is_looked_through_and_its_known_list_is_made_anew(
    inside: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    average = Cached(model, inside=inside)
    trained(average, model, 2, 30)
    assert FROZEN not in caplog.text
    for name, value in getattr(average, inside).named_parameters():
        torch.testing.assert_close(value, model.get_parameter(name), rtol=0.05, atol=5e-3, msg=name)


def test_an_unknown_list_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    average = Cached(model, name="_mine")
    with caplog.at_level(logging.WARNING):
        trained(average, model, 2, 6)
    said = [one.getMessage() for one in caplog.records if FROZEN in one.getMessage()]
    assert len(said) == 1 and said[0].startswith("ema: Cached ") and "pruner.after_removal" in said[0]


def test_a_list_that_only_the_module_of_was_given_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    average = Cached(model)
    trained(average, model, 2, 4, give=average.ema)
    assert "ema: Sequential does not follow" in caplog.text


@pytest.mark.parametrize("every", [1, 4])
def test_averages_that_go_on_are_not_named(every: int, caplog: pytest.LogCaptureFixture) -> None:
    """Every step, or rarely; also one that has never been updated."""
    model = net()
    average = Cached(model, every=every)
    idle = copy.deepcopy(model)
    trained(average, model, 8, 20, give=[average, idle])
    assert FROZEN not in caplog.text


def test_one_that_has_stopped_altogether_is_named_after_three_times_its_pace(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    average = Cached(model, every=2)
    pruner = trained(average, model, 8, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner.attach(optimizer)
    for _ in range(6):
        step(model, optimizer)
    assert FROZEN not in caplog.text
    for _ in range(6):
        step(model, optimizer)
    assert caplog.text.count(FROZEN) == 1


def test_after_removal_is_called_once_everything_has_followed() -> None:
    model = net()
    average = copy.deepcopy(model)
    pruner = Pruning(model, HALF, example_inputs=INPUTS, ema=average)
    seen: list[tuple[int, int]] = []
    pruner.after_removal = lambda: seen.append((model[0].out_channels, average[0].out_channels))
    pruner.prune(model, 0)
    assert seen == [(4, 4)]
    again = Pruning(other := net(), HALF, example_inputs=INPUTS)
    again.after_removal = lambda: seen.append((other[0].out_channels, 0))
    again.load_state_dict(pruner.state_dict())
    assert seen == [(4, 4), (4, 0)], "a state that brings a removal, too"


def test_an_average_that_is_made_later_is_attached() -> None:
    model = net()
    pruner = Pruning(model, HALF, example_inputs=INPUTS)
    average = Cached(model)
    pruner.attach_ema(average)
    pruner.attach_ema([average.ema])  # known already
    pruner.prune(model, 0)
    assert average.ema[0].out_channels == 4
    with pytest.raises(ModelError, match="ema: Sequential holds no copy of the Sequential as it is now"):
        pruner.attach_ema(net())
    with pytest.raises(ConfigError, match="ema: 3 is a int"):
        pruner.attach_ema(3)


def test_accelerates_own_resume_needs_no_file_of_the_pruner(tmp_path: Any) -> None:
    """The weights that it saves hold the state, and bring masks and architecture back."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    from pruningawaretraining.checkpoint.records import PRUNER_KEY

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    model = net()
    pruner = Pruning(model, HALF, example_inputs=INPUTS)
    pruner.state_in(model)
    prepared = accelerator.prepare(model)
    assert pruner.prune(prepared, 0) == "removed"
    accelerator.save_state(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    other = net()
    again = Pruning(other, HALF, example_inputs=INPUTS)
    again.state_in(other)
    accelerator.prepare(other)
    accelerator.load_state(tmp_path)
    assert other[0].out_channels == 4 and again.phase == pruner.phase == "finetune"
    for name, value in model.state_dict().items():
        assert name == PRUNER_KEY or torch.equal(value, other.state_dict()[name]), name
    AcceleratorState._reset_state(reset_partial_state=True)


# --- averages that are no modules -----------------------------------------------------------------------------------


class Shadow:
    """Keeps tensors, as hand-written averages do."""

    def __init__(self, model: nn.Module, make: Any) -> None:
        self.shadow = make(model)

    def update(self, model: nn.Module) -> None:
        """What it does does not matter."""


KEPT: dict[str, Any] = {
    "list of parameters": lambda model: [one.detach().clone() for one in model.parameters()],
    "dict of parameters": lambda model: {name: one.detach().clone() for name, one in model.named_parameters()},
    "copied state dict": lambda model: copy.deepcopy(model.state_dict()),
    "dict of a state dict": lambda model: {name: one.clone() for name, one in model.state_dict().items()},
}


@pytest.mark.parametrize("kept", KEPT)
def test_an_average_of_tensors_is_named_before_its_next_update_and_made_anew(
    kept: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    average = Shadow(model, KEPT[kept])
    pruner = Pruning(model, HALF, example_inputs=INPUTS)
    said = "tensors in average.shadow have the shapes that the model's parameters had"
    with caplog.at_level(logging.WARNING):
        assert pruner.prune(model, 0) == "removed"
    assert caplog.text.count(said) == 1 and "pruner.after_removal" in caplog.text
    again, caplog_text = net(), caplog.text.count(said)
    average = Shadow(again, KEPT[kept])
    other = Pruning(again, HALF, example_inputs=INPUTS)
    other.after_removal = lambda: setattr(average, "shadow", KEPT[kept](again))
    other.prune(again, 0)
    assert caplog.text.count(said) == caplog_text, "it was made anew"
    with pytest.raises(ConfigError, match=r"ema: .*Shadow.* make it anew in pruner\.after_removal"):
        other.attach_ema(average)


def test_a_checkpoint_at_hand_is_no_average(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    checkpoint = {"model": copy.deepcopy(model.state_dict()), "epoch": 3}
    Pruning(model, HALF, example_inputs=INPUTS).prune(model, 0)
    assert checkpoint["epoch"] == 3 and "tensors in" not in caplog.text
