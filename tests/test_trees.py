"""Nests of tensors: every container that models take or return is walked and rebuilt."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pruningawaretraining.models.calling import move
from pruningawaretraining.models.trees import map_tensors, tensors_of, with_tensors

A, B = torch.tensor([1.0]), torch.tensor([2.0])
Pair = namedtuple("Pair", ["first", "second"])


class Own(list):  # type: ignore[type-arg]
    """A list of a class of its own."""


@dataclass(frozen=True)
class Output:
    logits: Tensor
    hidden: Any = None


NESTS = {
    "tensor": (A, [A]),
    "list": ([A, "text", B], [A, B]),
    "tuple": ((A, (B, None)), [A, B]),
    "dict": ({"z": A, "a": {"b": B}}, [A, B]),
    "ordered dict": (OrderedDict(z=A, a=B), [A, B]),
    "named tuple": (Pair(A, [B]), [A, B]),
    "own list": (Own([A, B]), [A, B]),
    "dataclass": (Output(A, [B, 3]), [A, B]),
    "dataclass in a dict": ({"out": Output(A), "more": (B,)}, [A, B]),
    "nothing": (None, []),
}


@pytest.mark.parametrize("name", NESTS)
def test_nests_are_walked_and_rebuilt(name: str) -> None:
    nest, expected = NESTS[name]
    assert [id(one) for one in tensors_of(nest)] == [id(one) for one in expected]
    doubled = map_tensors(lambda tensor: 2 * tensor, nest)
    assert type(doubled) is type(nest)
    assert [one.item() for one in tensors_of(doubled)] == [2 * one.item() for one in expected]
    assert [id(one) for one in tensors_of(with_tensors(doubled, expected))] == [id(one) for one in expected]
    assert [one.device.type for one in tensors_of(move(nest, torch.device("meta")))] == ["meta"] * len(expected)


def test_an_unregistered_mapping_becomes_a_dict() -> None:
    mapped = map_tensors(lambda tensor: 2 * tensor, UserDict(x=A, y=[B], z=1))
    assert type(mapped) is dict
    assert [mapped["x"].item(), mapped["y"][0].item(), mapped["z"]] == [2.0, 4.0, 1]
