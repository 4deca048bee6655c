"""Reversible changes to models and optimizers, and the successors of sliced tensors.

Shape suffixes: ``_D`` entries of one dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Keep = dict[int, Tensor]
"""Dimension -> indices that stay (int64, ascending)."""


def slice_tensor(tensor: Tensor, keep: Keep) -> Tensor:
    """The tensor with only the kept indices of some dimensions, in its own memory and memory format."""
    memory_format = torch.channels_last if tensor.dim() == 4 and not tensor.is_contiguous() else torch.contiguous_format
    runs = {dim: indices for dim, indices in keep.items() if _is_run(indices)}
    left = tensor
    for dim, indices in runs.items():  # views, so that the rest is copied once
        left = left.narrow(dim, int(indices[0]), len(indices))
    for dim, indices in keep.items():
        if dim not in runs:
            left = left.index_select(dim, indices.to(tensor.device))
    made = left.contiguous(memory_format=memory_format) if keep else left
    return made.clone() if made is left and len(runs) == len(keep) else made


def _is_run(indices: Tensor) -> bool:
    """Whether ascending indices are consecutive."""
    return len(indices) > 0 and int(indices[-1]) - int(indices[0]) + 1 == len(indices)


def successor(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter with other values (and another shape) that keeps the old one's hooks, attributes and freezing."""
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, hooks):
            setattr(new, hooks, getattr(old, hooks))
    return new


class Surgery:
    """Changes to a model, its optimizers and followers that can be undone until they are committed."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    # How to undo a change is noted before it is made, and does no harm without it: an interrupt may come in between.

    def set_attribute(self, target: object, name: str, value: Any) -> None:
        old = getattr(target, name)
        self._undo.append(lambda: setattr(target, name, old))
        setattr(target, name, value)

    def set_item(self, target: Any, key: Any, value: Any) -> None:
        old = target[key]
        self._undo.append(lambda: target.__setitem__(key, old))
        target[key] = value

    def rename_key(self, target: Any, old_key: Any, new_key: Any, value: Any) -> None:
        old = target[old_key]

        def undo() -> None:
            target.pop(new_key, None)
            target[old_key] = old

        self._undo.append(undo)
        target.pop(old_key)
        target[new_key] = value

    def drop_key(self, target: Any, key: Any) -> None:
        old = target[key]
        self._undo.append(lambda: target.__setitem__(key, old))
        target.pop(key)

    def when_undone(self, action: Callable[[], Any]) -> None:
        """Call an action on undo, after all later changes are undone."""
        self._undo.append(action)

    def undo(self) -> None:
        """Undo all changes."""
        for step in reversed(self._undo):
            step()
        self._undo = []
