"""Groupers of attention heads.

Shape suffixes: ``_W`` any weight, ``_O`` rows, ``_I`` columns.

The weights of one attention may be one packed matrix (query, key and value one below the other) or several, and with
grouped queries there are fewer key and value heads than query heads. A head of a packed matrix is its rows in all the
packs. :func:`head_grouping` couples several matrices, for :class:`CoupledGrouper`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member
from pruningawaretraining.proximal.groupers import Grouper, GroupView, Labels, along, at_least_dims, others, split_dim
from pruningawaretraining.registry import register


@dataclass(frozen=True)
class _HeadGrouper(Grouper):
    """Blocks of one dimension, one for each head.

    Args:
        num_heads: heads of the weight (key and value weights have fewer where queries are grouped).
        npack: how many projections are packed one after the other along that dimension; 0 finds out: 3 where the
            dimension is three times the other one, as in a packed qkv, else 1.

    Raises:
        ConfigError: a number that is not allowed.
    """

    num_heads: int
    npack: int = 0

    def __post_init__(self) -> None:
        for key, least in (("num_heads", 1), ("npack", 0)):
            value = getattr(self, key)
            if value < least:
                raise ConfigError(f"{key}: {value} is not allowed. Allowed: a whole number of {least} or more")

    @property
    def dim(self) -> int:
        raise NotImplementedError

    def packs(self, shape: Sequence[int]) -> int:
        """How many projections a weight packs."""
        other = shape[1 - self.dim] if len(shape) > 1 else 0
        return self.npack or (3 if other and shape[self.dim] == 3 * other else 1)

    def check(self, shape: Sequence[int], where: str) -> None:
        at_least_dims(shape, self.dim + 1, where, self)
        parts = self.packs(shape) * self.num_heads
        if shape[self.dim] % parts:
            raise ConfigError(
                f"{where}: num_heads={self.num_heads} (in {self.packs(shape)} packs) does not divide dimension "
                f"{self.dim} of shape {tuple(shape)}"
            )

    def group_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (self.num_heads,)

    def group_size(self, shape: Sequence[int]) -> int:
        return math.prod(shape) // self.num_heads

    def blocks(self, weight_W: Tensor) -> list[GroupView]:
        packs = self.packs(weight_W.shape)
        size = weight_W.shape[self.dim] // (packs * self.num_heads)
        view = split_dim(weight_W, self.dim, (packs, self.num_heads, size))
        return [GroupView(view, others(view.dim(), self.dim + 1))]

    def labels(self, shape: Sequence[int]) -> Labels:
        per_pack = shape[self.dim] // self.packs(shape)
        heads = torch.arange(shape[self.dim]) % per_pack // (per_pack // self.num_heads)
        return along(shape, self.dim, heads, self.num_heads)


@register("grouper", "AttentionHeadGrouperDim0", "attentionheadgrouperdim0")
@dataclass(frozen=True)
class AttentionHeadGrouperDim0(_HeadGrouper):
    """The rows of a head: query, key and value weights, packed or not."""

    @property
    def dim(self) -> int:
        return 0


@register("grouper", "AttentionHeadGrouperDim1", "attentionheadgrouperdim1")
@dataclass(frozen=True)
class AttentionHeadGrouperDim1(_HeadGrouper):
    """The columns of a head: the output projection."""

    @property
    def dim(self) -> int:
        return 1


def head_grouping(
    rows: Mapping[str, Tensor],
    columns: Mapping[str, Tensor],
    num_heads: int,
    num_kv_heads: int | None = None,
    packed: Sequence[str] = (),
) -> Grouping:
    """One group for each head of an attention, over all its weights: query, key, value and output go together.

    Args:
        rows: name -> weight or bias whose rows (dimension 0) belong to heads: query, key, value, or a packed qkv.
        columns: name -> weight whose columns (dimension 1) belong to query heads: the output projection.
        num_heads: query heads.
        num_kv_heads: key and value heads, where they are fewer; there are then that many groups, and a group holds
            all the query heads that share its key and value.
        packed: names among ``rows`` that hold query, key and value one after the other.

    Raises:
        ModelError: the sizes do not fit the heads.
    """
    groups = num_kv_heads or num_heads
    if num_heads % groups:
        raise ModelError(f"num_kv_heads: {groups} does not divide num_heads={num_heads}")
    widths = [weight_W.shape[1] for weight_W in columns.values()]
    if not widths or len(set(widths)) > 1 or widths[0] % num_heads:
        raise ModelError(f"columns: need output projections of one width that {num_heads} heads divide, got {widths}")
    head = widths[0] // num_heads
    query, shared = num_heads // groups * head, head
    members = []
    for name, weight_W in rows.items():
        kinds = (query, shared, shared) if name in packed else (query,)
        if name not in packed and weight_W.shape[0] == groups * shared:
            kinds = (shared,)
        labels_O = torch.cat([torch.arange(groups * size) // size for size in kinds])
        if len(labels_O) != weight_W.shape[0]:
            raise ModelError(
                f"{name}: {weight_W.shape[0]} rows do not fit {num_heads} heads of {head} "
                f"({groups} for keys and values)"
            )
        members.append(Member.along(name, weight_W, 0, labels_O, groups, "bias" if weight_W.dim() == 1 else "out"))
    for name, weight_W in columns.items():
        members.append(Member.along(name, weight_W, 1, torch.arange(groups * query) // query, groups, "out"))
    return Grouping("head", tuple(members), (GroupSet(next(iter(rows)), 0, groups),))
