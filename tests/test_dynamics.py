"""Dynamics: each computes what its table says, by hand-computed values of one layer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from dynamic_loops import step as take_step
from torch import Tensor, nn

from pruningawaretraining import Pruning
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping, GroupSet
from pruningawaretraining.masks.changing_masks import Alternate, Regrow, erk, exchanged
from pruningawaretraining.masks.dynamics import Event
from pruningawaretraining.registry import build

RULE: dict[str, Any] = {
    "pattern": {"type": "unstructured", "spare_last": False},
    "criterion": "l1",
    "schedule": "one_shot",
    "target": {"sparsity": 0.5},
}


def layer(*weights: float) -> nn.Linear:
    """A linear layer with one output, and these weights."""
    made = nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([weights]))
    return made


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, *gradients: Tensor) -> list[list[float]]:
    """The weights after each of these gradients."""
    found = []
    for gradient in gradients:
        optimizer.zero_grad()
        (model.weight * gradient).sum().backward()  # type: ignore[operator]
        optimizer.step()
        found.append([round(one, 4) for one in model.weight.detach().flatten().tolist()])  # type: ignore[operator,union-attr]
    return found


def pruned(model: nn.Module, dynamic: Any, **options: Any) -> tuple[Pruning, torch.optim.Optimizer]:
    """A pruner of a model and its optimizer: SGD with a rate of 0.1."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruning(model, {"rules": [{**RULE, "dynamic": dynamic, **options}]}, optimizer=optimizer)
    return pruner, optimizer


ONES = torch.ones(1, 4)
RISING = torch.tensor([[1.0, 1.0, -1.0, -5.0]])

STEPS = {
    # masked: the two of 0.1 and 0.2; their gradients are masked, too
    "frozen": ("frozen", [RISING], [[0.9, 0.8, 0.0, 0.0]]),
    # dense values move on: 0.2 + 0.1 = 0.3 and 0.1 + 0.5 = 0.6; masks stay between events
    "straight_through": (
        {"type": "straight_through", "decay": 0.0, "refresh": 0},
        [RISING],
        [[0.9, 0.8, 0.0, 0.0]],
    ),
    # chosen anew after each step: the dense values are then (0.9, 0.8, 0.3, 0.6), (0.8, 0.7, 0.4, 1.1), and so on
    "refreshed": (
        {"type": "straight_through", "decay": 0.0, "refresh": 1},
        [RISING, RISING, RISING],
        [[0.9, 0.8, 0.0, 0.0], [0.8, 0.0, 0.0, 1.1], [0.7, 0.0, 0.0, 1.6]],
    ),
    # the weights to go are 0.2 and 0.1: halved after each of two steps, then masked
    "soft": (
        {"type": "soft", "factor": 0.5, "steps": 2},
        [ONES, ONES, ONES],
        [[0.9, 0.8, 0.05, 0.0], [0.8, 0.7, 0.0, 0.0], [0.7, 0.6, 0.0, 0.0]],
    ),
}


@pytest.mark.parametrize("kind", list(STEPS))
def test_weights_after_every_step(kind: str) -> None:
    dynamic, gradients, expected = STEPS[kind]
    model = layer(1.0, 0.9, 0.2, 0.1)
    pruner, optimizer = pruned(model, dynamic)
    pruner.prune(model, 0)
    assert trained(model, optimizer, *gradients) == expected


def test_decay_pulls_dense_values_of_masked_weights_towards_0() -> None:
    model = layer(1.0, 0.9, 0.2, 0.1)
    pruner, optimizer = pruned(model, {"type": "straight_through", "decay": 2.0, "refresh": 0})
    pruner.prune(model, 0)
    trained(model, optimizer, torch.zeros(1, 4), torch.zeros(1, 4))
    store = pruner._session.engine.masks[0].store
    assert store is not None
    assert store.packed({id(model.weight): "w"})["w"].tolist() == pytest.approx([0.2 * 0.8**2, 0.1 * 0.8**2])
    assert model.weight.detach().tolist() == [pytest.approx([1.0, 0.9, 0.0, 0.0])]


def test_a_weight_comes_back_with_its_dense_value_at_an_event() -> None:
    model = layer(1.0, 0.9, 0.2, 0.1)
    pruner, optimizer = pruned(
        model, {"type": "straight_through", "decay": 0.0, "refresh": 0}, end=1, target={"sparsity": 0.5}
    )
    pruner.prune(model, 0)
    trained(model, optimizer, RISING, RISING)
    pruner.prune(model, 1)
    assert model.weight.detach().tolist() == [pytest.approx([0.8, 0.0, 0.0, 1.1])]
    pruner.on_train_end()
    trained(model, optimizer, ONES)
    assert model.weight.detach().tolist() == [pytest.approx([0.7, 0.0, 0.0, 1.0])]


def test_alternate_lifts_masks_in_every_other_phase_and_ends_masked() -> None:
    model = layer(1.0, 0.9, 0.2, 0.1)
    pruner, optimizer = pruned(model, "alternate", end=3)
    seen = []
    for epoch in range(5):
        pruner.prune(model, epoch)
        seen.append((pruner.sparsity, *trained(model, optimizer, RISING)))
    assert seen == [
        (0.5, [0.9, 0.8, 0.0, 0.0]),
        (0.0, [0.8, 0.7, 0.1, 0.5]),  # dense: the zeros move on from 0
        (0.5, [0.7, 0.6, 0.0, 0.0]),
        (0.5, [0.6, 0.5, 0.0, 0.0]),  # the last event masks
        (0.5, [0.5, 0.4, 0.0, 0.0]),
    ]


def test_regrow_takes_the_largest_gradients_of_masked_weights() -> None:
    model = layer(1.0, 0.9, 0.8, 0.3, 0.2, 0.1)
    pruner, optimizer = pruned(model, {"type": "regrow", "fraction": 0.8}, end=2)
    pruner.prune(model, 0)
    gradient = torch.tensor([[0.0, 0.0, 0.0, 1.0, -3.0, 2.0]])
    assert trained(model, optimizer, gradient) == [[1.0, 0.9, 0.8, 0.0, 0.0, 0.0]]
    pruner.prune(model, 1)  # waits for gradients: halfway, 0.8 / 2 (1 + cos(pi / 2)) = 0.4 of 3: one goes, one comes
    trained(model, optimizer, gradient)
    assert pruner.masks["weight"].tolist() == [True, True, False, False, True, False]
    pruner.prune(model, 2)  # the end: 0.8 / 2 (1 + cos(pi)) = 0 of 3
    assert pruner.masks["weight"].tolist() == [True, True, False, False, True, False]
    model = layer(1.0, 0.9, 0.8, 0.3, 0.2, 0.1)
    pruner, optimizer = pruned(model, {"type": "regrow", "fraction": 0.8}, end=9)
    pruner.prune(model, 0)
    pruner.prune(model, 1)  # 1 / 9 of the time: 0.78 of 3 go, that is 2; those of gradients -3 and 2 come
    assert trained(model, optimizer, gradient) == [[1.0, 0.0, 0.0, 0.0, 0.3, -0.2]]
    assert pruner.sparsity == 0.5


def test_rewind_goes_back_to_the_weights_and_momenta_of_a_step() -> None:
    model = layer(1.0, 0.9, 0.2, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    rule = {**RULE, "dynamic": {"type": "rewind", "to": 1}, "start": 1}
    pruner = Pruning(model, {"rules": [rule]}, optimizer=optimizer)
    pruner.prune(model, 0)
    first, *_ = trained(model, optimizer, RISING, RISING, RISING)
    assert first == [0.9, 0.8, 0.3, 0.6]
    pruner.prune(model, 1)  # chosen by the weights of now (0.575, 0.475, 0.625, 2.2...), with the values of step 1
    assert model.weight.detach().tolist() == [pytest.approx([0.0, 0.0, 0.3, 0.6])]
    assert optimizer.state[model.weight]["momentum_buffer"].tolist() == [[0.0, 0.0, -1.0, -5.0]]
    assert trained(model, optimizer, torch.zeros(1, 4)) == [[0.0, 0.0, 0.35, 0.85]]


def with_norm() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("resumed", [None, 0, 1, 2])
@pytest.mark.parametrize("to", [0, 1, 2])
def test_rewind_goes_back_to_the_buffers_of_a_step(to: int, resumed: int | None, closure: bool, loaded: bool) -> None:
    """Those before its first forward pass, of two whose gradients are accumulated."""
    model = with_norm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    chosen = {"rules": [{**RULE, "layers": ["0"], "start": 0, "dynamic": {"type": "rewind", "to": to}}]}
    pruner = Pruning(model, chosen, optimizer=optimizer)
    if loaded:
        other = with_norm()
        other(torch.randn(4, 8))
        model.load_state_dict(other.state_dict())
    kept: list[dict[str, Tensor]] = []
    for step in range(4):
        kept.append(copy.deepcopy(dict(model.named_buffers())))
        if step == resumed:
            state, weights = pruner.state_dict(), copy.deepcopy(model.state_dict())
            model = with_norm()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            pruner = Pruning(model, chosen, optimizer=optimizer)
            pruner.load_state_dict(state)
            model.load_state_dict(weights)
        batches = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(step))

        def evaluate(model: nn.Module = model, optimizer: Any = optimizer, batches: Tensor = batches) -> Tensor:
            optimizer.zero_grad()
            loss = model(batches[0]).square().mean() + model(batches[1]).square().mean()
            loss.backward()
            return loss

        take_step(optimizer, evaluate, closure)
    pruner.prune(model, 0)
    assert {name: value.tolist() for name, value in model.named_buffers()} == {
        name: value.tolist() for name, value in kept[to].items()
    }
    assert not model._load_state_dict_post_hooks


# --- pieces ---------------------------------------------------------------------------------------------------------

EXCHANGES = {
    "one of two": ([1, 1, 0, 0], [3.0, 2.0, 9.0, 9.0], [9.0, 0.0, 1.0, 2.0], 2, 0.5, [1, 0, 0, 1]),
    "none": ([1, 1, 0, 0], [3.0, 2.0, 9.0, 9.0], [9.0, 9.0, 1.0, 2.0], 2, 0.4, [1, 1, 0, 0]),
    "all": ([1, 1, 0, 0], [3.0, 2.0, 9.0, 9.0], [0.0, 0.0, 1.0, 2.0], 2, 1.0, [0, 0, 1, 1]),
    "all of those that grow": ([1, 1, 1, 0], [3.0, 2.0, 1.0, 9.0], [1.0, 1.5, 1.2, 2.0], 3, 1.0, [0, 1, 1, 1]),
    "one that has gone comes back": ([1, 1, 1, 0], [3.0, 2.0, 1.0, 9.0], [9.0, 9.0, 9.0, 2.0], 3, 0.4, [1, 1, 1, 0]),
    "fewer are kept": ([1, 1, 1, 0], [3.0, 2.0, 1.0, 9.0], [9.0, 1.0, 1.0, 2.0], 2, 0.5, [1, 0, 0, 1]),
}


@pytest.mark.parametrize("now", [2, 4, 6, 8, 10])
def test_the_fraction_that_is_exchanged_is_that_of_the_paper(now: int) -> None:
    """alpha / 2 (1 + cos(t pi / T)), t and T counted from the rule's start: 2 to 10."""
    model = layer(*range(1, 101))
    pruner, optimizer = pruned(model, {"type": "regrow", "fraction": 0.5}, start=2, end=10, every=2)
    for epoch in range(2, now + 1):
        pruner.prune(model, epoch)
        before = pruner.masks["weight"]
        if epoch < now:
            trained(model, optimizer, torch.zeros(1, 100))
    trained(model, optimizer, 1.0 - before.float()[None])
    gone = int((before & ~pruner.masks["weight"]).sum())
    assert gone == (int(0.5 / 2 * (1 + math.cos(math.pi * (now - 2) / 8)) * 50 + 1e-9) if now > 2 else 0)


@pytest.mark.parametrize("kind", list(EXCHANGES))
def test_an_exchange_drops_the_lowest_and_grows_the_highest(kind: str) -> None:
    keep, scores, grown, count, fraction, expected = EXCHANGES[kind]
    found = exchanged(torch.tensor(keep).bool(), torch.tensor(scores), torch.tensor(grown), sum(keep), count, fraction)
    assert found.int().tolist() == expected


def test_erk_gives_thin_layers_more() -> None:
    # (4 + 4) / 16 = 0.5 and (10 + 10) / 100 = 0.2: 0.3 * 116 = 34.8 = scale (0.5 * 16 + 0.2 * 100), scale = 34.8 / 28
    assert erk([(4, 4), (10, 10)], [16, 100], 0.3) == pytest.approx([0.5 * 34.8 / 28, 0.2 * 34.8 / 28])
    # at 0.8 of the weights the thin layer is dense, and the other one has the rest: (92.8 - 16) / 100
    assert erk([(4, 4), (10, 10)], [16, 100], 0.8) == pytest.approx([1.0, 0.768])


def event(number: int, last: bool, progress: float = 0.5) -> Event:
    grouping = Grouping("one", (), (GroupSet("a", 0, 4, 1, "", ()),))
    return Event(grouping, torch.tensor([1, 1, 0, 0]).bool(), torch.arange(4.0), number, last, progress, 0.5)


@pytest.mark.parametrize(
    ("number", "last", "masks"), [(0, False, True), (1, False, False), (2, False, True), (3, True, True)]
)
def test_alternate_masks_at_even_events_and_the_last(number: int, last: bool, masks: bool) -> None:
    picked = torch.tensor([0, 0, 1, 1]).bool()
    found = Alternate().choose(event(number, last), lambda: picked)
    assert found.tolist() == (picked if masks else torch.ones(4).bool()).tolist()


def test_random_regrowth_follows_its_seed() -> None:
    found = [Regrow("random", 1.0, "uniform", seed).choose(event(1, False, 0.0), torch.Tensor) for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert all(int(one.sum()) == 2 for one in found)


REFUSED = {
    "unknown": ("straight_trough", "straight_through"),
    "decay": ({"type": "straight_through", "decay": -1.0}, "decay: -1.0 must be 0 or more"),
    "factor": ({"type": "soft", "factor": 1.0}, r"factor: 1.0 must be in \[0, 1\)"),
    "fraction": ({"type": "regrow", "fraction": 0.0}, r"fraction: 0.0 must be in \(0, 1\]"),
    "by": ({"type": "regrow", "by": "magic"}, "Allowed: gradient, random"),
    "to": ({"type": "rewind", "to": -1}, "to: -1 must be 0 or more"),
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_wrong_options_are_refused(kind: str) -> None:
    spec, message = REFUSED[kind]
    with pytest.raises(ConfigError, match=message):
        Pruning(layer(1.0, 2.0), {"rules": [{**RULE, "dynamic": spec}]})


NOT_TOGETHER = {
    "regrow on N:M": ({"pattern": "2:4", "dynamic": "regrow"}, "not supported by the pattern '2:4'"),
    "soft channels": ({"pattern": "channel", "dynamic": "soft"}, "Allowed: frozen, rewind, straight_through"),
    "removal at every event": (
        {"pattern": "channel", "dynamic": "straight_through", "application": "remove"},
        "application: 'remove' needs masks that are final",
    ),
    "rewinding removed channels": (
        {"pattern": "channel", "dynamic": "rewind", "application": "remove"},
        "application: 'remove' needs masks that are final",
    ),
    "parts": ({"dynamic": "alternate", "progressive": 2, "every": 2}, "progressive: 2 needs masks that are final"),
}


@pytest.mark.parametrize("kind", list(NOT_TOGETHER))
def test_what_does_not_go_together_is_refused(kind: str) -> None:
    options, message = NOT_TOGETHER[kind]
    with pytest.raises(ConfigError, match=message):
        Pruning(layer(1.0, 2.0), {"rules": [{**RULE, **options}]})


def test_optimizers_without_hooks_are_refused() -> None:
    model = layer(1.0, 0.9, 0.2, 0.1)
    pruner = Pruning(model, {"rules": [{**RULE, "dynamic": "straight_through"}]})
    pruner.prune(model, 0)
    with pytest.raises(ConfigError, match="has no step hooks"):
        for _ in range(3):
            model.weight.grad = torch.ones(1, 4)
            pruner.on_before_optimizer_step()
            with torch.no_grad():
                model.weight.sub_(0.1)
            pruner.on_after_optimizer_step()


def test_every_dynamic_is_built_from_its_name() -> None:
    for name, nested in {"frozen": True, "straight_through": False, "regrow": False, "alternate": False}.items():
        assert build("dynamic", name).nested is nested
