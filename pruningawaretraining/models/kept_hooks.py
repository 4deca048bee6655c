"""Forward hooks of modules that have to know which of their entries are masked.

Shape suffixes: ``_G`` groups, ``_N`` entries of one module: channels of a norm, experts of a router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.models.compiling import forget_compiled
from pruningawaretraining.models.surgery import Surgery


class KeptHook(Protocol):
    """A forward hook that knows which entries are kept.

    Attributes:
        saved: whether it came with a file; see :mod:`pruningawaretraining.models.saved_masks`.
    """

    saved: bool
    behind: int
    """How many dimensions come after that of the entries."""

    def take(self, keep_N: Tensor, device: torch.device) -> None:
        """Take new masks (on the CPU)."""

    def known(self) -> Tensor | None:
        """Which entries are kept, a vector on the CPU; None before it was told."""

    def narrow(self, keep_N: Tensor, surgery: Surgery) -> None:
        """Know of these entries alone, once the others are removed."""


def known_of(hook: object) -> Tensor | None:
    """Which entries a hook knows as kept; None if it was never told, or is another kind of hook."""
    known = getattr(hook, "known", None)
    return known() if known is not None and hasattr(hook, "saved") else None


def saved_hooks(module: nn.Module) -> list[tuple[int, KeptHook]]:
    """The hooks of a module that came with a file, by their keys."""
    hooks: dict[int, Any] = module._forward_hooks
    return [(key, hook) for key, hook in hooks.items() if getattr(hook, "saved", False)]


@contextmanager
def without_saved(model: nn.Module) -> Iterator[None]:
    """Inside the block a model has none of the hooks that came with a file; they are where they were after it."""
    held = [(module._forward_hooks, list(module._forward_hooks.items())) for module in model.modules()]
    held = [(table, before) for table, before in held if any(getattr(hook, "saved", False) for _, hook in before)]
    try:
        for table, before in held:
            for key, hook in before:
                if getattr(hook, "saved", False):
                    del table[key]
        yield
    finally:
        for table, before in held:
            left = dict(table)
            table.clear()
            table.update({key: hook for key, hook in before if key in left or getattr(hook, "saved", False)})
            table.update({key: hook for key, hook in left.items() if key not in table})


def narrow_saved(module: nn.Module, keep_N: Tensor, surgery: Surgery) -> None:
    """Let the hooks that came with a file know that only these entries are left."""
    for _, hook in saved_hooks(module):
        if (known_N := hook.known()) is not None and known_N.numel() == keep_N.numel():
            hook.narrow(keep_N.reshape(-1), surgery)


def _with_saved(module: nn.Module, keep_N: Tensor) -> Tensor:
    """Masks, and those that came with a file."""
    for _, hook in saved_hooks(module):
        if (known_N := hook.known()) is not None and known_N.numel() == keep_N.numel():
            keep_N = keep_N & known_N.reshape(keep_N.shape)
    return keep_N


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

    def module_of(self, name: str) -> nn.Module:
        """The module behind a name that gets the hook."""
        return self.model.get_submodule(name)

    def with_saved(self, name: str, keep_N: Tensor) -> Tensor:
        """Masks, and those that came with a file."""
        return _with_saved(self.module_of(name), keep_N)

    def mask(self, keep_G: Tensor, device: torch.device) -> None:
        """Take new masks (on the CPU); all modules get a hook once one needs it."""
        keep_of = {name: self.with_saved(name, keep_N) for name, keep_N in self.kept(keep_G).items()}
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
