"""Records of a pruned model beside its tensors, from its pruner or from the file that it was loaded from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pruningawaretraining.models.private import keep_private, private_of

DESCRIBE = "_pruning_describe"
PRUNER_KEY = "pruner_state (make a Pruning of this model and call its state_in before load_state_dict, or drop it)"
"""Name of the pruner's state in a state dict. A model without a pruner names it as unexpected: it says what to do."""
ATTRIBUTE = "_pruning_record"
"""Where a module has its record: plain data that a copy, a moving average and a pickle take along."""
DESCRIPTION = "_pruning_description"
"""The same of what its pruner said last; a new pruner of the module starts from the module as it is."""


def describe_with(model: nn.Module, describe: Callable[[], dict[str, Any]]) -> None:
    """Register the function whose plain data ``save_pruned`` writes beside the tensors."""
    keep_private(model, DESCRIBE, describe)


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """The record in the file that a model, or the model it was copied from, was loaded from."""
    return vars(model).get(ATTRIBUTE)


def remember(model: nn.Module, record: dict[str, Any]) -> None:
    """Remember the record of the file that a model was loaded from."""
    vars(model)[ATTRIBUTE] = record


def note(model: nn.Module, description: dict[str, Any]) -> None:
    """Keep what a pruner says of a module where copies, moving averages and pickles take it along."""
    vars(model)[DESCRIPTION] = description


def summary_of(model: nn.Module) -> dict[str, Any]:
    """What a pruner says of its model: sparsity, MACs, parameters, groups kept; or what it said of what the model is a
    copy of; or what its file said; or nothing."""
    describe = private_of(model, DESCRIBE)
    return dict(describe() if describe else vars(model).get(DESCRIPTION) or record_of(model) or {})


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model without the state of a pruner that may travel in it."""
    return {name: value for name, value in model.state_dict().items() if not name.endswith(PRUNER_KEY)}
