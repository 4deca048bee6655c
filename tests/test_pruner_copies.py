"""A pruner is not copied: what it knows of a model is about that model alone."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining import Pruner, Pruning
from pruningawaretraining.checkpoint.records import summary_of
from pruningawaretraining.errors import PruningError
from pruningawaretraining.models import wrappers
from pruningawaretraining.models.private import keep_private, private_of

X = torch.linspace(-1, 1, 24).reshape(4, 6)
CONFIG = {"rules": [{"target": {"sparsity": 0.5}, "end": 3, "application": "mask"}]}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a tuple": lambda one: copy.deepcopy((one.model, one)),
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "torch.save": lambda one: torch.save({"pruner": one}, io.BytesIO()),
}


@pytest.mark.parametrize("how", list(COPIES))
def test_a_copy_of_a_pruner_is_refused_and_says_what_to_do(how: str) -> None:
    model = net()
    pruner = Pruning(model, CONFIG, example_inputs=X, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(PruningError, match=r"a pruner cannot be copied or pickled.*load_state_dict") as caught:
        COPIES[how](pruner)
    assert "\n" not in str(caught.value)
    assert pruner.prune(model, 0) == "masked"


def test_the_three_line_form_is_not_copied_either() -> None:
    with pytest.raises(PruningError, match="cannot be copied"):
        copy.deepcopy(Pruner(net(), 0.5, example_inputs=X))


def test_what_the_message_advises_gives_an_equal_pruner_of_the_copy() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruning(model, CONFIG, example_inputs=X, optimizer=optimizer)
    pruner.prune(model, 0)
    twin, other = net(), None
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    again = Pruning(twin, pruner.config, example_inputs=X, optimizer=other)
    again.load_state_dict(pruner.state_dict())
    twin.load_state_dict(model.state_dict())
    for step in (optimizer, other):
        step.zero_grad()
    for one, step in ((model, optimizer), (twin, other)):
        one(X).square().sum().backward()
        step.step()
    assert torch.equal(pruner.masks["0"], again.masks["0"]) and not pruner.masks["0"].all()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_copies_of_a_model_keep_its_record_and_not_its_pruner() -> None:
    model = net()
    pruner = Pruning(model, CONFIG, example_inputs=X)
    pruner.state_in(model)
    pruner.prune(model, 0)
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for twin in (copy.deepcopy(model), copy.copy(model), torch.load(pickled, weights_only=False)):
        found = {name for name in vars(twin) if name.startswith("_pruning_") and private_of(twin, name) is not None}
        assert found == set()
        assert summary_of(twin)["sparsity"] == summary_of(model)["sparsity"] == pruner.sparsity
        assert Pruning(twin, CONFIG, example_inputs=X).phase != "done"  # no other pruner is at work on it
    assert pruner.phase == "prune"


def test_a_private_value_is_of_one_module() -> None:
    one, other = net(), net()
    keep_private(one, "_value", 3)
    vars(other)["_value"] = vars(one)["_value"]
    assert private_of(one, "_value") == 3 and private_of(other, "_value") is None
    assert private_of(other, "_missing") is None


class Wrapped(DistributedDataParallel):
    """Registers its module as the real one does, without processes."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def test_wrappers_are_noticed_when_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrappers, "world_size", lambda: 2)
    model, stranger = net(), net()
    early = Wrapped(stranger)
    Pruning(model, CONFIG, example_inputs=X)
    first, compiled = Wrapped(model), Wrapped(torch.compile(model))  # type: ignore[arg-type]
    assert wrappers.wrappers_of(model) == [first, compiled]
    first.module = model  # as when it is made anew in its place
    assert wrappers.wrappers_of(model) == [compiled, first]
    del compiled
    assert wrappers.wrappers_of(model) == [first]
    vars(stranger).pop(wrappers.ATTRIBUTE, None)  # as if nothing had noticed it
    assert wrappers.wrappers_of(stranger) == []
    wrappers.watch_wrappers(early)
    assert wrappers.wrappers_of(stranger) == [early]
    monkeypatch.setattr(wrappers, "world_size", lambda: 1)
    assert wrappers.wrappers_of(model) == []
