"""Damaged states of channel and element rules together: each loads as it is, or is refused and nothing has changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_books import INPUTS, build, step
from torch import Tensor, nn

from pruningawaretraining import Pruning
from pruningawaretraining.errors import CheckpointError

CHANNELS = {"pattern": "channel", "target": {"sparsity": 0.4}, "end": 2, "name": "widths", "criterion": "taylor"}
ELEMENTS = {"pattern": "2:4", "target": {"sparsity": 0.5}, "end": 5, "name": "fine", "criterion": "snip_momentum"}
CONFIG = {"rules": [CHANNELS, ELEMENTS]}
WRONG: tuple[Any, ...] = (None, "x", -1, 10**30, float("nan"), [], {}, torch.ones(3), torch.full((2, 2), float("nan")))
Run = tuple[nn.Sequential, torch.optim.Optimizer, Pruning]


def trained(epochs: int) -> Run:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruning(model, CONFIG, example_inputs=INPUTS, optimizer=optimizer)
    for epoch in range(epochs):
        step(model, optimizer)
        pruner.prune(model, epoch)
    return model, optimizer, pruner


def paths(nest: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every entry of a state, containers included."""
    items = nest.items() if isinstance(nest, dict) else enumerate(nest) if isinstance(nest, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def changed(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    state = copy.deepcopy(state)
    place = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return state


def photograph(run: Run) -> list[Any]:
    model, optimizer, pruner = run
    momenta = {id(one): kept["momentum_buffer"].tolist() for one, kept in optimizer.state.items()}
    tensors = {name: (id(one), one.tolist()) for name, one in model.state_dict(keep_vars=True).items()}
    feeds = [_plain(one.feed.state_dict()) for one in pruner.engine.rules]
    rules = [_plain(vars(one.state).copy()) for one in pruner.engine.rules]
    masks = {name: keep.tolist() for name, keep in pruner.masks.items()}
    hooks = [len(one._post_accumulate_grad_hooks or {}) for one in model.parameters()]
    ids = [[id(one) for one in group["params"]] for group in optimizer.param_groups]
    random = torch.get_rng_state().tolist()
    return [momenta, tensors, feeds, rules, masks, hooks, ids, pruner.steps, pruner.phase, random]


def _plain(nest: Any) -> Any:
    if isinstance(nest, dict):
        return {key: _plain(value) for key, value in nest.items()}
    if isinstance(nest, list):
        return [_plain(value) for value in nest]
    return nest.tolist() if isinstance(nest, Tensor) else nest


EARLY, LATE = 1, 4  # before channels go, and after it


@pytest.mark.parametrize("epochs", [EARLY, LATE])
def test_every_entry_is_looked_at_before_anything_changes(epochs: int) -> None:
    state = trained(LATE)[2].state_dict()
    run, refused = trained(epochs), 0
    loaded: list[Any] = []
    before = photograph(run)
    ways = [path for path in paths(state) if path[0] not in ("config", "rng")]
    assert len(ways) > 40
    for number, path in enumerate(ways):
        for value in WRONG[number % 3 :: 3]:
            try:
                run[2].load_state_dict(changed(state, path, value))
            except CheckpointError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 500, path
                assert photograph(run) == before, path
            else:
                loaded.append((path, value))
                run = trained(epochs)
                before = photograph(run)
    assert refused > 5 * len(loaded), (refused, loaded)
    run[2].load_state_dict(state)
    assert run[2].sparsity == trained(LATE)[2].sparsity


def test_generators_are_put_back_only_if_asked() -> None:
    state = trained(LATE)[2].state_dict()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run = trained(0)
    before = torch.get_rng_state()
    run[2].load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), before)
    run[2].load_state_dict(state, generators=True)
    assert torch.equal(torch.get_rng_state(), state["rng"]["torch"])
