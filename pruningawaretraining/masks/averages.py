"""Moving averages and other copies of a model: found in their wrappers, and masked as the model is.

Shape suffixes: ``_G`` groups, ``_W`` any weight.

Masks need not be applied to an average after every step: once its masked weights are 0, averaging zeros into them keeps
them so. They are applied at every event, and whenever the model's weights are looked at.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pruningawaretraining.distributed.fsdp import is_sharded, local_of
from pruningawaretraining.errors import ModelError
from pruningawaretraining.groups.attachment import MaskHooks
from pruningawaretraining.patterns.channel_groups import ChannelGroups

HOLDERS = ("module", "ema", "ema_model", "averaged_model", "_average_model")
"""Attributes under which wrappers hold the averaged copy: AveragedModel and timm's, and others' names for it; the last
is that of Lightning's WeightAveraging."""
NEAR = 0.3
"""Least cosine between a weight and its average."""


def held_by(holder: Any) -> list[nn.Module]:
    """The holder, if it is a module, and the modules that it has under the names of averaged copies."""
    found = (holder, *(getattr(holder, name, None) for name in HOLDERS))
    return [one for one in found if isinstance(one, nn.Module)]


def is_alike(module: nn.Module, model: nn.Module) -> bool:
    """Whether a module has every parameter of a model, under its name and in its shape."""
    found = {name: one.shape for name, one in module.named_parameters()}
    return all(found.get(name) == one.shape for name, one in model.named_parameters())


def copies_inside(module: nn.Module, model: nn.Module) -> dict[str, nn.Module]:
    """Name -> the parts of a module that are copies of a model, without those that are inside another of them.

    Args:
        module: an average of a module that the model is a part of.
        model: the model; parts of its own class are looked at.
    """
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if name and type(part) is type(model) and not inside and is_alike(part, model):
            found[name] = part
    return found


@torch.no_grad()
def is_near(module: nn.Module, model: nn.Module) -> bool:
    """Whether the largest weight of a module points the way that the model's does: another model's does not."""
    name, weight_W = max(model.named_parameters(), key=lambda pair: pair[1].numel())
    other_W = module.get_parameter(name)
    if weight_W.is_meta or other_W.is_meta or is_sharded(weight_W) or is_sharded(other_W):
        return True
    one, other = weight_W.detach().flatten().double().cpu(), other_W.detach().flatten().double().cpu()
    return bool(torch.dot(one, other) >= NEAR * one.norm() * other.norm())


def copy_in(follower: nn.Module, touched: Collection[str]) -> nn.Module:
    """Return the module inside a follower that has the model's tensors under the model's names.

    Args:
        follower: a copy of the model, or a wrapper of one.
        touched: names that it must have.

    Raises:
        ModelError: it holds no such copy.
    """
    for candidate in held_by(follower):
        names = {name for name, _ in candidate.named_parameters()} | {name for name, _ in candidate.named_buffers()}
        if names.issuperset(touched):
            return candidate
    one = next(iter(touched))
    raise ModelError(f"ema: {type(follower).__name__} holds no copy of the model; {one} is missing in it")


class HasFactors(Protocol):
    """A writer of masks, as far as an average has to know it."""

    def factors(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Parameters with masked entries, each with a factor: 0 where masked."""


class Averages:
    """The averages of a masked model: the same weights are 0 in each, and its modules know what is masked.

    Args:
        followers: the averages; the list may grow.
        names: id of each masked parameter -> its name.
        writer: holds the masked entries of the model.
        found: the groups, if modules have to know of them.
    """

    def __init__(
        self,
        followers: Sequence[nn.Module],
        names: dict[int, str],
        writer: HasFactors,
        found: ChannelGroups | None = None,
    ) -> None:
        self._followers, self._names, self._writer, self._found = followers, names, writer, found
        self._hooks: weakref.WeakKeyDictionary[nn.Module, list[MaskHooks]] = weakref.WeakKeyDictionary()

    def mask(self, keep_G: Tensor) -> None:
        """Take new masks (on the CPU)."""
        if self._found is not None:
            for follower in self._followers:
                if follower not in self._hooks:
                    inner = copy_in(follower, set(self._names.values()))
                    self._hooks[follower] = self._found.hooks(inner)
                device = next((one.device for one in follower.parameters()), torch.device("cpu"))
                for one in self._hooks[follower]:
                    one.mask(keep_G, device)
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set masked weights of every average to 0."""
        if not self._followers:
            return
        masked = [(self._names[id(parameter)], keep_W) for parameter, keep_W in self._writer.factors()]
        names = [name for name, _ in masked]
        for inner in (copy_in(follower, names) for follower in self._followers if names):
            for name, keep_W in masked:
                weight = local_of(inner.get_parameter(name).data)  # not counted as a write: the average makes those
                weight.masked_fill_((keep_W == 0).to(weight.device), 0.0)

    def release(self) -> None:
        """Take every hook out; zeros stay."""
        for hooks in self._hooks.values():
            for one in hooks:
                one.release()
        self._hooks.clear()
