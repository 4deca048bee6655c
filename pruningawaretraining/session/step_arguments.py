"""The arguments of an optimizer's ``step``, and the closure among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def closure_in(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[], Any] | None, Callable[[Callable[[], Any]], Arguments]]:
    """The closure among the arguments of ``step`` (the optimizer comes first), and how to put another in its place."""
    if len(args) > 1 and callable(args[1]):
        return args[1], lambda new: ((args[0], new, *args[2:]), kwargs)
    if callable(kwargs.get("closure")):
        return kwargs["closure"], lambda new: (args, {**kwargs, "closure": new})
    return None, lambda new: (args, kwargs)
