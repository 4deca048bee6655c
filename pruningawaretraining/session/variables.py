"""Objects that a training loop has at hand: variables of the functions that are being called, what these hold, and how
the loop would write each. They are only read: no property, no ``__getattr__`` and no proxy is asked."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import nn

PACKAGE = __name__.partition(".")[0]
DEPTH = 4
"""Most steps from a variable to what is found: ``self.trainer.callbacks[0].ema`` takes four."""
MOST_ITEMS = 64
"""Longer lists and dicts hold data."""
MOST_OBJECTS = 5_000


@dataclass(frozen=True)
class Found:
    """An object of the loop.

    Attributes:
        value: the object.
        path: how the loop would write it.
        holder: the list, tuple, dict or object that holds it; None for a variable.
    """

    value: Any
    path: str
    holder: Any


def variables(leave_out: nn.Module) -> Iterator[Found]:
    """Variables of the calling functions and of their modules, those of this package left out, and what these hold in
    attributes, lists, tuples and dicts; each object once, the nearest first.

    Args:
        leave_out: a module whose parts are not looked at.
    """
    frame: FrameType | None = inspect.currentframe()
    waiting: deque[tuple[Found, int]] = deque()
    seen = {id(leave_out)}
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] != PACKAGE:
            for scope in (frame.f_locals, frame.f_globals):
                waiting.extend((Found(value, name, None), 0) for name, value in list(scope.items()) if _is_own(name))
        frame = frame.f_back
    while waiting and len(seen) < MOST_OBJECTS:
        one, depth = waiting.popleft()
        if id(one.value) in seen or _is_plain(one.value):
            continue
        seen.add(id(one.value))
        yield one
        if depth < DEPTH:
            waiting.extend((each, depth + 1) for each in _held(one))


def _is_own(name: str) -> bool:
    return not (name.startswith("__") and name.endswith("__"))


def _is_plain(one: Any) -> bool:
    """Whether nothing of the loop's own can be in an object."""
    own = str(getattr(type(one), "__module__", "")).partition(".")[0] == PACKAGE
    return own or issubclass(type(one), (ModuleType, type, str, bytes, int, float, torch.Tensor))


def _held(one: Found) -> Iterator[Found]:
    value = one.value
    if type(value) in (list, tuple) and len(value) <= MOST_ITEMS:
        yield from (Found(each, f"{one.path}[{number}]", value) for number, each in enumerate(value))
    elif issubclass(type(value), dict) and dict.__len__(value) <= MOST_ITEMS:
        items = [(key, each) for key, each in list(dict.items(value)) if type(key) in (str, int)]
        yield from (Found(each, f"{one.path}[{key!r}]", value) for key, each in items)
    elif not issubclass(type(value), (list, tuple, dict)):
        own = attributes_of(value)
        parts = own.pop("_modules", None) if is_a(value, nn.Module) else None
        for name, each in [*own.items(), *(parts.items() if type(parts) is dict else ())][: 4 * MOST_ITEMS]:
            yield Found(each, f"{one.path}.{name}", value)


def is_a(one: Any, kind: type) -> bool:
    """``isinstance`` that asks no proxy what it stands for."""
    return issubclass(type(one), kind)


def attributes_of(one: Any) -> dict[str, Any]:
    """What an object holds itself, under the names of its attributes."""
    try:
        held = object.__getattribute__(one, "__dict__")
    except AttributeError:
        return {}
    return {name: value for name, value in held.items() if isinstance(name, str)} if type(held) is dict else {}


def paths_to(values: list[Any], leave_out: nn.Module) -> Mapping[int, str]:
    """How the loop would write some of its objects: id -> the shortest way, for those that it has at hand.

    Args:
        values: the objects.
        leave_out: a module whose parts are not looked at.
    """
    wanted = {id(one) for one in values}
    return {id(one.value): one.path for one in variables(leave_out) if id(one.value) in wanted}
