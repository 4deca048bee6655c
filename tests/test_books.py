"""What a pruner says is true of the weights that are there now, wherever they have come from in the meantime."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning, export_onnx, load_pruned, save_pruned
from pruningawaretraining.errors import ModelError

CHANNELS = {"pattern": "channel", "target": {"sparsity": 0.5}, "end": 9, "name": "r"}
RULES: dict[str, dict[str, Any]] = {
    "channel": CHANNELS,
    "slice": {**CHANNELS, "pattern": {"type": "slice", "block_size": 2}},
    "4x1": {**CHANNELS, "pattern": "4x1"},
    "2:4": {**CHANNELS, "pattern": "2:4"},
    "unstructured": {**CHANNELS, "pattern": "unstructured"},
}
INPUTS = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), hidden, nn.Flatten(), nn.Linear(32, 4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(INPUTS).square().mean().backward()
    optimizer.step()


def begun(pattern: str, **options: Any) -> tuple[nn.Sequential, torch.optim.Optimizer, Pruning]:
    """A model in which some groups are masked, after a step."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruning(model, {"rules": [RULES[pattern]]}, example_inputs=INPUTS, optimizer=optimizer, **options)
    for epoch in range(6):
        pruner.prune(model, epoch)
        step(model, optimizer)
    assert 0 < pruner.sparsity < 0.6
    return model, optimizer, pruner


def masked(pruner: Pruning, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the masked entries of a model hold, by the masks of a pruner of it or of what it is a copy of."""
    for masks in pruner.engine.masks:
        for member, keep_W in masks.grouping.expand(masks.keep_G.float(), 1.0):
            weight = model.get_parameter(member.name).detach()
            yield member.name, weight[(keep_W == 0).expand(weight.shape)]


def assert_masked(pruner: Pruning, model: nn.Module) -> None:
    values = dict(masked(pruner, model))
    assert sum(len(one) for one in values.values()) > 0
    assert [name for name, one in values.items() if not bool((one == 0).all())] == []


# --- weights that come back -----------------------------------------------------------------------------------------


def best_is_loaded(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict(build().state_dict())


def best_is_assigned(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict(build().state_dict(), assign=True)


def layer_is_exchanged(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[2][0] = nn.Conv2d(8, 8, 3)
    model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))


def conversion_exchanges(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.float()


def lookahead_copies(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """A plain Lookahead: slow weights, dense since before the masks, are mixed into those that have been masked."""
    slow = [one.detach().clone() + 1.0 for one in model.parameters()]
    for _ in range(2):
        step(model, optimizer)
        with torch.no_grad():
            for one, kept in zip(model.parameters(), slow, strict=True):
                one.copy_(kept.add_(one - kept, alpha=0.5))


def master_copies(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """An optimizer of float32 copies: it is not the model's."""
    masters = [nn.Parameter(one.detach().clone() + 0.1) for one in model.parameters()]
    own = torch.optim.SGD(masters, lr=0.01)
    model(INPUTS).square().mean().backward()
    with torch.no_grad():
        for master, one in zip(masters, model.parameters(), strict=True):
            master.grad = one.grad
        own.step()
        for master, one in zip(masters, model.parameters(), strict=True):
            one.copy_(master)


def weights_are_not_finite(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        model[0].weight[model[0].weight == 0] = float("inf")


SITUATIONS = {
    one.__name__: one
    for one in (
        best_is_loaded,
        best_is_assigned,
        layer_is_exchanged,
        conversion_exchanges,
        lookahead_copies,
        master_copies,
        weights_are_not_finite,
    )
}


def at_save(model: nn.Module, pruner: Pruning, folder: Path) -> None:
    loaded = load_pruned(build(), save_pruned(model, folder / "m.safetensors"))
    assert_masked(pruner, loaded)


def at_export(model: nn.Module, pruner: Pruning, folder: Path) -> None:
    export_onnx(model, INPUTS, folder / "m.onnx", exporter="torchscript")


MOMENTS: dict[str, Callable[[nn.Module, Pruning, Path], Any]] = {
    "prune": lambda model, pruner, folder: pruner.prune(model, 6),
    "report": lambda model, pruner, folder: pruner.report(),
    "save_pruned": at_save,
    "on_train_end": lambda model, pruner, folder: pruner.on_train_end(),
    "apply_masks": lambda model, pruner, folder: pruner.apply_masks(),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("pattern", RULES)
def test_weights_that_came_back_are_masked_again(
    pattern: str, situation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for moment, act in MOMENTS.items():
        model, optimizer, pruner = begun(pattern)
        SITUATIONS[situation](model, optimizer)
        assert any(bool((one != 0).any()) for _, one in masked(pruner, model)), moment
        before = pruner.sparsity
        caplog.clear()
        act(model, pruner, tmp_path)
        assert_masked(pruner, model)
        assert pruner.sparsity >= before
        assert "masked weights" in caplog.text and "0 again" in caplog.text, moment


@pytest.mark.parametrize("pattern", ["channel", "2:4"])
def test_an_export_is_of_masked_weights(pattern: str, tmp_path: Path) -> None:
    model, optimizer, pruner = begun(pattern)
    best_is_loaded(model, optimizer)
    at_export(model, pruner, tmp_path)
    assert_masked(pruner, model)


@pytest.mark.parametrize("pattern", RULES)
def test_masks_hold_on_exchanged_parameters_from_there_on(pattern: str) -> None:
    model, _, pruner = begun(pattern)
    best_is_assigned(model, torch.optim.SGD(model.parameters()))
    pruner.apply_masks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        step(model, optimizer)
        assert_masked(pruner, model)


def test_an_exchanged_parameter_leaves_its_optimizer_behind(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, pruner = begun("channel")
    best_is_assigned(model, optimizer)
    pruner.apply_masks()
    assert "SGD still holds parameters that were exchanged" in caplog.text


@pytest.mark.parametrize("pattern", RULES)
def test_a_layer_that_cannot_be_what_it_was_is_named(pattern: str) -> None:
    model, _, pruner = begun(pattern)
    model[2][0] = nn.Conv2d(8, 8, 5, padding=1)
    with pytest.raises(ModelError, match=r"2\.0\.weight: .* \(8, 8, 3, 3\) .* \(8, 8, 5, 5\)"):
        pruner.report()
    model[2][0] = nn.Identity()
    with pytest.raises(ModelError, match=r"2\.0\.weight: .* gone"):
        pruner.prune(model, 6)


def test_nothing_is_said_where_nothing_has_come_back(caplog: pytest.LogCaptureFixture) -> None:
    for pattern in RULES:
        model, optimizer, pruner = begun(pattern)
        before = [one._version for one in model.parameters()]
        pruner.report()
        pruner.apply_masks()
        assert [one._version for one in model.parameters()] == before
    assert [one.message for one in caplog.records if one.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("pattern", ["channel", "2:4"])
def test_an_epoch_without_a_step_is_named_once(pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, pruner = begun(pattern)
    caplog.clear()
    master_copies(model, optimizer)
    pruner.prune(model, 6)
    assert "no optimizer step has been seen" not in caplog.text
    for epoch in (7, 8):
        master_copies(model, optimizer)
        pruner.prune(model, epoch)
    assert caplog.text.count("no optimizer step has been seen") == 1


# --- moving averages, copies, records -------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", RULES)
def test_an_average_is_masked_as_the_model_is(pattern: str) -> None:
    model = build()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rule = {**RULES[pattern], "end": 4}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=INPUTS, optimizer=optimizer, ema=average)
    looked = 0
    for epoch in range(8):
        pruner.prune(model, epoch)
        for _ in range(2):
            step(model, optimizer)
            average.update_parameters(model)
            if pruner.engine.masks[0].active:
                assert_masked(pruner, average.module)
                looked += 1
    assert looked > 4
    shapes = {name: one.shape for name, one in model.named_parameters()}
    assert {name: one.shape for name, one in average.module.named_parameters()} == shapes


@pytest.mark.parametrize("pattern", RULES)
def test_an_average_attached_later_is_masked_at_once(pattern: str) -> None:
    model, optimizer, pruner = begun(pattern)
    average = copy.deepcopy(build())
    pruner.attach_ema(average)
    assert_masked(pruner, average)
    with pytest.raises(ModelError, match="holds no copy of the"):
        pruner.attach_ema(nn.Linear(3, 3))


# --- a training that ends before its target -------------------------------------------------------------------------


def test_channels_that_are_masked_and_not_removed_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _, pruner = begun("channel")
    masked_now = sum(int((~keep).sum()) for keep in pruner.masks.values())
    line = f"{masked_now} channels masked, not removed: call pruner.remove()"
    assert masked_now > 0
    assert line in str(pruner.report())
    assert pruner.report().to_dict()["masked"] == masked_now
    assert line not in caplog.text
    pruner.on_train_end()
    assert line in caplog.text
    caplog.clear()
    save_pruned(model, tmp_path / "m.safetensors")
    assert line in caplog.text
    caplog.clear()
    pruner.remove()
    save_pruned(model, tmp_path / "m.safetensors")
    assert "not removed" not in str(pruner.report()) + caplog.text
    assert pruner.report().masked == 0
    assert pruner.report().parameters["kept"] == sum(one.numel() for one in model.parameters())


def test_zeros_inside_layers_are_no_channels_to_remove(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _, pruner = begun("unstructured")
    pruner.on_train_end()
    save_pruned(model, tmp_path / "m.safetensors")
    assert "not removed" not in str(pruner.report()) + caplog.text


# --- records --------------------------------------------------------------------------------------------------------


def pickled(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "whole.pt")
    again: nn.Module = torch.load(folder / "whole.pt", weights_only=False)
    return again


COPIES: dict[str, Callable[[nn.Module, nn.Module, Path], nn.Module]] = {
    "deepcopy": lambda model, average, folder: copy.deepcopy(model),
    "average": lambda model, average, folder: average.module,
    "deepcopy of the average": lambda model, average, folder: copy.deepcopy(average).module,
    "average made later": lambda model, average, folder: torch.optim.swa_utils.AveragedModel(model).module,
    "pickle": lambda model, average, folder: pickled(model, folder),
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("pattern", ["channel", "2:4"])
def test_a_copy_takes_its_record_along_and_is_not_pruned_twice(pattern: str, kind: str, tmp_path: Path) -> None:
    model = build()
    average = torch.optim.swa_utils.AveragedModel(model)
    config = {"rules": [{**RULES[pattern], "end": 1}]}
    pruner = Pruning(model, config, example_inputs=INPUTS, ema=average)
    for epoch in (0, 1):
        pruner.prune(model, epoch)
    assert pruner.phase == "finetune"
    one = COPIES[kind](model, average, tmp_path)
    loaded = load_pruned(build(), save_pruned(one, tmp_path / "m.safetensors"))
    again = Pruning(loaded, config, example_inputs=INPUTS)
    sparsity = pruner.sparsity
    assert again.phase == "finetune" and again.sparsity == pytest.approx(sparsity)
    for epoch in range(3):
        assert again.prune(loaded, epoch) is None
    shapes = {name: each.shape for name, each in model.named_parameters()}
    assert {name: each.shape for name, each in loaded.named_parameters()} == shapes
