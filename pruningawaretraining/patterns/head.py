"""Attention heads: a group is one head with its rows of the query, key and value projections and its output columns.

Shape suffixes: ``_H`` heads of a block, ``_D`` entries of one dimension of a tensor.

Where several query heads share a key and a value head (grouped-query attention), a group is a key-value head with all
its query heads, or, on request, one query head of every key-value head. The width of a head, its scale and its rotary
embedding stay as trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pruningawaretraining.config.options import COUPLED, Support
from pruningawaretraining.groups.attachment import Attachment, OwnCost
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member
from pruningawaretraining.models.pruned_attention import Kept, reads_fewer, shrink_heads
from pruningawaretraining.models.surgery import Surgery
from pruningawaretraining.patterns.attention import Attention, attention_blocks, scaled_attributes
from pruningawaretraining.patterns.block_names import chosen_blocks
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.expert import chosen_experts
from pruningawaretraining.patterns.projections import HeadTensor
from pruningawaretraining.patterns.selection import none_chosen, selected
from pruningawaretraining.registry import lookup, register

Unit = Callable[[Attention], tuple[int, Callable[[HeadTensor], Tensor | None]]]
"""Of a block: how many groups, and the group of every entry of a part (None where the part stays)."""


@register("head_unit", "group")
def whole_groups(block: Attention) -> tuple[int, Callable[[HeadTensor], Tensor | None]]:
    """A group is a key-value head and all query heads that use it; without sharing, simply a head."""
    repetitions = block.heads // block.key_value_heads

    def of(part: HeadTensor) -> Tensor:
        heads_D = part.heads_D
        return heads_D if part.shared else torch.where(heads_D < 0, heads_D, heads_D // repetitions)

    return block.key_value_heads, of


@register("head_unit", "query")
def query_heads(block: Attention) -> tuple[int, Callable[[HeadTensor], Tensor | None]]:
    """A group is one query head of every key-value head; key and value heads stay."""
    repetitions = block.heads // block.key_value_heads
    if repetitions == 1:
        return whole_groups(block)

    def of(part: HeadTensor) -> Tensor | None:
        return None if part.shared else torch.where(part.heads_D < 0, part.heads_D, part.heads_D % repetitions)

    return repetitions, of


@register("pattern", "head", "heads", "mha")
@dataclass(frozen=True)
class Head:
    """Whole attention heads; they can be removed physically.

    Args:
        unit: what goes together where query heads share keys and values: "group" (a key-value head with its query
            heads) or "query" (one query head of each).
        experts: whole experts too, in the same ranking and towards the same target.
        depth: whole residual blocks too; one that goes takes the heads and experts in it along.
    """

    support: ClassVar[Support] = COUPLED

    unit: str = "group"
    experts: bool = False
    depth: bool = False

    def __post_init__(self) -> None:
        lookup("head_unit", self.unit, "unit")

    def chosen(
        self, model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str] = (), key: str = ""
    ) -> set[str]:
        """The attention blocks that a rule selects: by their names, those of containers or of their projections.

        Raises:
            ConfigError: no attention block is selected.
        """
        chosen = chosen_heads(model, layers, exclude, key)
        if not chosen:
            blocks = [one.name for one in attention_blocks(model)[0]]
            raise none_chosen(model, layers, exclude, key, "attention block", blocks)
        chosen |= chosen_experts(model, layers, exclude, key) if self.experts else set()
        return chosen | chosen_blocks(model, layers, exclude, key) if self.depth else chosen

    def head_units(self, model: nn.Module, chosen: set[str]) -> dict[str, str]:
        """Block -> unit."""
        return dict.fromkeys(chosen & attention_names(model), self.unit)


def attention_names(model: nn.Module) -> set[str]:
    """Names of the attention blocks of a model, those included whose heads cannot be pruned."""
    blocks, unread = attention_blocks(model)
    return {one.name for one in blocks} | set(unread)


def chosen_heads(
    model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str] = (), key: str = ""
) -> set[str]:
    """The attention blocks that may lose heads.

    Raises:
        ConfigError: a name that is not a module of the model.
    """
    blocks, unread = attention_blocks(model)
    names = {layer for block in blocks for layer in block.layers} | set(unread)
    wanted, spared = selected(model, layers, exclude, names, key)
    chosen = {one.name for one in blocks if wanted & set(one.layers) and not spared & set(one.layers)}
    return chosen | {name for name in unread if name in wanted - spared}


@dataclass(frozen=True, eq=False)
class Heads(Attachment):
    """Attention blocks, with the group of every head, or run of heads that go together.

    Args:
        attributes: block -> attributes of its module that shrink in proportion to them.
    """

    attributes: Mapping[str, tuple[str, ...]]

    def remove(self, model: nn.Module, keep_G: Tensor, surgery: Surgery) -> tuple[nn.Parameter, ...]:
        """Adapt blocks that lose heads, or read fewer channels than their heads together have."""
        modules = dict(model.named_modules())
        left = {
            name: Kept(int(keep_H.sum()), len(keep_H), self.attributes[name])
            for name, keep_H in self.kept(keep_G).items()
            if not bool(keep_H.all()) or reads_fewer(modules[name])
        }
        shrink_heads(model, left, surgery)
        return ()

    def costs(self) -> list[OwnCost]:
        """The computation of a block beside the layers in it, in proportion to its heads."""
        return [OwnCost(name, groups_H) for name, groups_H in self.groups.items()]


def find_heads(model: nn.Module, units: Mapping[str, str]) -> ChannelGroups:
    """Group the heads of attention blocks.

    Args:
        model: the model.
        units: block -> unit.

    Returns:
        One set for each block (or run of blocks that share a position bias).
    """
    blocks, unread = attention_blocks(model)
    skipped = {name: reason for name, reason in unread.items() if name in units}
    runs: dict[str, list[Attention]] = {}
    for block in blocks:
        if block.name in units:
            runs.setdefault(block.tie or block.name, []).append(block)
    runs, partial = _whole_runs(runs, blocks)
    skipped.update(partial)
    sizes = [_unit(run[0], units)[0] for run in runs.values()]
    total = sum(sizes)
    sets: list[GroupSet] = []
    members: list[Member] = []
    groups: dict[str, Tensor] = {}
    attributes: dict[str, tuple[str, ...]] = {}
    start = 0
    for run, size in zip(runs.values(), sizes, strict=True):
        for block in run:
            members += _members(block, units, start, total)
            groups[block.name] = torch.arange(start, start + size)
            attributes[block.name] = scaled_attributes(block, size != block.key_value_heads)
        layers = tuple(layer for block in run for layer in block.layers)
        width = run[0].head_dim * (run[0].heads // size)
        signature = f"heads:{type(run[0].module).__name__}:{width}"
        sets.append(GroupSet(run[0].name, start, start + size, width, signature, layers))
        start += size
    return ChannelGroups(Grouping("head", tuple(members), tuple(sets)), skipped, (Heads(groups, attributes),))


def _unit(block: Attention, units: Mapping[str, str]) -> tuple[int, Callable[[HeadTensor], Tensor | None]]:
    unit: Unit = lookup("head_unit", units[block.name])
    return unit(block)


def _whole_runs(
    runs: dict[str, list[Attention]], blocks: list[Attention]
) -> tuple[dict[str, list[Attention]], dict[str, str]]:
    """Runs of tied blocks of which all are selected; the others are left out."""
    skipped: dict[str, str] = {}
    whole = {}
    for tie, run in runs.items():
        missing = [one.name for one in blocks if one.tie == tie and one not in run]
        if missing:
            skipped.update({one.name: f"coupled to {missing[0]}, which is not selected" for one in run})
        else:
            whole[tie] = run
    return whole, skipped


def _members(block: Attention, units: Mapping[str, str], start: int, total: int) -> list[Member]:
    """The block's tensors; a fused projection is one member, though parts of it may hold fewer heads than others."""
    _, of = _unit(block, units)
    labelled: dict[tuple[str, int], tuple[HeadTensor, Tensor]] = {}
    for part in block.parts:
        group_D = of(part)
        if group_D is not None:
            slots_D = torch.where(group_D < 0, total, group_D + start)
            _, known_D = labelled.get((part.name, part.dim), (part, slots_D))
            labelled[part.name, part.dim] = part, torch.minimum(known_D, slots_D)
    return [
        Member.along(part.name, part.tensor, part.dim, slots_D, total, part.role) for part, slots_D in labelled.values()
    ]


def is_of_heads(one: GroupSet) -> bool:
    """Whether a set's groups are attention heads."""
    return one.signature.startswith("heads:")
