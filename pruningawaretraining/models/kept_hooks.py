"""Forward hooks of modules that have to know which of their entries are masked.

Shape suffixes: ``_G`` groups, ``_N`` entries of one module: channels of a norm, experts of a router.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.models.compiling import forget_compiled


class KeptHook(Protocol):
    """A forward hook that knows which entries are kept."""

    def take(self, keep_N: Tensor, device: torch.device) -> None:
        """Take new masks (on the CPU)."""


Hook = TypeVar("Hook", bound=KeptHook)


class KeptHooks(Generic[Hook]):
    """Hooks of several modules of one model, there from the first mask that drops an entry of any of them.

    A hook that is there is only told of new masks.

    Args:
        model: the model.
        kept: masks -> name -> which entries are kept.
    """

    def __init__(self, model: nn.Module, kept: Callable[[Tensor], Mapping[str, Tensor]]) -> None:
        self.model, self.kept = model, kept
        self._handles: list[RemovableHandle] = []
        self._hooks: dict[str, Hook] = {}

    def hooked(self, name: str, keep_N: Tensor, device: torch.device) -> tuple[Hook, RemovableHandle]:
        """Give the module behind a name its hook."""
        raise NotImplementedError

    def mask(self, keep_G: Tensor, device: torch.device) -> None:
        """Take new masks (on the CPU); all modules get a hook once one needs it."""
        keep_of = self.kept(keep_G)
        if not self._hooks and not all(bool(keep_N.all()) for keep_N in keep_of.values()):
            for name, keep_N in keep_of.items():
                self._hooks[name], handle = self.hooked(name, keep_N, device)
                self._handles.append(handle)
            forget_compiled(self.model)
        for name, hook in self._hooks.items():
            hook.take(keep_of[name], device)

    def release(self) -> None:
        """Take every hook out."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooks = [], {}
