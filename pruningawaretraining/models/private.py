"""Values that lie in the attributes of one module and are about that module alone."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn


class _Private:
    """A value of one module. A deep copy of the module and a pickle have None in its place."""

    def __init__(self, owner: nn.Module, value: Any) -> None:
        self.owner, self.value = weakref.ref(owner), value

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def keep_private(module: nn.Module, name: str, value: Any) -> None:
    """Keep a value in a module's attributes; copies and pickles of the module are without it."""
    vars(module)[name] = _Private(module, value)


def private_of(module: nn.Module, name: str) -> Any:
    """The value that :func:`keep_private` has kept in this module, or None."""
    found = vars(module).get(name)
    return found.value if isinstance(found, _Private) and found.owner() is module else None
