"""Sharded weights (DTensor, as FSDP2 makes them): what of a grouping lies on this rank.

Shape suffixes: ``_W`` any weight, ``_R`` rows of a stage.

Labels are separable, so a shard's labels are a slice of one vector for each dimension. Norms of groups that span
shards are summed by one all-reduce of the rows; everything after that is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import extent as _extent
from pruningawaretraining.distributed.fsdp import is_sharded
from pruningawaretraining.errors import ModelError

__all__ = ["Shards", "all_reduce_", "check_whole_groups", "is_sharded", "local", "local_labels", "of_full"]

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def local(weight_W: Tensor) -> Tensor:
    """This rank's part of a weight: itself if it is no DTensor."""
    return cast("DTensor", weight_W).to_local() if is_sharded(weight_W) else weight_W


def of_full(weight_W: Tensor) -> Tensor:
    """The whole weight, gathered from its shards (a collective for a DTensor)."""
    return cast("DTensor", weight_W).full_tensor() if is_sharded(weight_W) else weight_W


@dataclass(frozen=True)
class Shards:
    """How weights are spread: over which dimensions of which mesh.

    Args:
        mesh: the device mesh.
        mesh_dims: the dimensions of the mesh along which weights are sharded (not replicated).
    """

    mesh: Any
    mesh_dims: tuple[int, ...]

    @classmethod
    def of(cls, weight_W: Tensor) -> Shards | None:
        """None for a weight that is whole on this rank."""
        if not is_sharded(weight_W):
            return None
        weight_W = cast("DTensor", weight_W)
        dims = tuple(index for index, placement in enumerate(weight_W.placements) if placement.is_shard())
        if any(placement.is_partial() for placement in weight_W.placements):
            raise ModelError(f"params: placements {weight_W.placements} are not allowed. Allowed: Shard, Replicate")
        return cls(weight_W.device_mesh, dims)

    def dims(self, weight_W: Any) -> tuple[int, ...]:
        """The dimensions of a weight that are sharded."""
        return tuple(sorted({weight_W.placements[index].dim % weight_W.dim() for index in self.mesh_dims}))

    @staticmethod
    def slice(weight_W: Any, full_W: Tensor) -> Tensor:
        """This rank's part of a whole tensor shaped like a weight."""
        shape, offset = _extent(weight_W)
        for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
            full_W = full_W.narrow(dim, min(start, full_W.shape[dim]), size)
        return full_W


def local_labels(
    weight_W: Tensor, labels: Sequence[Tensor | None], sizes: Sequence[int]
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """The labels of this rank's part of a weight, on its device."""
    device = local(weight_W).device
    if not is_sharded(weight_W):
        return tuple(None if label is None else label.to(device) for label in labels), tuple(sizes)
    shape, offset = _extent(weight_W)
    found: list[Tensor | None] = []
    for label, size, start in zip(labels, shape, offset, strict=True):
        found.append(None if label is None else label[start : start + size].to(device))
    return tuple(found), tuple(sizes)


def check_whole_groups(weight_W: Any, labels: Sequence[Tensor | None], sizes: Sequence[int], name: str) -> None:
    """Refuse a weight whose groups are cut by its shards, for maps that rank the elements of a group.

    Raises:
        ModelError: a group spans two shards.
    """
    shards = Shards.of(weight_W)
    assert shards is not None
    shape, offset = _extent(weight_W)
    for dim in shards.dims(weight_W):
        label, start, stop = labels[dim], offset[dim], offset[dim] + shape[dim]
        inside = [edge for edge in (start, stop) if 0 < edge < weight_W.shape[dim]]
        if inside and (label is None or any(bool(label[edge - 1] == label[edge]) for edge in inside)):
            raise ModelError(
                f"{name}: its shards cut groups along dimension {dim}, and NMSparseConstraint needs whole ones. "
                f"Shard another dimension, or choose shards that are a multiple of the group"
            )


def all_reduce_(rows_R: Tensor, shards: Shards) -> None:
    """Sum over the ranks that share the weights' shards, in place."""
    for dim in shards.mesh_dims:
        torch.distributed.all_reduce(rows_R, group=shards.mesh.get_group(dim))
