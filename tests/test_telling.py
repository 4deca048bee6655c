"""What happens is said once, by whoever listens."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from pruningawaretraining import Pruning
from pruningawaretraining.session.step_events import tell_once


class Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def top() -> Iterator[logging.Logger]:
    """A stand-in for the root logger, with two loggers below it."""
    one = logging.getLogger("telling")
    one.propagate, one.handlers = False, []
    for name in ("telling.own", "telling.user"):
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True
        logging.getLogger(name).setLevel(logging.NOTSET)
    one.setLevel(logging.INFO)
    yield one
    one.handlers = []


@pytest.mark.parametrize("method", [False, True])
@pytest.mark.parametrize(
    ("places", "own_level", "expected"),
    [
        ({"telling": "shared"}, logging.INFO, {"shared": 1}),
        ({"telling.own": "mine", "telling.user": "theirs"}, logging.INFO, {"mine": 1, "theirs": 1}),
        ({"telling": "shared", "telling.own": "mine"}, logging.INFO, {"shared": 1, "mine": 1}),
        ({"telling": "shared", "telling.user": "theirs"}, logging.INFO, {"shared": 1, "theirs": 1}),
        ({"telling": "shared"}, logging.WARNING, {"shared": 1}),
        ({"telling.user": "theirs"}, logging.INFO, {"theirs": 1}),
    ],
)
def test_a_logger_beside_info_logging_has_each_line_once(
    top: logging.Logger, method: bool, places: dict[str, str], own_level: int, expected: dict[str, int]
) -> None:
    listeners = {name: Listener() for name in places.values()}
    for place, name in places.items():
        logging.getLogger(place).addHandler(listeners[name])
    own, user = logging.getLogger("telling.own"), logging.getLogger("telling.user")
    own.setLevel(own_level)
    tell_once(own, user.info if method else user, "40 of 80 channels")
    assert {name: len(one.lines) for name, one in listeners.items()} == expected
    assert all(one.lines == ["40 of 80 channels"] for one in listeners.values())


def test_functions_and_nobody(top: logging.Logger) -> None:
    listener, stream = Listener(), io.StringIO()
    top.addHandler(listener)
    own = logging.getLogger("telling.own")
    tell_once(own, stream.write, "a")
    tell_once(own, None, "b")
    assert stream.getvalue() == "a" and listener.lines == ["a", "b"]


@pytest.mark.parametrize("method", [False, True])
def test_events_of_a_pruner_are_said_once_with_a_logger_beside_info_logging(
    method: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    rule = {"target": {"sparsity": 0.5}, "start": 0, "end": 1}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=torch.randn(1, 4))
    user = logging.getLogger("a training script")
    with caplog.at_level(logging.INFO):
        done = [pruner.prune(model, epoch, log=user.info if method else user) for epoch in (0, 1)]
    assert done == ["masked", "removed"]
    said = [one.getMessage() for one in caplog.records if one.getMessage().startswith("rules[0]: epoch")]
    assert [line.split()[3] for line in said] == ["masked", "masked", "removed,"] and len(set(said)) == 3
