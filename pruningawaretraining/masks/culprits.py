"""Where a model fails without some of its groups, and which sets have tensors there."""

from __future__ import annotations

from torch import nn

from pruningawaretraining.groups.grouping import Grouping


def failing_module(error: BaseException, model: nn.Module) -> str | None:
    """The innermost module of a model in whose code an error was raised; None where it was in none of them."""
    names = {id(module): name for name, module in model.named_modules()}
    found, step = None, (error.__cause__ or error).__traceback__
    while step is not None:
        found = names.get(id(step.tb_frame.f_locals.get("self")), found)
        step = step.tb_next
    return found


def problem_of(error: BaseException) -> str:
    """What a module raised, in one line."""
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def sets_within(grouping: Grouping, module: str) -> list[int]:
    """The numbers of the sets that have tensors of a module, or of a module in it."""
    prefix = f"{module}." if module else ""
    found: set[int] = set()
    for member in grouping.members:
        if member.slots is not None and member.name.startswith(prefix):
            slots = member.slots.cpu()
            found.update(grouping.set_ids.cpu()[slots[slots < grouping.size]].tolist())
    return sorted(found)
