"""How many modules a mask passes: from the config to the weight, and in a step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining import Pruning

NAME = "pruningawaretraining."
CHANNELS = {"pattern": "channel", "target": {"sparsity": 0.5}, "end": 1}
RULES = {
    "channel": CHANNELS,
    "slice": {**CHANNELS, "pattern": {"type": "slice", "block_size": 2}},
    "4x1": {**CHANNELS, "pattern": "4x1"},
    "2:4": {**CHANNELS, "pattern": "2:4"},
    "unstructured": {**CHANNELS, "pattern": "unstructured"},
}
WRITES = ("clear_weights",)
TAKES_RULES = ("CoupledRule", "WeightRule")


def modules_above(frame: FrameType | None) -> set[str]:
    """The library's modules on the call stack."""
    found = set()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(NAME):
            found.add(name.removeprefix(NAME))
        frame = frame.f_back
    return found


@contextmanager
def watched(matters: Callable[[FrameType], bool]) -> Iterator[list[set[str]]]:
    """The modules on the stack at every call that matters."""
    stacks: list[set[str]] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and matters(frame):
            stacks.append(modules_above(frame))

    sys.setprofile(profile)
    try:
        yield stacks
    finally:
        sys.setprofile(None)


def writes(frame: FrameType) -> bool:
    """Whether a mask is about to be written over weights."""
    return frame.f_code.co_name in WRITES and frame.f_globals.get("__name__", "").startswith(NAME + "masks.")


def takes_a_rule(frame: FrameType) -> bool:
    """Whether a rule of the config becomes a rule of the engine."""
    return frame.f_code.co_name == "__init__" and type(frame.f_locals.get("self")).__name__ in TAKES_RULES


@pytest.mark.parametrize("kind", list(RULES))
def test_a_mask_passes_few_modules(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    inputs = torch.randn(2, 4, 6, 6)
    with watched(takes_a_rule) as on_the_way_in:
        pruner = Pruning(model, {"rules": [RULES[kind]]}, example_inputs=inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer)
    with watched(writes) as at_the_event:
        assert pruner.prune(model, 0) == "masked"
    way = set().union(*on_the_way_in, *at_the_event) | {"config.schema"}
    assert on_the_way_in and at_the_event and len(way) <= 10, sorted(way)
    model(inputs).square().sum().backward()
    with watched(writes) as in_the_step:
        optimizer.step()
    assert in_the_step and all(len(stack) <= 4 for stack in in_the_step), in_the_step
