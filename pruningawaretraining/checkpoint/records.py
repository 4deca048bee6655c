"""Records of a pruned model beside its tensors, from its pruner or from the file that it was loaded from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from pruningawaretraining.models.private import keep_private, private_of

DESCRIBE = "_pruning_describe"
PRUNER_KEY = "pruner_state (make a Pruning of this model and call its state_in before load_state_dict, or drop it)"
"""Name of the pruner's state in a state dict. A model without a pruner names it as unexpected: it says what to do."""
ATTRIBUTE = "_pruning_record"
"""Where a module has its record: plain data that a copy, a moving average and a pickle take along."""
DESCRIPTION = "_pruning_description"
"""The same of what its pruner said last."""


def check_record(record: Mapping[str, Any]) -> None:
    """Refuse what no pruner has said of its model; nothing at all is allowed.

    Raises:
        ValueError: it names the key.
    """
    needed = ("macs", "parameters") if record else ()
    for key in (*needed, *(key for key in CHECKS if key in record and key not in needed)):
        if key not in record or not CHECKS[key](record[key]):
            raise ValueError(f"record.{key}: {str(record.get(key, 'nothing'))[:60]!r} is not what a pruner writes")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _is_pair(value: Any) -> bool:
    """Whether it is how many groups a set had, and how many of them it has."""
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)) and value[1] <= value[0]


def _is_goal(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("target"), dict) and isinstance(value.get("met"), bool)


def _all_are(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


CHECKS: dict[str, Callable[[Any], bool]] = {
    "phase": lambda value: isinstance(value, str),
    "sparsity": _is_fraction,
    "macs": _is_count,
    "kept_macs": _is_count,
    "parameters": _is_count,
    "groups": _all_are(_is_pair),
    "elements": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "rules": _all_are(_is_goal),
}
"""Key of a record -> whether a value is one that a pruner writes."""


def describe_with(model: nn.Module, describe: Callable[[], dict[str, Any]]) -> None:
    """Register the function whose plain data ``save_pruned`` writes beside the tensors."""
    keep_private(model, DESCRIBE, describe)


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """The last description by an earlier pruner of this module, or of what it is a copy of; else the record in the file
    that it was loaded from."""
    return vars(model).get(DESCRIPTION) or vars(model).get(ATTRIBUTE)


def remember(model: nn.Module, record: dict[str, Any]) -> None:
    """Remember the record of the file that a model was loaded from."""
    vars(model)[ATTRIBUTE] = record


def note(model: nn.Module, description: dict[str, Any]) -> None:
    """Keep what a pruner says of a module where copies, moving averages and pickles take it along."""
    vars(model)[DESCRIPTION] = description


def summary_of(model: nn.Module) -> dict[str, Any]:
    """A pruner's description of its model: sparsity, MACs, parameters, groups kept; of a copy, that of the
    original; of a loaded model, that of its file; or nothing."""
    describe = private_of(model, DESCRIBE)
    return dict(describe() if describe else record_of(model) or {})


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model without the state of a pruner that may travel in it."""
    return {name: value for name, value in model.state_dict().items() if not name.endswith(PRUNER_KEY)}
