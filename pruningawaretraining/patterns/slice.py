"""Slices: one kernel position of one input channel in a block of filters, as vector hardware reads them.

Shape suffixes: ``_O`` output channels, ``_I`` input channels, ``_OI`` pairs of them, ``_W`` a whole weight,
``_S`` slots, ``_G`` groups.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from pruningawaretraining.config.options import WEIGHTS, Support
from pruningawaretraining.distributed.fsdp import full_of
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.groups.views import fill_groups, slot_sums, slots_of
from pruningawaretraining.patterns.elements import LAYER_TYPES, Labels, LayerWeight, build_grouping, each, layer_weights
from pruningawaretraining.registry import lookup, register

logger = logging.getLogger(__name__)


@register("slice_order", "interleaved")
def interleaved(filters: Tensor, count: int, width: int) -> Tensor:
    """Block b holds the filters b, b + B, b + 2 B ..."""
    return filters % count


@register("slice_order", "contiguous")
def contiguous(filters: Tensor, count: int, width: int) -> Tensor:
    """Block b holds ``width`` neighbours."""
    return filters // width


@register("pattern", "slice", "slices")
@dataclass(frozen=True)
class Slice:
    """Blocks of ``A`` filters, cut at every input channel and kernel position: slices of A weights.

    A weight [O, I, kh, kw] has B = O // A blocks and B I kh kw slices. The last O mod A filters stay whole.

    Args:
        block_size: A, the filters in a block.
        depthwise_block_size: A of depthwise convolutions.
        order: "interleaved" (b, b + B, b + 2 B ...) or "contiguous" filters make a block.
        first_tap: leave the first position of each kernel row (along the width) alone.
        types: parts of the names of the layers' classes; convolutions where no layers are named.
    """

    support: ClassVar[Support] = replace(WEIGHTS, spares_pruned=True)

    block_size: int = 8
    depthwise_block_size: int = 2
    order: str = "interleaved"
    first_tap: bool = False
    types: tuple[str, ...] = ("Conv",)

    def __post_init__(self) -> None:
        for key in ("block_size", "depthwise_block_size"):
            if getattr(self, key) < 1 or int(getattr(self, key)) != getattr(self, key):
                raise ValueError(f"{key}: {getattr(self, key)!r} must be a whole number of 1 or more")
        lookup("slice_order", self.order, "order")

    def build(self, model: nn.Module, layers: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> Grouping:
        """Label the weights of a model.

        Args:
            model: the model.
            layers: the layers, linear ones too; None for every layer of ``types``.
            exclude: layers to leave out.

        Raises:
            ConfigError: a name that is not a layer of the model.
            ModelError: nothing is selected, or no layer has as many filters as a block.
        """
        types = self.types if layers is None else (*self.types, *LAYER_TYPES)
        return build_grouping("slice", layer_weights(model, layers, exclude, types), self._labels)

    def _labels(self, weight: LayerWeight) -> list[Labels] | str:
        shape = weight.parameter.shape
        width = self.depthwise_block_size if weight.depthwise else self.block_size
        count = shape[weight.out_dim] // width
        if count == 0:
            return f"its {shape[weight.out_dim]} filters are fewer than the {width} of a block"
        if self.first_tap and len(weight.kernel_dims) and shape[-1] == 1:
            return "every position of its kernel is the first of a row, which is protected"
        labels = [each(length) for length in shape]
        labels[weight.out_dim] = self._filters(weight.name, shape[weight.out_dim], count, width)
        if self.first_tap and len(weight.kernel_dims):
            taps = shape[-1]
            labels[-1] = (torch.cat([torch.tensor([taps - 1]), torch.arange(taps - 1)]), taps - 1)
        return labels

    def _filters(self, name: str, filters: int, count: int, width: int) -> Labels:
        order: Callable[[Tensor, int, int], Tensor] = lookup("slice_order", self.order)
        label_O = torch.full((filters,), count, dtype=torch.int64)
        label_O[: count * width] = order(torch.arange(count * width), count, width)
        if filters > count * width:
            rest = filters - count * width
            logger.info("%s: the last %d of %d filters fill no block of %d and stay whole", name, rest, filters, width)
        return label_O, count


def pruned_channels(grouping: Grouping, keep_G: Tensor | None = None) -> Tensor:
    """Groups that lie in channels which are gone already: all their filters, or their input column, are zero.

    Args:
        grouping: groups with consecutive slots over convolution and linear weights.
        keep_G: masks of these groups themselves: what they have zeroed does not make a channel a pruned one.

    Returns:
        Bool vector of groups, on the device of the first weight.
    """
    alive = [_alive_channels(grouping, member, keep_G) for member in grouping.members]
    gone_G = torch.zeros(grouping.size, dtype=torch.bool, device=alive[0].device)
    whole = torch.stack([alive_OI.all().to(gone_G) for alive_OI in alive]).cpu()  # the host waits once
    for member, alive_OI, everything in zip(grouping.members, alive, whole.tolist(), strict=True):
        if not everything:
            slots_of(grouping, member, gone_G).copy_(_slots_without(member, alive_OI))
    return gone_G


def _alive_channels(grouping: Grouping, member: Member, keep_G: Tensor | None) -> Tensor:
    """Pairs of a filter and an input column that both have a weight which is not zero, or which these masks zeroed."""
    alive_W = full_of(member.parameter) != 0
    if keep_G is not None:
        fill_groups(member, alive_W, slots_of(grouping, member, ~keep_G.to(alive_W.device)), 1.0)
    others = list(range(2, alive_W.dim()))
    alive_OI = alive_W.amax(dim=others) if others else alive_W
    return alive_OI.any(dim=1, keepdim=True) & alive_OI.any(dim=0, keepdim=True)


def _slots_without(member: Member, alive_OI: Tensor) -> Tensor:
    """Slots all of whose entries lie in an all-zero filter or an all-zero input column."""
    shape = member.parameter.shape
    spread_W = alive_OI.view(*alive_OI.shape, *[1] * (len(shape) - 2)).expand(shape)
    return slot_sums(member, spread_W.float().contiguous()) == 0
