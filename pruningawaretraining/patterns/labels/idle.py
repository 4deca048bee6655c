"""Layers that the example inputs do not reach: find what feeds them, and name those where that is unknown."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from pruningawaretraining.errors import ModelError
from pruningawaretraining.patterns.labels.build import is_layer
from pruningawaretraining.patterns.labels.follower import Follower

logger = logging.getLogger(__name__)
SIZES = (2.0, 4.0, 0.5)
"""Other heights and widths of images that are tried, as factors."""


def follow_idle(model: nn.Module, inputs: Any, follower: Follower, follow: Callable[[Any], None]) -> None:
    """Follow layers that the example inputs did not reach.

    An expert that no token was sent to is taken to do what its siblings do. Branches for other sizes of images are
    looked for at some. What is left keeps its channels, as do layers whose outputs nothing else can read, and both are
    named in a warning.

    Args:
        model: the model.
        inputs: the example inputs.
        follower: has followed the model on them; learns more.
        follow: follows the model on other inputs.
    """
    idle = _idle(model, follower)
    for name in idle:
        _adopt(name, model, follower)
    for factor in SIZES:
        if not _idle(model, follower):
            return
        other = _resized(inputs, factor)
        if other is None:
            break
        try:
            follow(other)
        except ModelError as error:
            logger.debug("not followed at %g of the size: %s", factor, error)
    idle = _idle(model, follower)
    if idle:
        only = [name for name in _layers(model) if is_unread(name, follower)]
        logger.warning(
            "%s: not run on the example inputs. They keep their channels%s; if they read those of other layers at "
            "other inputs, pass example_inputs= that reach them, or exclude the layers before them",
            _shown(idle),
            f", and so do layers that only they can read ({_shown(only)})" if only else "",
        )


def _shown(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _weight(name: str) -> str:
    return f"{name}.weight" if name else "weight"


def is_unread(name: str, follower: Follower) -> bool:
    """Whether a layer ran and nothing that the model returned is made of it."""
    return _weight(name) in follower.read and _weight(name) not in follower.returned


def _idle(model: nn.Module, follower: Follower) -> list[str]:
    """Layers whose weights no operation has read."""
    return [name for name in _layers(model) if _weight(name) not in follower.read]


def _layers(model: nn.Module) -> list[str]:
    return [name for name, one in model.named_modules() if is_layer(one) and "weight" in one._parameters]


def _adopt(name: str, model: nn.Module, follower: Follower) -> None:
    """Let a layer in a list of modules go with the same layer of another module of the list."""
    tensors = follower.tensors
    for sibling in _siblings(name, model):
        own = [key for key in tensors if key.startswith(f"{name}.")]
        pairs = [(key, sibling + key[len(name) :]) for key in own]
        known = all(other in follower.read and tensors[other].shape == tensors[key].shape for key, other in pairs)
        if own and known:
            for key, other in pairs:
                for one, theirs in zip(follower.get(tensors[key]), follower.get(tensors[other]), strict=True):
                    follower.slots.join(one, theirs)
            follower.returned.update(own)
            return


def _siblings(name: str, model: nn.Module) -> Iterator[str]:
    """The same place in the other modules of every list that a module is in."""
    parts = name.split(".")
    for depth in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        if isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
            for other in parent._modules:
                if other != parts[depth]:
                    yield ".".join([*parts[:depth], other, *parts[depth + 1 :]])


def _resized(inputs: Any, factor: float) -> Any:
    """Images of another height and width; None where there are none."""
    found = []

    def resize(one: Any) -> Any:
        if not isinstance(one, Tensor) or one.dim() != 4 or not one.is_floating_point() or min(one.shape[2:]) < 2:
            return one
        found.append(one)
        with torch.no_grad():
            return functional.interpolate(one, scale_factor=factor, mode="nearest")

    other = tree_map(resize, inputs)
    return other if found else None
