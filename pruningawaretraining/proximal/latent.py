"""Where the base optimizer finds the latent weights while it steps.

The latent is what the base optimizer trains; the model holds its proximal image. Two ways to bring them together for
the length of one base step:

* :class:`Redirect` puts the latents into the base's param groups, with the weights' gradients and under the weights'
  state. Nothing is copied, and a weight's storage never changes, so views of it (DDP and FSDP buckets, compiled or
  captured graphs, shared memory) stay good. It suits every optimizer that reads ``param_groups`` when it steps.
* :class:`CopyIn` copies the latents into the weights and back. It suits any optimizer at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

OWN_KEYS = ("latent", "mask", "rank")
"""Our entries in the state of a parameter; the base optimizer never sees them."""


@dataclass(frozen=True, eq=False)
class ParamSlot:
    """A weight in the param groups of an optimizer.

    Args:
        params: the group's list.
        index: where in the list.
        weight: the parameter.
        name: for messages.
    """

    params: list[Tensor]
    index: int
    weight: Tensor
    name: str


def latents_of(state: dict[Tensor, Any], places: Sequence[ParamSlot]) -> list[Tensor]:
    """The weights' latents; one that is missing begins as the weight itself, and one of a weight that was moved or cast
    follows it."""
    found = []
    for place in places:
        weight = place.weight
        own = state[weight]
        latent: Tensor | None = own.get("latent")
        if latent is None:
            latent = own["latent"] = weight.detach().clone(memory_format=torch.preserve_format)
        elif latent.device != weight.device or latent.dtype != weight.dtype:
            latent = own["latent"] = latent.to(weight.device, weight.dtype)
        found.append(latent)
    return found


class LatentBinding(Protocol):
    """Brings latents before the base optimizer, and takes them away again."""

    def enter(self) -> None:
        """From here on the base optimizer updates the latents."""

    def leave(self) -> None:
        """From here on the weights and latents are themselves again; the weights' values are not defined."""


def take_own(state: dict[Tensor, Any], weights: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Remove this library's entries from the optimizer's state, and states that become empty."""
    taken = []
    for weight in weights:
        inner = state.pop(weight, None) or {}
        taken.append({key: inner.pop(key) for key in OWN_KEYS if key in inner})
        if inner:
            state[weight] = inner
    return taken


def give_own(state: dict[Tensor, Any], weights: Sequence[Tensor], own: Sequence[dict[str, Any]]) -> None:
    """Put our entries back."""
    for weight, entries in zip(weights, own, strict=True):
        if entries:
            state[weight].update(entries)


class Redirect:
    """Puts latents into the base's param groups; see the module's docstring.

    Args:
        base: the base optimizer.
        places: the weights that have a gradient.
        latents: their latents.
    """

    def __init__(self, base: Optimizer, places: Sequence[ParamSlot], latents: Sequence[Tensor]) -> None:
        self.base, self.places, self.latents = base, places, latents
        self.own: list[dict[str, Any]] = []

    def enter(self) -> None:
        state: dict[Tensor, Any] = self.base.state
        self.own = []
        for place, latent in zip(self.places, self.latents, strict=True):
            inner = state.pop(place.weight, None) or {}
            self.own.append({key: inner.pop(key) for key in OWN_KEYS if key in inner})
            if inner:
                state[latent] = inner
            latent.grad = place.weight.grad
            place.params[place.index] = latent

    def leave(self) -> None:
        state: dict[Tensor, Any] = self.base.state
        for place, latent, own in zip(self.places, self.latents, self.own, strict=True):
            place.params[place.index] = place.weight
            latent.grad = None
            inner = state.pop(latent, None) or {}
            inner.update(own)
            if inner:
                state[place.weight] = inner


class CopyIn:
    """Copies latents into the weights and back; see the module's docstring.

    Args:
        base: the base optimizer.
        places: the weights that have a gradient.
        latents: their latents.
    """

    def __init__(self, base: Optimizer, places: Sequence[ParamSlot], latents: Sequence[Tensor]) -> None:
        self.base, self.latents = base, list(latents)
        self.weights = [place.weight for place in places]
        self.own: list[dict[str, Any]] = []

    def enter(self) -> None:
        self.own = take_own(self.base.state, self.weights)
        copy_all(self.weights, self.latents)

    def leave(self) -> None:
        copy_all(self.latents, self.weights)
        give_own(self.base.state, self.weights, self.own)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """``target <- source`` for many tensors."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def reads_param_groups(base: Optimizer) -> bool:
    """Whether an optimizer is known to read its weights from ``param_groups`` at every step: its step is PyTorch's."""
    return str(getattr(type(base).step, "__module__", "")).startswith("torch.optim.")
