"""What the fuzzers share: hostile values, mutations of nested data and of bytes, and what must hold of every answer."""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pruningawaretraining.errors import LONGEST, PruningError

SECONDS = 10
"""After which an example counts as hanging."""
COUNTS = "RELIABILITY_COUNTS"
"""Environment variable: the folder that counts are written to."""

PLAIN: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, -1e-9, 1e308,
    float("inf"), float("nan"), "", " ", "x", "magnitude", "channel", "2:4", "4x1", "0:0", "re:(", "re:.*", "re:(a+)+$",
    "none", "null", "nan", "-1", "1e999", "../..", "~", "\x1b[2J", "a\nb", "ü\u2028", "\ud800", "\0", "x" * 3000,
    "os:system", "module.", ".", "..", [], {}, [[]], [{}], {"": ""}, {"type": None}, {"type": "x"}, {"a": {"b": {}}},
    [1, 2, 3], ["a"], datetime.date(2026, 2, 3), b"\xff", (1, 2),
]  # fmt: skip
"""Values that some reader somewhere trips over."""


def fixed(examples: int) -> settings:
    """So many examples, the same ones every time."""
    every = list(HealthCheck)
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=every,
        print_blob=False,
    )


hostile = st.recursive(
    st.sampled_from(PLAIN) | st.integers(-(10**6), 10**6) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
).map(copy.deepcopy)  # what is drawn may be changed later


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a nest."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*path, number))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@st.composite
def mutated(draw: st.DrawFn, bases: st.SearchStrategy[Any], values: st.SearchStrategy[Any] = hostile) -> Any:
    """A nest of plain data in which one to four places are exchanged, lost, doubled, renamed or swapped."""
    nest = copy.deepcopy(draw(bases))
    for _ in range(draw(st.integers(1, 4))):
        paths = [path for path in places(nest) if path]
        if not paths:
            return nest
        path = paths[draw(st.integers(0, len(paths) - 1))]
        holder, key = at(nest, path[:-1]), path[-1]
        kind = draw(st.sampled_from(("exchange", "exchange", "lose", "rename", "add", "swap")))
        if kind == "exchange":
            holder[key] = draw(values)
        elif kind == "lose":
            del holder[key]
        elif kind == "swap":
            other = paths[draw(st.integers(0, len(paths) - 1))]
            holder[key] = copy.deepcopy(at(nest, other))
        elif isinstance(holder, list):
            holder.append(draw(values))
        elif kind == "rename":
            name = draw(st.sampled_from((f"{key}x", str(key)[:-1], "type", "")) | st.text(max_size=5))
            holder[name] = holder.pop(key)
        else:
            holder[draw(st.text(max_size=6))] = draw(values)
    return nest


@st.composite
def damaged(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """Bytes that are cut, overwritten, doubled, or shifted in one to four places."""
    data = bytearray(draw(contents))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("cut", "overwrite", "insert", "lose", "double")))
        some = draw(st.binary(min_size=1, max_size=8))
        if kind == "cut":
            del data[place:]
        elif kind == "overwrite":
            data[place : place + len(some)] = some
        elif kind == "insert":
            data[place:place] = some
        elif kind == "lose":
            del data[place : place + len(some)]
        else:
            data += data[place : place + 200]
    return bytes(data)


class Hanging(BaseException):
    """An example takes longer than :data:`SECONDS`."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """End the block with :class:`Hanging` when it takes too long."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hanging(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Tally:
    """What the examples of one fuzzer have come to.

    Attributes:
        name: of what was tried.
        counts: "taken" and "refused" examples.
        slowest: seconds of the slowest.
    """

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0

    def answer(self, action: Callable[[], Any]) -> Any:
        """What an action gives, or the PruningError that it ends with; anything else that it raises is a failure."""
        started = time.perf_counter()
        try:
            with watched():
                result = action()
            self.counts["taken"] += 1
        except PruningError as error:
            check_message(error)
            self.counts["refused"] += 1
            result = error
        self.slowest = max(self.slowest, time.perf_counter() - started)
        return result

    def write(self) -> None:
        """Leave the counts for scripts/reliability.py, where it asks for them."""
        folder = os.environ.get(COUNTS)
        if folder:
            found = {"name": self.name, **self.counts, "slowest": round(self.slowest, 2)}
            (Path(folder) / f"{self.name}.json").write_text(json.dumps(found))


def check_message(error: PruningError) -> None:
    message = str(error)
    assert 0 < len(message) <= LONGEST, f"{len(message)} characters"
    assert all(letter == "\n" or letter >= " " for letter in message)
    message.encode()  # no lone surrogates


def contents(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a refusal must not change: tensors, and every number of its modules."""
    plain = (int, float, str, tuple, list, type(None))
    numbers = {
        f"{name}:{key}": copy.copy(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, plain)
    }
    return {**numbers, **{f"={key}": value.clone() for key, value in model.state_dict().items()}}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(after[key], value) if isinstance(value, Tensor) else after[key] == value
        assert same, f"{key} has changed"
