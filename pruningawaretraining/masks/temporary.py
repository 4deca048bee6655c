"""Masks that hold for a while, on a model that nothing else masks.

Shape suffixes: ``_G`` groups.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pruningawaretraining.distributed.fsdp import is_sharded
from pruningawaretraining.groups.grouping import Member
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.patterns.channel_groups import ChannelGroups


@contextmanager
def temporarily_masked(model: nn.Module, found: ChannelGroups, keep_G: Tensor) -> Iterator[None]:
    """Mask the groups that go inside the block; the weights are as before after it.

    Args:
        model: the model. Where copies that are thrown away have taken the place of its weights (see
            :func:`pruningawaretraining.models.precision.in_float64`), these are masked, and stay so.
        found: its groups.
        keep_G: True for groups that stay.
    """
    own = {id(member.parameter): member.parameter for member in found.grouping.members}
    here = found if _holds(model, own) else found.on(model)
    losing = {id(one.parameter): one.parameter for one in _losing(here, keep_G)}
    saved = [(one, one.detach().clone()) for number, one in losing.items() if number in own]
    masks = Masks.coupled(model, here)
    masks.set(keep_G)
    try:
        yield
    finally:
        masks.clear()
        with torch.no_grad():
            for tensor, values in saved:
                tensor.copy_(values)


def nudge(model: nn.Module, found: ChannelGroups, keep_G: Tensor, amount: float) -> bool:
    """Scale the groups that stay a little, each by another factor, in weights that masks change.

    Call it within :func:`temporarily_masked`, which puts the weights back.

    Args:
        model, found, keep_G: as there.
        amount: how far factors are from 1, at most.

    Returns:
        Whether any weight could be scaled: not where all groups of every tensor are masked, or where the weights are
        spread over processes.
    """
    here = found if _holds(model, {id(one.parameter) for one in found.grouping.members}) else found.on(model)
    losing = [one for one in _losing(here, keep_G) if not is_sharded(one.parameter)]
    noise_G = torch.rand(len(keep_G), generator=torch.Generator().manual_seed(2)) * amount
    keep_G1, factors_G1 = (torch.cat([one, one.new_ones(1)]) for one in (keep_G.cpu(), 1 + noise_G.double()))
    scaled = False
    with torch.no_grad():
        for member in losing:
            assert member.slots is not None
            scaled |= bool(keep_G1[member.slots.cpu()].any())
            factors = member.spread(factors_G1[member.slots.cpu()], outside=1.0)
            member.parameter.mul_(factors.to(member.parameter.device, member.parameter.dtype))
    return scaled


def _holds(model: nn.Module, tensors: Collection[int]) -> bool:
    """Whether these are ids of tensors of the model as it is now."""
    return set(tensors) <= {id(one) for one in (*model.parameters(), *model.buffers())}


def _losing(found: ChannelGroups, keep_G: Tensor) -> Iterator[Member]:
    """The tensors that masks would change."""
    keep_G1 = torch.cat([keep_G, torch.ones(1, dtype=torch.bool)])
    for member in found.grouping.without_role("buffer").members:
        if member.slots is not None and not bool(keep_G1[member.slots.cpu()].all()):
            yield member
