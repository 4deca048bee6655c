"""What is known of a pruned model beside its tensors: from its pruner, or from the file that it was loaded from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_DESCRIBERS: WeakKeyDictionary[nn.Module, Callable[[], dict[str, Any]]] = WeakKeyDictionary()
_RECORDS: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def describe_with(model: nn.Module, describe: Callable[[], dict[str, Any]]) -> None:
    """Let a pruner say what ``save_pruned`` writes beside the tensors: plain data."""
    _DESCRIBERS[model] = describe


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """What was written beside the tensors of the file that this model was loaded from; None for any other model."""
    return _RECORDS.get(model)


def remember(model: nn.Module, record: dict[str, Any]) -> None:
    """Keep what was written beside the tensors of the file that a model was loaded from."""
    _RECORDS[model] = record


def summary_of(model: nn.Module) -> dict[str, Any]:
    """What a pruner says of its model: sparsity, MACs, parameters, groups kept; or what its file said; or nothing."""
    describe = _DESCRIBERS.get(model)
    return describe() if describe is not None else dict(record_of(model) or {})
