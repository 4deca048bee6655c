"""Record the copies that users make of a model: a moving average that the pruner does not know may be among them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

ATTRIBUTE = "_pruning_copies"


class CopyWatch:
    """Records the deep copies of the model in whose attributes it is; every moving average begins as one.

    Copies are held weakly; a copy of the model, and a pickle of it, watch nothing.

    Args:
        model: the model, or None to watch nothing.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._copies: list[weakref.ref[nn.Module]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> CopyWatch:
        model = None if self._model is None else self._model()
        made = memo.get(id(model))
        if isinstance(made, nn.Module):
            self._copies.append(weakref.ref(made))
        return CopyWatch()

    def __reduce__(self) -> tuple[type[CopyWatch], tuple[()]]:
        return CopyWatch, ()

    def unlike(self, model: nn.Module) -> list[nn.Module]:
        """The copies that are still there and have tensors of other shapes than the model has now."""
        shapes = [one.shape for one in model.parameters()]
        alive = [one for ref in self._copies if (one := ref()) is not None]
        return [one for one in alive if [tensor.shape for tensor in one.parameters()] != shapes]


def watch_copies(model: nn.Module) -> CopyWatch:
    """Watch the copies that are made of a model from here on."""
    watch = CopyWatch(model)
    vars(model)[ATTRIBUTE] = watch
    return watch
