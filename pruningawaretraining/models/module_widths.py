"""Update attributes of users' modules that count channels after a removal; ``save_pruned`` saves those that changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from pruningawaretraining.models.surgery import Surgery

CHANGED = "_pruned_widths"
"""Where a module has the names of its attributes that followed a removal."""


def widths_of(module: nn.Module, channels: int) -> Iterator[tuple[str, Any]]:
    """Attributes of a module that are its number of channels, or a shape of that one dimension."""
    for name, value in vars(module).items():
        if name.startswith("_") or isinstance(value, bool):
            continue
        if value == channels if isinstance(value, int) else _is_shape(value, channels):
            yield name, value


def _is_shape(value: Any, channels: int) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 1 and isinstance(value[0], int) and value[0] == channels


def narrowed(value: Any, channels: int) -> Any:
    """A number of channels, or a shape, with another number."""
    return channels if isinstance(value, int) else type(value)((channels,))


def set_count(module: nn.Module, attribute: str, channels: int, surgery: Surgery) -> None:
    """Let an attribute count other channels, and remember that it did."""
    surgery.set_attribute(module, attribute, narrowed(getattr(module, attribute), channels))
    before = changed_widths(module)
    vars(module)[CHANGED] = tuple(dict.fromkeys((*before, attribute)))
    surgery.when_undone(lambda: vars(module).update({CHANGED: before}) if before else vars(module).pop(CHANGED))


def counted_widths(module: nn.Module) -> dict[str, int | list[int]]:
    """The present values of the attributes of a module that followed a removal; a shape as a list."""
    values = {name: getattr(module, name) for name in changed_widths(module)}
    return {name: value if isinstance(value, int) else list(value) for name, value in values.items()}


def changed_widths(module: nn.Module) -> tuple[str, ...]:
    """The attributes of a module that followed a removal."""
    return tuple(vars(module).get(CHANGED, ()))
