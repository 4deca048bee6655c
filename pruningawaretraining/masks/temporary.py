"""Masks that hold for a while, on a model that nothing else masks.

Shape suffixes: ``_G`` groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pruningawaretraining.groups.grouping import Member
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.patterns.channel_groups import ChannelGroups


@contextmanager
def temporarily_masked(model: nn.Module, found: ChannelGroups, keep_G: Tensor) -> Iterator[None]:
    """Mask the groups that go inside the block; the weights are as before after it."""
    saved = {
        id(member.parameter): (member.parameter, member.parameter.detach().clone()) for member in _losing(found, keep_G)
    }
    masks = Masks.coupled(model, found)
    masks.set(keep_G)
    try:
        yield
    finally:
        masks.clear()
        with torch.no_grad():
            for tensor, values in saved.values():
                tensor.copy_(values)


def _losing(found: ChannelGroups, keep_G: Tensor) -> Iterator[Member]:
    """The tensors that masks would change."""
    keep_G1 = torch.cat([keep_G, torch.ones(1, dtype=torch.bool)])
    for member in found.grouping.without_role("buffer").members:
        if member.slots is not None and not bool(keep_G1[member.slots.cpu()].all()):
            yield member
