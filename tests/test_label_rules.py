"""Rules of operations, one by one, and the whole against Torch-Pruning's graph on networks that it understands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from pruningawaretraining.patterns.channel_labels import channel_groups, producer_names
from pruningawaretraining.patterns.coupling import Deadline
from pruningawaretraining.patterns.dependency import trace as trace_by_graph
from pruningawaretraining.patterns.labels.follower import Follower, followed
from pruningawaretraining.patterns.labels.slots import NOBODY, Slots, compressed, pattern, varying
from pruningawaretraining.patterns.labels.trace import trace
from pruningawaretraining.patterns.labels.views import reshaped

W, V = torch.zeros(1, 6, 1), torch.zeros(1, 6, 1)
Result = list[list[int]]


def classes(function: Callable[[Tensor, Tensor], Tensor], count: int = 6) -> tuple[Result, list[str]]:
    """Which of the channels 0.. of W and 10.. of V go together, and why some stay."""
    first, second = torch.zeros(1, count, 1), torch.zeros(1, count, 1)
    slots = Slots()
    follower = Follower(slots, {"w": first, "v": second}, Deadline(60))
    with torch.no_grad(), followed(follower, nn.Module()):
        function(first, second)
    numbers = slots.components()[: 2 * count].tolist()
    found: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        found.setdefault(number, []).append(place if place < count else place - count + 10)
    return [one for one in found.values() if len(one) > 1], [lock.reason for lock in slots.locks]


def one_by_one(*pairs: tuple[int, ...]) -> Result:
    return [list(pair) for pair in pairs]


CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Result]] = {
    "sum": (lambda w, v: w + v, one_by_one(*((i, 10 + i) for i in range(6)))),
    "in place": (lambda w, v: (w * 1).add_(v), one_by_one(*((i, 10 + i) for i in range(6)))),
    "flip": (lambda w, v: w + v.flip(1), one_by_one(*((i, 15 - i) for i in range(6)))),
    "roll": (lambda w, v: w[:, :6] + torch.cat([v, v], 1)[:, :6], one_by_one(*((i, 10 + i) for i in range(6)))),
    "chunk and product": (lambda w, v: w.chunk(2, 1)[0] * w.chunk(2, 1)[1], one_by_one((0, 3), (1, 4), (2, 5))),
    "glu": (lambda w, v: F.glu(w, 1), one_by_one((0, 3), (1, 4), (2, 5))),
    "chunk into cat": (lambda w, v: torch.cat(w.chunk(2, 1)[::-1], 1), one_by_one((0, 3), (1, 4), (2, 5))),
    "nothing": (lambda w, v: torch.cat([w, v], 1), []),
    "natural split": (lambda w, v: torch.cat(torch.cat([w, v], 1).split((6, 6), 1)[::-1], 1), []),
    "groups by view": (lambda w, v: w.view(1, 2, 3).transpose(1, 2), one_by_one((0, 3), (1, 4), (2, 5))),
    "shuffle": (
        lambda w, v: w.view(1, 2, 3, 1).transpose(1, 2).reshape(1, 6, 1) + v,
        one_by_one((0, 3, 10, 11), (1, 4, 12, 13), (2, 5, 14, 15)),
    ),
    "matrix product": (lambda w, v: w.transpose(1, 2) @ v, one_by_one(*((i, 10 + i) for i in range(6)))),
    "outer product": (lambda w, v: w @ v.transpose(1, 2), []),
    "einsum": (lambda w, v: torch.einsum("bci,bcj->bij", w, v), one_by_one(*((i, 10 + i) for i in range(6)))),
    "stack and softmax": (
        lambda w, v: torch.stack([w, v], 1).softmax(1), one_by_one(*((i, 10 + i) for i in range(6)))
    ),
    "pixel shuffle": (
        lambda w, v: F.pixel_shuffle(F.pad(w, (0, 0, 0, 2))[..., None], 2), one_by_one((0, 1, 2, 3), (4, 5))
    ),
    "scatter": (
        lambda w, v: torch.zeros_like(w).index_add_(2, torch.tensor([0]), v) + w,
        one_by_one(*((i, 10 + i) for i in range(6))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_goes_together(case: str) -> None:
    function, expected = CASES[case]
    assert classes(function)[0] == expected


CONSTANT = torch.rand(6, 1)
LOCKS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "softmax": (lambda w, v: w.softmax(1), "reaches a softmax over channels"),
    "argmax": (lambda w, v: w.argmax(1), "reaches an argmax over channels"),
    "sort": (lambda w, v: w.sort(1)[0], "reaches a sort over channels"),
    "cumsum": (lambda w, v: w.cumsum(1), "reaches a cumulative sum over channels"),
    "index": (lambda w, v: w[:, [2, 1]], "is looked up by number"),
    "select": (lambda w, v: w[:, 2], "is picked by number"),
    "constant": (lambda w, v: w + CONSTANT, "meets a tensor that is no parameter or buffer"),
    "slice": (lambda w, v: w[:, 1:], "is cut at a place that the code states"),
    "unknown": (lambda w, v: torch.linalg.qr(w)[0], "an operation that is not understood"),
    "window": (lambda w, v: F.avg_pool1d(w.transpose(1, 2), 2), "reaches a window that slides over channels"),
}


@pytest.mark.parametrize("case", LOCKS)
def test_what_stays_and_why(case: str) -> None:
    function, reason = LOCKS[case]
    found = classes(function)[1]
    assert any(reason in one and "(test_label_rules.py, line" in one for one in found), found


@pytest.mark.parametrize("case", ["sum over positions", "padding", "expand", "clone"])
def test_what_changes_nothing(case: str) -> None:
    function = {
        "sum over positions": lambda w, v: w.sum(2),
        "padding": lambda w, v: F.pad(w, (1, 1)),
        "expand": lambda w, v: w.expand(2, 6, 4),
        "clone": lambda w, v: w.clone().double().relu(),
    }[case]
    assert classes(function) == ([], [])


FLOWS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], set[str]]] = {
    "one": (lambda w, v: w * 2, {"w"}),
    "dropped": (lambda w, v: (v * w, w + 1)[1], {"w"}),
    "view": (lambda w, v: torch.cat([w, v], 1)[:, 0], {"w", "v"}),
    "written in place": (lambda w, v: torch.zeros(1, 6, 1).add_(v), {"v"}),
    "written into a view": (lambda w, v: _written(v), {"v"}),
    "decides in code": (lambda w, v: v * 2 if bool(w.sum() > 1) else v, {"w", "v"}),
    "a choice": (lambda w, v: v[:, w.argmax(1)[0]], {"w", "v"}),
}


def _written(v: Tensor) -> Tensor:
    made = torch.zeros(1, 6, 1)
    made[:, :3] = v[:, 3:]
    return made


@pytest.mark.parametrize("case", FLOWS)
def test_what_an_output_is_made_of(case: str) -> None:
    function, expected = FLOWS[case]
    tensors = {"w": torch.zeros(1, 6, 1), "v": torch.zeros(1, 6, 1)}
    follower = Follower(Slots(), tensors, Deadline(60))
    with torch.no_grad(), followed(follower, nn.Module()):
        found = function(tensors["w"], tensors["v"])
    assert follower.flow.sources([found], tensors) == expected


def test_arrays() -> None:
    array = torch.arange(6).reshape(1, 6, 1).numpy()
    assert reshaped(array, (2, 6, 4), (2, 2, 3, 4)).tolist() == [[[[0], [1], [2]], [[3], [4], [5]]]]
    assert reshaped(array, (2, 6, 4), (2, 24)).tolist() == [[i // 4 for i in range(24)]]
    assert reshaped(array, (2, 6, 4), (12, 4)).tolist() == [[i % 6] for i in range(12)]
    assert reshaped(array, (1, 6, 1), (6,)).tolist() == list(range(6))
    assert varying(compressed(array.repeat(3, axis=2))) == (1,)
    assert pattern(torch.tensor([5, 7, 5]).numpy()) == pattern(torch.tensor([1, 0, 1]).numpy())
    assert pattern(torch.tensor([5, 7, 5]).numpy()) != pattern(torch.tensor([1, 0, 0]).numpy())


def test_slots_of_nobody_are_joined_to_nothing() -> None:
    slots = Slots()
    one, other = slots.new(2), slots.new(2)
    other[0] = NOBODY
    slots.join(one, other)
    assert slots.components().tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "resnext50_32x4d", "groupnorm"])
def test_groups_are_those_of_torch_pruning(name: str) -> None:
    """Where both understand a network, they agree on sets, sizes and members."""
    model, inputs = zoo.architecture(name)
    chosen = set(producer_names(model))
    ours, theirs = (channel_groups(model, find(model, inputs), chosen) for find in (trace, trace_by_graph))
    assert ours.grouping.sets == theirs.grouping.sets
    assert ours.skipped.keys() == theirs.skipped.keys()
    assert [one.groups.keys() for one in ours.attachments] == [one.groups.keys() for one in theirs.attachments]
    mine, other = (
        {(one.name, one.role): one.slots.tolist() for one in found.grouping.members if one.slots is not None}
        for found in (ours, theirs)
    )
    assert mine == other
