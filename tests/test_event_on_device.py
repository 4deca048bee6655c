"""An event of weight patterns on a GPU that is not there: how much memory it moves, how often the host waits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from device_meter import DeviceMeter, metered
from second_device import second_device
from torch import nn

from pruningawaretraining import Pruning

WIDTH = 512
BYTES = {"unstructured": 500.0, "2:4": 400.0, "3:16": 430.0, "4x1": 240.0, "slice": 220.0}
"""At most so many bytes a weight, read and written, with a look at the weights before and after: 500 are 45 GB at 90
million weights, 15 ms at 3 TB/s."""


def event(pattern: Any, layers: int, **rule: Any) -> tuple[DeviceMeter, int]:
    """What an event does when some groups are masked already, and the number of weights."""
    sparsity = 3 / 16 if pattern == "3:16" else 0.5
    spec = {"type": "slice", "types": ["Linear"]} if pattern == "slice" else pattern
    rule = {"pattern": spec, "criterion": "magnitude", "start": 0, "end": 9, "target": {"sparsity": sparsity}, **rule}
    with metered() as meter:
        model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, device="cuda") for _ in range(layers)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        pruner = Pruning(model, {"rules": [rule]}, optimizer=optimizer)
        optimizer.step()
        (one,) = pruner.engine.weights.rules
        one.masks.set(torch.zeros_like(one.masks.keep_G))
        meter.start()
        pruner.prune(model, 0)
        assert one.masks.keep_G.device.type == "cuda"
    return meter, layers * WIDTH**2


@pytest.mark.parametrize("pattern", BYTES)
def test_an_event_moves_few_bytes_and_waits_as_often_for_many_layers(pattern: str) -> None:
    few, weights = event(pattern, 1)
    many, more = event(pattern, 3)
    for meter, count in ((few, weights), (many, more)):
        each = {name: moved / count for name, moved in meter.moved.most_common(8)}
        assert sum(meter.moved.values()) / count < BYTES[pattern], each
    assert sum(few.waits.values()) == sum(many.waits.values()) <= 16, (few.waits, many.waits)
    launched = [sum(meter.calls.values()) for meter in (few, many)]
    assert launched[0] < 600 and launched[1] - launched[0] < 120 * 2, "two more layers"


@pytest.mark.parametrize(
    "rule",
    [
        {"scope": "local", "min_sparsity": 0.1, "max_sparsity": 0.7},
        {"scope": "isomorphic", "criterion": "l1"},
        {"every": 4, "progressive": 3},
    ],
)
def test_no_part_of_an_event_waits_for_each_layer(rule: dict[str, Any]) -> None:
    few, _ = event("unstructured", 1, **rule)
    many, _ = event("unstructured", 3, **rule)
    assert sum(few.waits.values()) == sum(many.waits.values()) <= 24, (few.waits, many.waits)
    assert sum(many.calls.values()) - sum(few.calls.values()) < 100 * 2, "two more layers"


def test_the_meter_sees_what_a_gpu_would_wait_for() -> None:
    with metered() as meter:
        values = torch.rand(1000, device="cuda")
        assert values.device.type == "cuda"
        meter.start()
        doubled = values * 2
        assert sum(meter.moved.values()) == 8000
        assert not meter.waits
        doubled.sum().item()
        doubled.cpu()
        torch.tensor([1.0, 2.0], device="cuda")
        assert sum(meter.waits.values()) == 3
        (values > 0.5).sum()
        assert meter.moved["aten.sum.default"] == (4000 + 4) + (1000 + 8) + 16000  # flags are made 8 bytes wide first


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "3:8", "4x1", "3x2", "slice"])
def test_masks_are_those_of_the_cpu(pattern: str, scope: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 40)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(16).round_().div_(16)  # many ties, and sums that are exact in any order
    target = 3 / 8 if pattern == "3:8" else 0.5
    rule = {"pattern": pattern, "scope": scope, "end": 3, "max_sparsity": 0.9, "target": {"sparsity": target}}
    expected = Pruning(copy.deepcopy(model), {"rules": [rule]})
    with second_device() as device:
        found = Pruning(copy.deepcopy(model).to(device), {"rules": [rule]})
        for epoch in range(4):
            expected.prune(epoch=epoch)
            found.prune(epoch=epoch)
            assert found.masks.keys() == expected.masks.keys()
            assert all(torch.equal(keep, expected.masks[name]) for name, keep in found.masks.items())
            assert found.report().parameters == expected.report().parameters
    assert 0.2 < found.sparsity == expected.sparsity


def test_an_event_does_not_run_the_model_again() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    ran: list[int] = []
    rule = {"pattern": "unstructured", "start": 0, "end": 9, "target": {"sparsity": 0.5}}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=torch.rand(1, 8))
    pruner.prune(model, 0)
    model[0].register_forward_hook(lambda *_: ran.append(1))
    pruner.prune(model, 1)
    pruner.prune(model, 2)
    assert (pruner.report().macs["dense"], ran) == (96, [])
    model[0] = nn.Sequential(model[0], nn.Linear(8, 8))  # another model: what was counted is not of it
    report = pruner.report()
    assert report.macs["dense"] == 160
    assert {row["name"]: row["dense_macs"] for row in report.layers} == {"0.0": 64, "0.1": 64, "2": 32}
