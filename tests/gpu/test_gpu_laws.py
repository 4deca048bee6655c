"""The laws of tests/law_checks.py on a GPU, in float64: what is compared is the function, not the rounding of TF32."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import law_checks
import pytest
import torch
from gpu_training import EPOCHS, RULE, Loop, batch, network, sgd
from torch import Tensor, nn

from pruningawaretraining import Pruning
from pruningawaretraining.patterns.channel import Channel
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.registry import names

pytest.importorskip("torchvision")
zoo = pytest.importorskip("zoo")


@functools.cache
def traced(name: str, device: torch.device) -> tuple[nn.Module, Tensor, ChannelGroups]:
    model, inputs = zoo.architecture(name)
    model, inputs = model.to(device, torch.float64), inputs.to(device, torch.float64)
    return model, inputs, Channel().build(model, inputs)


def fresh(name: str, device: torch.device) -> tuple[nn.Module, Tensor, ChannelGroups]:
    model, inputs, found = traced(name, device)
    twin = copy.deepcopy(model)
    return twin, inputs, found.on(twin)


def architectures(device: torch.device, name: str) -> None:
    """On the CPU test_laws.py has the large ones."""
    if device.type == "cpu" and name not in zoo.SMALL:
        pytest.skip("needs a CUDA device: tests/test_laws.py has it on the CPU")


each = pytest.mark.parametrize("name", zoo.NAMES)


@each
def test_1_reduce_and_expand_are_adjoint(device: torch.device, name: str) -> None:
    architectures(device, name)
    law_checks.reduce_and_expand_are_adjoint(traced(name, device)[2].grouping, device)


@each
def test_2_masked_equals_removed(device: torch.device, name: str) -> None:
    architectures(device, name)
    law_checks.masked_equals_removed(*fresh(name, device), tolerance=1e-9)


@each
def test_3_masked_weights_are_zero_after_every_step(device: torch.device, name: str) -> None:
    architectures(device, name)
    model, inputs, _ = fresh(name, device)
    assert law_checks.train_masked(model.float(), inputs.float(), "SGD", 4) > 0


@each
def test_4_a_target_is_met_and_nothing_can_be_given_back(device: torch.device, name: str) -> None:
    architectures(device, name)
    for limits in (law_checks.LIMITS[0], law_checks.LIMITS[-1]):  # the others are of the host, and tested there
        for scope in names("scope"):
            law_checks.target_is_met_and_nothing_can_be_given_back(*traced(name, device), limits, scope)


@each
def test_7_removal_keeps_the_optimizer_alive(device: torch.device, name: str) -> None:
    architectures(device, name)
    law_checks.removal_keeps_the_optimizer_alive(*fresh(name, device))


@each
def test_8_hooks_leave_the_users_objects_alone(device: torch.device, name: str) -> None:
    architectures(device, name)
    model, inputs, _ = fresh(name, device)
    law_checks.hooks_leave_the_users_objects_alone(model.float(), inputs.float())


def flags() -> dict[str, Any]:
    """What of torch's global state the check of a removal could be tempted to change."""
    return {
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention": torch.backends.mha.get_fastpath_enabled(),
        "dtype": torch.get_default_dtype(),
    }


def test_8_torchs_flags_are_as_they_were_after_a_removal(device: torch.device) -> None:
    before = flags()
    model = network(device)
    pruner = Pruning(model, {"rules": [{"target": {"macs": 0.5}}]}, example_inputs=batch(device)[0][:1])
    pruner.prune(model, 0)
    assert pruner.phase == "finetune"
    assert flags() == before


def trained(device: torch.device, state: bytes | None, first: int, last: int) -> tuple[Loop, bytes]:
    """Some epochs of a training, from the start or from what an earlier part has saved; and what is saved then."""
    model = network(device)
    if hasattr(model, "maxpool"):
        model.maxpool = nn.Identity()  # its backward pass adds in any order on a GPU
    images, _ = batch(device)
    pruner = Pruning(model, {"rules": [{**RULE, "criterion": "taylor"}]}, example_inputs=images[:1])
    saved = None if state is None else torch.load(io.BytesIO(state), weights_only=True)
    if saved is not None:
        pruner.load_state_dict(saved["pruner"], generators=True)
        model.load_state_dict(saved["model"])
    optimizer = sgd(model.parameters())
    pruner.attach(optimizer)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
    loop = Loop(model, pruner, optimizer)
    for epoch in range(first, last):
        loop.step(*batch(device, epoch))
        pruner.prune(model, epoch)
    file = io.BytesIO()
    parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    return loop, file.getvalue()


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("stop", [3, EPOCHS - 1], ids=["masked", "removed"])
def test_5_interrupted_equals_uninterrupted(device: torch.device, stop: int) -> None:
    whole, _ = trained(device, None, 0, EPOCHS)
    _, state = trained(device, None, 0, stop)
    again, _ = trained(device, state, stop, EPOCHS)
    assert again.pruner.phase == whole.pruner.phase == "finetune"
    assert again.pruner.macs == whole.pruner.macs
    for name, keep in whole.pruner.masks.items():
        assert torch.equal(keep.cpu(), again.pruner.masks[name].cpu()), name
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
