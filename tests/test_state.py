"""The state of a run: plain data that brings a fresh model, its optimizer and its generators to where the run was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn

from pruningawaretraining import Pruner, Pruning, load_pruned, save_pruned
from pruningawaretraining.checkpoint.records import own_state
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.models.calling import outputs_of

CHANNELS = {
    "target": {"macs": 0.3}, "start": 1, "end": 5, "regularizer": "growing_l2", "scope": "local", "name": "widths",
}  # fmt: skip
SLICES = {
    "pattern": {"type": "slice", "block_size": 4},
    "target": {"sparsity": 0.5},
    "start": 2,
    "end": 5,
    "name": "slices",
}
CONFIGS = {
    "channels": {"rules": [CHANNELS]},
    "removed each time": {"rules": [{**CHANNELS, "application": "remove"}]},
    "at construction": {"rules": [{**CHANNELS, "at_init": True, "start": 0}]},
    "slices": {"rules": [SLICES]},
    "both": {"rules": [CHANNELS, SLICES]},
}
EPOCHS = 7
Run = tuple[nn.Module, torch.optim.Optimizer, Pruning]


def batch(number: int) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))


def begin(config: Any) -> Run:
    model = zoo.architecture("groupnorm")[0].train()
    model.hidden.register_forward_hook(lambda module, args, output: nn.functional.dropout(output, 0.1, module.training))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(1)
    return model, optimizer, Pruning(model, config, example_inputs=batch(0), optimizer=optimizer)


def train(run: Run, first: int, last: int) -> None:
    """Epochs that use every kind of random numbers."""
    model, optimizer, pruner = run
    for epoch in range(first, last):
        optimizer.zero_grad()
        noise = np.random.default_rng(random.getrandbits(30)).random() + np.random.random()
        model(batch(epoch) * (1 + noise)).square().mean().backward()
        optimizer.step()
        pruner.prune(model, epoch)


def seed_everything() -> None:
    torch.manual_seed(3)
    random.seed(4)
    np.random.seed(5)  # noqa: NPY002


def through_a_file(state: Any, folder: Path) -> Any:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def resume(config: Any, states: Any) -> Run:
    run = begin(config)
    seed_everything()
    run[2].load_state_dict(states[2], generators=True)
    run[0].load_state_dict(states[0])
    run[1].load_state_dict(states[1])
    return run


def assert_same(run: Run, other: Run) -> None:
    assert {name: tensor.shape for name, tensor in run[0].state_dict().items()} == {
        name: tensor.shape for name, tensor in other[0].state_dict().items()
    }
    for (name, mine), theirs in zip(run[0].named_parameters(), other[0].parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert run[2].phase == other[2].phase
    assert run[2].sparsity == other[2].sparsity
    assert run[2].steps == other[2].steps
    for name, keep in run[2].masks.items():
        assert torch.equal(keep, other[2].masks[name]), name


@pytest.mark.parametrize("stop", [0, 2, 3, 6])
@pytest.mark.parametrize("name", CONFIGS)
def test_interrupted_equals_uninterrupted(name: str, stop: int, tmp_path: Path) -> None:
    seed_everything()
    straight = begin(CONFIGS[name])
    train(straight, 0, EPOCHS)
    seed_everything()
    broken = begin(CONFIGS[name])
    train(broken, 0, stop)
    states = through_a_file([part.state_dict() for part in broken], tmp_path)
    train(broken, stop, EPOCHS)  # whatever happened after the checkpoint is forgotten
    run = resume(CONFIGS[name], states)
    train(run, stop, EPOCHS)
    assert_same(run, straight)
    assert run[2].sparsity > 0


def trained(config: Any, epochs: int) -> Run:
    run = begin(config)
    train(run, 0, epochs)
    return run


@pytest.mark.parametrize("name", ["channels", "both"])
def test_a_state_is_loaded_twice_and_a_later_one_after_an_earlier(name: str) -> None:
    early, late = trained(CONFIGS[name], 3), trained(CONFIGS[name], EPOCHS)
    assert late[0].conv1.out_channels < early[0].conv1.out_channels == 16
    run = begin(CONFIGS[name])
    run[2].load_state_dict(early[2].state_dict())
    for _ in range(2):
        run[2].load_state_dict(late[2].state_dict())
        run[0].load_state_dict(late[0].state_dict())
        assert outputs_of(run[0], batch(9))[0].equal(outputs_of(late[0], batch(9))[0])
        assert run[2].phase == "finetune"
    train(run, EPOCHS, EPOCHS + 2)  # and nothing is pruned again
    assert run[2].sparsity == late[2].sparsity
    assert run[2].macs == late[2].macs


def test_a_model_that_has_lost_more_than_the_state_is_refused() -> None:
    early, late = trained(CONFIGS["channels"], 3), trained(CONFIGS["channels"], EPOCHS)
    with pytest.raises(CheckpointError, match="has lost channels that the state still has; load into a freshly built"):
        late[2].load_state_dict(early[2].state_dict())


def test_a_state_that_holds_a_member_without_having_one_is_refused() -> None:
    run = trained({"rules": [SLICES]}, 3)
    state = run[2].state_dict()
    state["elements"]["rules"][0]["state"]["holds"] = True
    with pytest.raises(CheckpointError, match="holds: True"):
        run[2].load_state_dict(state)
    assert run[2].phase == "prune"


def test_a_pruned_file_is_no_dense_model_for_a_state(tmp_path: Path) -> None:
    late = trained(CONFIGS["channels"], EPOCHS)
    save_pruned(late[0], tmp_path / "m.safetensors")
    model = load_pruned(zoo.architecture("groupnorm")[0], tmp_path / "m.safetensors")
    pruner = Pruning(model, CONFIGS["channels"], example_inputs=batch(0))
    with pytest.raises(CheckpointError, match="Build the model as it was before pruning"):
        pruner.load_state_dict(late[2].state_dict())


def test_inference_takes_the_architecture_and_prunes_nothing() -> None:
    late = trained(CONFIGS["channels"], EPOCHS)
    model = zoo.architecture("groupnorm")[0]
    pruner = Pruning(model, {**CONFIGS["channels"], "infer": True}, example_inputs=batch(0))
    pruner.load_state_dict(late[2].state_dict())
    model.load_state_dict(late[0].state_dict())
    late[0].hidden._forward_hooks.clear()
    assert outputs_of(model, batch(9))[0].equal(outputs_of(late[0], batch(9))[0])
    pruner.prune(model, 99)
    assert outputs_of(model, batch(9))[0].equal(outputs_of(late[0], batch(9))[0])


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_the_three_line_form_resumes_without_inputs_of_its_own(stop: int, tmp_path: Path) -> None:
    def begin_short() -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        model = zoo.architecture("groupnorm")[0].train()
        pruner = Pruner(model, target_sparsity=0.5, total_steps=4)
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), pruner

    def epochs(run: tuple[nn.Module, torch.optim.Optimizer, Pruner], first: int, last: int) -> None:
        model, optimizer, pruner = run
        for epoch in range(first, last):
            optimizer.zero_grad()
            model(batch(epoch)).square().mean().backward()
            optimizer.step()
            pruner.step()

    straight, broken = begin_short(), begin_short()
    epochs(straight, 0, 6)
    epochs(broken, 0, stop)
    states = through_a_file([part.state_dict() for part in broken], tmp_path)
    run = begin_short()
    run[2].load_state_dict(states[2], generators=True)
    run[0].load_state_dict(states[0])
    run[1].load_state_dict(states[1])
    epochs(run, stop, 6)
    for mine, theirs in zip(run[0].parameters(), straight[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert run[2].epoch == 6
    with pytest.raises(CheckpointError, match="it is not from Pruner"):
        run[2].load_state_dict(run[2].pruning.state_dict())


def other_model() -> Any:
    model = zoo.architecture("shapes")[0]
    return Pruning(model, {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=batch(0)).state_dict()


def without(state: Any, *path: Any) -> Any:
    """The state with one entry left out."""
    state = copy.deepcopy(state)
    place = state
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return state


def changed(state: Any, value: Any, *path: Any) -> Any:
    state = copy.deepcopy(state)
    place = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return state


DAMAGED: list[tuple[Callable[[Any], Any], str]] = [
    (lambda state: [1, 2], "list is not from"),
    (lambda state: {"model": 1, "epoch": 2}, r"\['epoch', 'model'\] is not from"),
    (lambda state: changed(state, 99, "version"), "version 99 is not known. Allowed: 1"),
    (lambda state: other_model(), "saved for other channel groups.*before pruning"),
    (lambda state: without(state, "steps"), "'steps' is missing"),
    (lambda state: without(state, "channels", "keep"), "'keep' is missing"),
    (lambda state: without(state, "channels", "rules", 0), "damaged"),
    (lambda state: changed(state, {"phase": "prune", "typo": 1}, "channels", "rules", 0), "typo"),
    (lambda state: changed(state, torch.ones(3), "channels", "keep"), "contradict"),
    (lambda state: changed(state, torch.ones(56), "channels", "removed"), "contradict"),
    (lambda state: changed(state, [1, 3], "channels", "widths", "conv1"), r"'conv1' has \[1, 3\] outputs"),
    (lambda state: without(state, "rng", "torch"), "'torch' is missing"),
    (lambda state: changed(state, torch.ones(5), "rng", "torch"), "damaged"),
    (lambda state: changed(state, "numpy", "rng", "numpy"), "damaged"),
    (lambda state: without(state, "elements", "rules", 0, "keep"), "'keep' is missing"),
    (lambda state: changed(state, {}, "elements", "rules", 0, "sets"), "saved for other groups"),
]


def photograph(run: Run) -> list[Any]:
    """Everything that a failed load must leave alone."""
    model, optimizer, pruner = run
    tensors = [(name, id(value), value.detach().clone()) for name, value in model.named_parameters()]
    parameters = [id(one) for group in optimizer.param_groups for one in group["params"]]
    states = {id(key): sorted(value) for key, value in optimizer.state.items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    grads = [bool(parameter._post_accumulate_grad_hooks) for parameter in model.parameters()]
    rng = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
    masks = [(name, keep.tolist()) for name, keep in pruner.masks.items()]
    return [tensors, parameters, states, repr(model), pruner.phase, pruner.steps, masks, hooks, grads, rng]


def assert_untouched(before: list[Any], after: list[Any]) -> None:
    for (name, number, value), (_, other, now) in zip(before[0], after[0], strict=True):
        assert number == other, name
        assert torch.equal(value, now), name
    assert before[1:-1] == after[1:-1]
    assert torch.equal(before[-1][0], after[-1][0])
    assert before[-1][1:] == after[-1][1:]


@pytest.mark.parametrize("epochs", [0, 3])
@pytest.mark.parametrize(("damage", "message"), DAMAGED, ids=[row[1][:24] for row in DAMAGED])
def test_a_damaged_state_changes_nothing(damage: Callable[[Any], Any], message: str, epochs: int) -> None:
    state = damage(trained(CONFIGS["both"], EPOCHS)[2].state_dict())
    run = trained(CONFIGS["both"], epochs)
    before = photograph(run)
    with pytest.raises(CheckpointError, match=message) as caught:
        run[2].load_state_dict(state, generators=True)
    assert "\n" not in str(caught.value)
    assert_untouched(before, photograph(run))
    train(run, epochs, EPOCHS)
    assert run[2].phase == "finetune"


def test_the_state_is_plain() -> None:
    def kinds(nest: Any) -> set[type]:
        if isinstance(nest, (dict, list, tuple)):
            values = list(nest.values()) if isinstance(nest, dict) else list(nest)
            return {type(nest)}.union(*(kinds(value) for value in values))
        return {type(nest)}

    state = trained(CONFIGS["both"], 4)[2].state_dict()
    assert kinds(state) <= {dict, list, tuple, str, int, float, bool, type(None), Tensor}


def test_a_state_of_another_config_is_remarked(caplog: pytest.LogCaptureFixture) -> None:
    def pruner(end: int, regularizer: Any = None) -> Pruning:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        rule = {"target": {"macs": 0.5}, "start": 0, "end": end, "regularizer": regularizer}
        return Pruning(model, {"rules": [rule]}, example_inputs=torch.randn(1, 4))

    state = pruner(2).state_dict()
    with caplog.at_level("WARNING"):
        pruner(2).load_state_dict(state)
        assert not caplog.records
        pruner(3, "growing_l2").load_state_dict(state)
    said = [one.getMessage() for one in caplog.records]
    assert said == ["state: it was saved with another rules[0]: end was 2 and is 3; regularizer was None and is "
                    "'growing_l2'"]  # fmt: skip


@pytest.mark.parametrize("through", ["load_state_dict", "state_in"])
@pytest.mark.parametrize(("epochs", "new"), [(1, False), (3, True)])
def test_a_state_of_another_target_says_which_goes_on(
    through: str, epochs: int, new: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A rule that is not over goes on to the new target; one that is keeps what it has reached, and the line says how
    to prune on, which is then done."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    def made(macs: float, model: nn.Module) -> Pruning:
        rule = {"target": {"macs": macs}, "start": 0, "end": 2}
        pruner = Pruning(model, {"rules": [rule]}, example_inputs=torch.randn(1, 4))
        pruner.state_in(model)
        return pruner

    model, other = build(), build()
    first, second = made(0.5, model), made(0.3, other)
    for epoch in range(epochs):
        first.prune(model, epoch)
    with caplog.at_level("WARNING"):
        caplog.clear()
        if through == "state_in":
            other.load_state_dict(model.state_dict())
        else:
            second.load_state_dict(first.state_dict())
            other.load_state_dict(own_state(model))
    said = [one.getMessage() for one in caplog.records]
    for epoch in range(epochs, 4):
        second.prune(other, epoch)
    if not new:
        line = (
            "state: rules[0] goes on to the new target of macs 0.3 in place of macs 0.5. For the old one: the config "
        )
        assert said == [f"{line}that the state was saved with"]
        assert second.macs.fraction <= 0.3
        return
    had, towards = "had met its target of macs 0.5 when it was saved", "nothing is pruned towards macs 0.3"
    assert len(said) == 1 and had in said[0] and towards in said[0] and "load_pruned(build_model(), path)" in said[0]
    assert 0.4 < second.macs.fraction <= 0.5
    save_pruned(other, tmp_path / "pruned.safetensors")
    again = load_pruned(build(), tmp_path / "pruned.safetensors")
    last = made(0.3, again)
    last.prune(again, 2)
    assert last.macs.fraction <= 0.3, "as the line says"
