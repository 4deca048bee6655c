"""What the facade says to arguments that it cannot use, and what it makes of those it can."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pruningawaretraining import Pruner, Pruning
from pruningawaretraining.errors import ConfigError, ModelError

CONFIG = {"rules": [{"target": {"sparsity": 0.5}, "start": 0, "end": 1}]}
EXAMPLE = torch.randn(1, 3, 8, 8)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("resnet18", CONFIG), {}, ModelError, "model: 'resnet18' is a str. Allowed: a torch.nn.Module"),
        ((nn.ReLU, CONFIG), {}, ModelError, "is a type"),
        ((None,), {}, ConfigError, "config is required"),
        ((model(), CONFIG), {"optimizer": "sgd"}, ConfigError, "optimizer: 'sgd' is a str"),
        ((model(), CONFIG), {"optimizer": [1]}, ConfigError, "optimizer: 1 is a int"),
        ((model(), CONFIG), {"example_inputs": "image"}, ModelError, "example_inputs: 'image' holds no tensor"),
        ((model(), CONFIG), {"example_inputs": (1, 3, 8, 8)}, ModelError, "for a shape, torch.randn(1, 3, 8, 8)"),
        ((model(), CONFIG), {"example_inputs": torch.zeros(0, 3, 8, 8)}, ModelError, "(0, 3, 8, 8) is empty"),
        ((model(), CONFIG), {"example_inputs": EXAMPLE * float("nan")}, ModelError, "holds NaN or infinity"),
        ((model(), CONFIG), {"ema": 0.999}, ConfigError, "ema: 0.999 is a float"),
    ],
)
def test_what_is_no_model_optimizer_or_average_is_named(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[ValueError], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Pruning(*arguments, **{"example_inputs": EXAMPLE, **options})


@pytest.mark.parametrize("epoch", ["a", None, 1.5, -1, True])
def test_an_epoch_is_a_whole_number(epoch: Any) -> None:
    net = model()
    pruner = Pruning(net, CONFIG, example_inputs=EXAMPLE)
    message = f"epoch: {epoch!r} is not allowed. Allowed: a whole number, 0 or more"
    if epoch is None:
        message = r"epoch is required: rules\[0\] prunes in epochs 0 to 1"
    with pytest.raises(ConfigError, match=message):
        pruner.prune(net, epoch)
    assert pruner.sparsity == 0 and pruner.phase == "regularize"


@pytest.mark.parametrize("epoch", [0, 0.0, np.int64(0), torch.tensor(0)])
def test_epochs_of_other_libraries_are_welcome(epoch: Any) -> None:
    net = model()
    pruner = Pruning(net, CONFIG, example_inputs=EXAMPLE)
    pruner.prune(net, epoch)
    assert pruner.sparsity == 0.25


def test_several_optimizers_are_attached() -> None:
    net = model()
    optimizers = [torch.optim.SGD(net[0].parameters(), 0.1), torch.optim.Adam(net[4].parameters())]
    pruner = Pruning(net, CONFIG, example_inputs=EXAMPLE, optimizer=optimizers)
    pruner.prune(net, 0)
    net(EXAMPLE).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert pruner.steps == 1
    assert int((net[0].weight.flatten(1) == 0).all(1).sum()) == 2
    pruner.prune(net, 1)
    assert net[0].out_channels == 4
    assert [len(group["params"][0]) for one in optimizers for group in one.param_groups] == [4, 2]


def test_a_second_pruner_retires_one_that_has_not_begun(caplog: pytest.LogCaptureFixture) -> None:
    net = model()
    first = Pruning(net, CONFIG, example_inputs=EXAMPLE)
    with caplog.at_level(logging.WARNING):
        second = Pruning(net, CONFIG, example_inputs=EXAMPLE)
    assert "retired" in caplog.text and first.phase == "done"
    second.prune(net, 0)
    with pytest.raises(ModelError, match="another Pruning is at work on this Sequential"):
        Pruning(net, CONFIG, example_inputs=EXAMPLE)
    second.prune(net, 1)
    third = Pruning(net, CONFIG, example_inputs=EXAMPLE)  # after the target a new one may begin, and has nothing to do
    assert third.phase == "finetune" and third.prune(net, 0) is None


def test_the_three_line_form_takes_both_targets() -> None:
    net = model()
    pruner = Pruner(net, 0.25, macs=0.9, total_steps=1, example_inputs=EXAMPLE)
    pruner.step()
    assert pruner.sparsity >= 0.25 and pruner.macs.fraction <= 0.9
    with pytest.raises(ConfigError, match="target"):
        Pruner(model(), example_inputs=EXAMPLE)
    for steps in (0, -2, 1.5):
        with pytest.raises(
            ConfigError, match=f"total_steps: {steps} is not allowed. Allowed: a whole number, 1 or more"
        ):
            Pruner(model(), 0.5, total_steps=steps, example_inputs=EXAMPLE)
