"""How many modules a mask passes: from the config to the weight, and in a step.

A module is passed if it is on the call stack when a rule of the config becomes a rule of the engine, or when an
operation writes into a weight. What returns before that (a criterion that scores, an allocation that chooses) makes
masks and is not on their way.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pruningawaretraining import Pruning
from pruningawaretraining.groups import kernels as fused

NAME = "pruningawaretraining."
DESIGN = Path(__file__).parents[1] / "docs" / "design.md"
CHANNELS = {"pattern": "channel", "target": {"sparsity": 0.5}, "end": 1}
RULES = {
    "channel": CHANNELS,
    "slice": {**CHANNELS, "pattern": {"type": "slice", "block_size": 2}},
    "4x1": {**CHANNELS, "pattern": "4x1"},
    "2:4": {**CHANNELS, "pattern": "2:4"},
    "unstructured": {**CHANNELS, "pattern": "unstructured"},
}
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


def takes_a_rule(frame: FrameType) -> bool:
    """Whether a rule of the config becomes a rule of the engine."""
    return frame.f_code.co_name == "__init__" and type(frame.f_locals.get("self")).__name__ in TAKES_RULES


class Writes(TorchDispatchMode):
    """The library's modules on the stack at every operation that writes into a weight, by the weight's name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {one.untyped_storage().data_ptr(): name for name, one in model.named_parameters()}
        self.stacks: dict[str, list[set[str]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = {**dict(zip((one.name for one in func._schema.arguments), args, strict=False)), **(kwargs or {})}
        written = [given.get(one.name) for one in func._schema.arguments if one.alias_info and one.alias_info.is_write]
        for value in written:
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                name = self.names.get(tensor.untyped_storage().data_ptr()) if isinstance(tensor, Tensor) else None
                if name is not None and (above := modules_above(sys._getframe())):  # by the library, not the optimizer
                    self.stacks.setdefault(name, []).append(above)
        return func(*args, **(kwargs or {}))

    @property
    def passed(self) -> list[set[str]]:
        return [stack for stacks in self.stacks.values() for stack in stacks]


def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    return model, torch.randn(2, 4, 6, 6)


def masked(model: nn.Module) -> set[str]:
    return {name for name, one in model.named_parameters() if bool((one == 0).any())}


def ways(design: str) -> tuple[set[str], set[str]]:
    """The modules that docs/design.md names: from the config to the weight, and in a step."""
    (text,) = re.findall(r"\*\*The way of a mask\.\*\*.*?(?=\n\n)", design, flags=re.S)
    whole, step = text.split("In a step:")
    return tuple(  # type: ignore[return-value]
        {one.replace("/", ".") for one in re.findall(r"`(\w+/\w+)\.py`", part)} for part in (whole, step)
    )


@pytest.mark.parametrize("kind", list(RULES))
def test_a_mask_passes_few_modules(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "kernels", lambda: None)  # all that is written is written by PyTorch
    model, inputs = net()
    with watched(takes_a_rule) as on_the_way_in:
        pruner = Pruning(model, {"rules": [RULES[kind]]}, example_inputs=inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer)
    with Writes(model) as at_the_event:
        assert pruner.prune(model, 0) == "masked"
    assert on_the_way_in and at_the_event.stacks.keys() == masked(model)
    config = type(pruner.config.rules[0]).__module__.removeprefix(NAME)
    way = set().union(*on_the_way_in, *at_the_event.passed, {config})
    model(inputs).square().sum().backward()
    with Writes(model) as in_the_step:
        optimizer.step()
    assert in_the_step.stacks.keys() == masked(model)
    named, named_in_step = ways(DESIGN.read_text(encoding="utf-8"))
    assert len(way) <= 10 and way <= named, sorted(way)
    for stack in in_the_step.passed:
        assert len(stack) <= 4 and stack <= named_in_step, sorted(stack)


@pytest.mark.skipif(not fused.available(), reason="numba is not installed")
@pytest.mark.parametrize("kind", [kind for kind in RULES if kind != "channel"])
def test_a_compiled_pass_takes_the_same_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, compiled = list[set[str]](), fused.kernels()

    def kernels() -> Any:
        asked.append(modules_above(sys._getframe(1)))
        return compiled

    monkeypatch.setattr(fused, "kernels", kernels)
    model, inputs = net()
    pruner = Pruning(model, {"rules": [RULES[kind]]}, example_inputs=inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer)
    pruner.prune(model, 0)
    model(inputs).square().sum().backward()
    before = masked(model)
    asked.clear()
    with Writes(model) as by_torch:
        optimizer.step()
    assert masked(model) == before and not by_torch.stacks and len(asked) == len(before)
    named = ways(DESIGN.read_text(encoding="utf-8"))[1]
    assert all(len(stack) <= 4 and stack <= named for stack in asked), asked
