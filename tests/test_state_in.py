"""The pruner's state inside the model's state dict: interrupted and resumed runs of loops that know nothing of it."""

from __future__ import annotations

import copy
import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining import Pruning, load_pruned, save_pruned
from pruningawaretraining.checkpoint.records import PRUNER_KEY
from pruningawaretraining.errors import CheckpointError, ModelError
from pruningawaretraining.session.state_in import Deferred, unpacked

INPUTS = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
RULE = {"regularizer": "growing_l2", "criterion": "taylor", "start": 1, "end": 3, "target": {"sparsity": 0.5}}
CONFIG = {"rules": [RULE]}
EPOCHS = 5
"""Masked after epochs 1 and 2, removed after epoch 3."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 2),
    )  # fmt: skip


def batches(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = torch.Generator().manual_seed(100 + epoch)
    return [(torch.randn(4, 3, 8, 8, generator=source), torch.arange(4) % 2) for _ in range(3)]


class Parts:
    """What a training script makes, and its own checkpoints: it knows nothing of a pruner."""

    def __init__(self, config: Any = CONFIG) -> None:
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.model, avg_fn=lambda old, new, count: 0.9 * old + 0.1 * new, use_buffers=True
        )
        self.pruner = Pruning(self.model, config, example_inputs=INPUTS, optimizer=self.optimizer, ema=self.average)
        self.handle = self.pruner.state_in(self.model)

    def train(self, first: int, last: int) -> None:
        for epoch in range(first, last):
            self.model.train()
            for images, labels in batches(epoch):
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(self.model(images), labels).backward()
                self.optimizer.step()
                self.average.update_parameters(self.model)
            self.pruner.prune(self.model, epoch)

    def save(self, path: Path) -> None:
        names = ("model", "optimizer", "average")
        torch.save({name: getattr(self, name).state_dict() for name in names}, path)

    def load(self, path: Path) -> None:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.average.load_state_dict(checkpoint["average"])


def own(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if PRUNER_KEY not in name}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    first, second = own(one), own(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def whole() -> Parts:
    parts = Parts()
    parts.train(0, EPOCHS)
    assert parts.pruner.channel_pruner.removed and parts.model[0].out_channels < 8
    return parts


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
@pytest.mark.parametrize("config", [RULE, {"pattern": "element", "start": 1, "end": 3, "target": {"sparsity": 0.5}}])
def test_resumed_equals_uninterrupted(stop: int, config: dict[str, Any], tmp_path: Path) -> None:
    """Before any event, masked, and removed; every tensor of model, average and optimizer is the same bit by bit."""
    config = {"rules": [config]}
    straight = Parts(config)
    straight.train(0, EPOCHS)
    first = Parts(config)
    first.train(0, stop)
    first.save(tmp_path / "checkpoint.pth")
    again = Parts(config)
    again.load(tmp_path / "checkpoint.pth")
    assert again.pruner.steps == 3 * stop and again.pruner.phase == first.pruner.phase
    again.train(stop, EPOCHS)
    assert_same(again.model, straight.model)
    assert_same(again.average, straight.average)
    for before, after in zip(straight.optimizer.state.values(), again.optimizer.state.values(), strict=True):
        assert torch.equal(before["momentum_buffer"], after["momentum_buffer"])
    assert all(torch.equal(keep, again.pruner.masks[name]) for name, keep in straight.pruner.masks.items())


def test_only_the_model_itself_has_the_state_and_only_while_asked_for(whole: Parts) -> None:
    model = whole.model
    assert list(model.state_dict())[-1] == PRUNER_KEY, "an average that zips two state dicts sees it last"
    assert PRUNER_KEY not in copy.deepcopy(model).state_dict()
    assert not any(PRUNER_KEY in name for name in whole.average.state_dict())
    quiet = Parts()
    assert PRUNER_KEY in quiet.model.state_dict()
    again = quiet.pruner.state_in(quiet.model)
    assert sum(PRUNER_KEY in name for name in quiet.model.state_dict()) == 1
    again.remove()
    assert quiet.model.state_dict().keys() == net().state_dict().keys()
    with pytest.raises(ModelError, match="not the Sequential that the pruner was made for"):
        quiet.pruner.state_in(net())


def test_the_state_is_made_when_it_is_used_and_then_stays(whole: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Averages that read the state dict in every step do not pay for it."""
    made = []
    state_dict = Pruning.state_dict
    monkeypatch.setattr(Pruning, "state_dict", lambda self: made.append(1) or state_dict(self))
    state = whole.model.state_dict()
    for value, other in zip(state.values(), own(whole.model).values(), strict=False):
        torch.lerp(value.float(), other.float(), 0.5)
    assert made == [] and isinstance(state[PRUNER_KEY], Deferred)
    copied, cloned = copy.deepcopy(state), state[PRUNER_KEY].clone()
    assert made == [1] and type(copied[PRUNER_KEY]) is type(cloned) is torch.Tensor
    assert torch.equal(copied[PRUNER_KEY], cloned) and cloned.dtype == torch.uint8
    assert unpacked(cloned)["steps"] == whole.pruner.steps


def test_copies_are_loaded_without_it_and_other_models_say_what_to_do(whole: Parts) -> None:
    state = whole.model.state_dict()
    twin = copy.deepcopy(whole.model)
    assert str(twin.load_state_dict(state)) == "<All keys matched successfully>"
    assert_same(twin, whole.model)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*make a Pruning of this model and call its state_in"):
        net().load_state_dict(state)
    unpruned = Parts()
    unpruned.train(0, 1)
    assert net().load_state_dict(unpruned.model.state_dict(), strict=False).unexpected_keys == [PRUNER_KEY]


@pytest.mark.parametrize("wrapper", ["ddp", "compile", "part"])
@pytest.mark.parametrize("end", [2, EPOCHS])
def test_it_travels_through_wrappers_and_safetensors(wrapper: str, end: int, tmp_path: Path) -> None:
    def wrapped(parts: Parts) -> nn.Module:
        if wrapper == "ddp":
            return DistributedDataParallel(parts.model)
        return torch.compile(parts.model) if wrapper == "compile" else nn.ModuleDict({"model": parts.model})

    if wrapper == "ddp":
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        first, again = Parts(), Parts()
        first.train(0, end)
        outer = wrapped(first)
        prefix = {"ddp": "module.", "compile": "_orig_mod.", "part": "model."}[wrapper]
        state = outer.state_dict()
        assert prefix + PRUNER_KEY in state
        save_file(state, tmp_path / "weights.safetensors")
        wrapped(again).load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert_same(again.model, first.model)
        assert all(torch.equal(keep, again.pruner.masks[name]) for name, keep in first.pruner.masks.items())
    finally:
        if wrapper == "ddp":
            dist.destroy_process_group()


def test_plain_weights_are_loaded_as_always_and_files_of_pruned_models_stay_plain(whole: Parts, tmp_path: Path) -> None:
    parts, dense = Parts(), net()
    parts.train(0, 1)
    parts.model.load_state_dict(dense.state_dict())
    assert parts.pruner.steps == 3, "the pruner goes on"
    save_pruned(whole.model, tmp_path / "pruned.safetensors")
    assert PRUNER_KEY not in load_file(tmp_path / "pruned.safetensors")
    loaded = load_pruned(net(), tmp_path / "pruned.safetensors")
    assert_same(loaded, whole.model)


@pytest.mark.parametrize("data", [torch.zeros(7, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8), 3])
def test_a_damaged_state_changes_nothing(whole: Parts, data: Any) -> None:
    parts = Parts()
    before = {name: value.clone() for name, value in own(parts.model).items()}
    with pytest.raises(CheckpointError, match="state_dict: the pruner's state in it is damaged"):
        parts.model.load_state_dict({**whole.model.state_dict(), PRUNER_KEY: data})
    assert all(torch.equal(value, before[name]) for name, value in own(parts.model).items())


def test_weights_from_before_a_removal_are_refused_by_the_model_that_lost_channels(tmp_path: Path) -> None:
    parts = Parts()
    parts.train(0, 2)
    buffer = io.BytesIO()
    torch.save(parts.model.state_dict(), buffer)
    parts.train(2, EPOCHS)
    buffer.seek(0)
    with pytest.raises(CheckpointError, match="lost channels that the state still has"):
        parts.model.load_state_dict(torch.load(buffer, weights_only=True))


def test_a_state_outlives_no_pruner() -> None:
    parts = Parts()
    model = parts.model
    del parts
    gc.collect()
    assert PRUNER_KEY not in model.state_dict()
