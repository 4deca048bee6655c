"""The last event of a training: whatever it decided is in the model, the report and the file, for every dynamic."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_loops import fitted, network
from torch import Tensor, nn

from pruningawaretraining import Pruning, load_pruned, save_pruned
from pruningawaretraining.registry import names

DYNAMICS: dict[str, Any] = {
    "frozen": "frozen",
    "straight_through": {"type": "straight_through", "refresh": 1},
    "regrow": "regrow",
    "regrow uniform": {"type": "regrow", "layers": "uniform"},
    "regrow criterion": {"type": "regrow", "layers": "criterion"},
    "regrow random": {"type": "regrow", "by": "random"},
    "alternate": "alternate",
    "soft": {"type": "soft", "steps": 50},
    "rewind": {"type": "rewind", "to": 1},
}
CRITERIA = ("l1", "taylor", "snip_momentum", "movement", "wanda", "random")
TIMES: dict[str, dict[str, Any]] = {
    "epochs": {"start": 0, "end": 3},
    "one event": {"start": 3, "end": 3},
    "steps": {"unit": "step", "start": 2, "end": 8, "every": 2},
    "every step": {"unit": "step", "start": 5, "end": 8},
}
EPOCHS, STEPS, SPARSITY = 4, 2, 0.6


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(16, 16, generator=generator), torch.randint(4, (16,), generator=generator)


def config(dynamic: Any, criterion: str = "l1", **options: Any) -> dict[str, Any]:
    rule = {
        "pattern": "unstructured",
        "criterion": criterion,
        "layers": ["0", "2"],
        "target": {"sparsity": SPARSITY},
        "dynamic": dynamic,
    }
    return {"rules": [{**rule, **options}]}


def trained(given: dict[str, Any], epochs: int = EPOCHS, log: Any = None) -> tuple[nn.Sequential, Pruning]:
    """The README's loop: prune at the end of each epoch."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner, data = Pruning(model, given, optimizer=optimizer), batches()
    for epoch in range(epochs):
        for _ in range(STEPS):
            inputs, targets = next(data)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        pruner.prune(model, epoch, log=log)
    return model, pruner


def zeros(model: nn.Module) -> float:
    weights = [model.get_parameter(f"{name}.weight") for name in ("0", "2")]
    return sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)


def check_books(model: nn.Module, pruner: Pruning, path: Path) -> float:
    """The file holds the zeros that are reported, and says the phase that the pruner is in; the zeros."""
    save_pruned(model, path)
    loaded = load_pruned(network(), path)
    assert zeros(loaded) == zeros(model) >= pruner.sparsity - 1e-6  # weights that came back may still be 0
    described = Pruning(loaded, config("frozen")).record
    assert described is not None
    assert (described["phase"], described["sparsity"]) == (pruner.phase, pytest.approx(pruner.sparsity))
    return pruner.sparsity


ENDS = [
    *itertools.product(DYNAMICS, ["l1"], TIMES),
    *itertools.product(["frozen"], CRITERIA[1:], ["steps"]),
    *itertools.product(["regrow"], CRITERIA[1:], ["epochs"]),
]


@pytest.mark.parametrize(("dynamic", "criterion", "times"), ENDS)
def test_the_target_is_met_when_the_last_event_ends_the_training(
    dynamic: str, criterion: str, times: str, tmp_path: Path
) -> None:
    model, pruner = trained(config(DYNAMICS[dynamic], criterion, **TIMES[times]))
    before = check_books(model, pruner, tmp_path / "before.safetensors")
    met = before == pytest.approx(SPARSITY, abs=2e-3)
    assert met == (pruner.phase == "finetune")
    assert met or dynamic == "soft"  # fades
    pruner.on_train_end()
    after = check_books(model, pruner, tmp_path / "after.safetensors")
    assert after == pytest.approx(SPARSITY, abs=2e-3)
    assert pruner.phase == "done"


def test_every_dynamic_is_tried() -> None:
    assert {name.split()[0] for name in DYNAMICS} == set(names("dynamic"))


@pytest.mark.parametrize("dynamic", list(DYNAMICS))
def test_the_target_is_met_at_the_end_of_lightning(dynamic: str) -> None:
    data = itertools.islice(batches(), STEPS)
    chosen = config(DYNAMICS[dynamic], **TIMES["epochs"])
    model, callback = fitted(
        chosen, lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9), data, EPOCHS
    )
    assert zeros(model) >= SPARSITY - 2e-3
    assert callback.pruner.sparsity == pytest.approx(SPARSITY, abs=2e-3)


def test_every_event_is_told_to_the_loops_log() -> None:
    """Events of regrow wait for the next step; the function that prune was given hears of them then."""
    lines: list[str] = []
    trained(config("regrow", **TIMES["epochs"]), log=lines.append)
    assert [line.split(": ")[1] for line in lines] == [f"epoch {number}" for number in range(4)]


def test_an_event_that_waits_when_the_training_ends_takes_place_without_gradients() -> None:
    """A training that ends before 'end': the masks are those that the schedule asked for by then."""
    model, pruner = trained(config({"type": "regrow", "layers": "uniform"}, start=0, end=5, schedule="linear"))
    assert zeros(model) == pytest.approx(SPARSITY * 3 / 6, abs=2e-3)  # that of epoch 3 waits
    pruner.on_train_end()
    assert zeros(model) == pytest.approx(SPARSITY * 4 / 6, abs=2e-3)
    assert pruner.sparsity == pytest.approx(SPARSITY * 4 / 6, abs=2e-3)


def test_an_event_that_never_gets_its_gradients_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    pruner = Pruning(model, config("frozen", "taylor", start=0, end=0))
    pruner.prune(model, 0)
    with caplog.at_level(logging.WARNING):
        pruner.on_train_end()
    assert "rules[0]: its event in epoch 0 waited for gradients, and none came: nothing is pruned" in caplog.text
    assert "never pruned" not in caplog.text


def test_the_last_event_takes_the_place_of_one_that_waits() -> None:
    """No gradient was seen from the first event to the last one: the first step makes up for both."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = Pruning(model, config("frozen", "taylor", start=0, end=3), optimizer=optimizer)
    for epoch in range(4):
        pruner.prune(model, epoch)
    inputs, targets = next(batches())
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    assert zeros(model) == pytest.approx(SPARSITY, abs=2e-3)
    assert pruner.phase == "finetune"


def test_a_fade_that_is_not_over_is_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, pruner = trained(config(DYNAMICS["soft"], **TIMES["epochs"]))
    assert pruner.phase == pruner.report().phase == "prune"
    with caplog.at_level(logging.WARNING):
        save_pruned(model, tmp_path / "fading.safetensors")
    assert "rules[0]: the masks of its last event are not all in force yet: sparsity 0.4" in caplog.text
    pruner.on_train_end()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        save_pruned(model, tmp_path / "masked.safetensors")
    assert "in force" not in caplog.text


def test_a_member_of_a_family_is_what_it_says_when_it_is_told(tmp_path: Path) -> None:
    """Its fade is over before it is handed on."""
    rule = config({"type": "soft", "steps": 50})["rules"][0] | {
        "target": {"sparsity": [0.3, 0.6]},
        "start": 0,
        "end": 3,
    }
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner, found = Pruning(model, {"rules": [rule]}, optimizer=optimizer), dict[str, float]()
    pruner.on_member = lambda member: found.update({member.name: zeros(member.model)})
    for epoch in range(8):
        pruner.prune(model, epoch)
    pruner.on_train_end()
    assert found == {"sparsity-0.30": pytest.approx(0.3, abs=2e-3), "sparsity-0.60": pytest.approx(0.6, abs=2e-3)}


def test_what_is_saved_once_the_pruner_is_gone_is_what_the_training_ended_with(tmp_path: Path) -> None:
    model, pruner = trained(config(DYNAMICS["soft"], **TIMES["epochs"]))
    pruner.on_train_end()
    del pruner
    save_pruned(model, tmp_path / "pruned.safetensors")
    loaded = load_pruned(network(), tmp_path / "pruned.safetensors")
    assert Pruning(loaded, config("frozen")).record["sparsity"] == pytest.approx(SPARSITY, abs=2e-3)  # type: ignore[index]
