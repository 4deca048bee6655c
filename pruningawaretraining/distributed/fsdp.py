"""Weights that FSDP2 (``fully_shard``) has sharded: the local part of a grouping.

Shape suffixes: ``_W`` any weight, ``_G`` groups.

Labels are separable, so a shard's labels are a slice of one vector for each dimension. A group's sum is the sum of what
its parts on each process come to: one all-reduce of one number a group, and no layer is gathered.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ModelError

M = TypeVar("M")
_LOCAL: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def is_sharded(weight_W: Any) -> bool:
    """Whether a tensor is a DTensor."""
    tensors = sys.modules.get("torch.distributed.tensor")  # heavy to import, and without it there is no DTensor
    return tensors is not None and isinstance(weight_W, tensors.DTensor)


def any_sharded(model: nn.Module) -> bool:
    """Whether any parameter of a model is a DTensor."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def local_of(weight_W: Tensor) -> Tensor:
    """This process's part of a tensor, without its history; itself where it is no DTensor."""
    return weight_W.detach().to_local() if is_sharded(weight_W) else weight_W.detach()  # type: ignore[attr-defined, no-any-return]


def full_of(weight_W: Tensor) -> Tensor:
    """The whole tensor, without its history; gathered (a collective) where it is a DTensor."""
    return weight_W.detach().full_tensor() if is_sharded(weight_W) else weight_W.detach()  # type: ignore[attr-defined, no-any-return]


def whole_of(weight_W: Any, part_W: Tensor) -> Tensor:
    """The whole of what each process has the same part of as of a weight: gathered where that is a DTensor."""
    if not is_sharded(weight_W):
        return part_W
    kind, mesh, placements = type(weight_W.data), weight_W.device_mesh, weight_W.placements
    spread = kind.from_local(part_W, mesh, placements, run_check=False, shape=weight_W.shape, stride=weight_W.stride())
    found: Tensor = spread.full_tensor()
    return found


def extent(weight_W: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and offsets of this process's part of a DTensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(weight_W.shape, weight_W.device_mesh, weight_W.placements)
    return tuple(shape), tuple(offset)


def part_of(weight_W: Tensor, values_W: Tensor) -> Tensor:
    """The part of values that lies here, for values that broadcast to a weight; all where it is no DTensor."""
    if not is_sharded(weight_W):
        return values_W
    for dim, (size, start) in enumerate(zip(*extent(weight_W), strict=True)):
        if values_W.shape[dim] > 1:
            values_W = values_W.narrow(dim, min(start, values_W.shape[dim]), size)
    return values_W


def local_member(member: M) -> M:
    """A member of a grouping whose tensor and labels are only those of this process; itself where all are."""
    weight_W = member.parameter  # type: ignore[attr-defined]
    if not is_sharded(weight_W):
        return member
    if member not in _LOCAL:
        shape, offset = extent(weight_W)
        labels = tuple(
            None if label is None else label[start : start + size]
            for label, size, start in zip(member.labels, shape, offset, strict=True)  # type: ignore[attr-defined]
        )
        _LOCAL[member] = dataclasses.replace(member, parameter=torch.empty(shape, device="meta"), labels=labels)  # type: ignore[type-var]
    found: M = _LOCAL[member]
    return found


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
        placements = weight_W.placements  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            raise ModelError(f"params: placements {placements} are not allowed. Allowed: Shard, Replicate")
        dims = tuple(index for index, placement in enumerate(placements) if placement.is_shard())
        return cls(weight_W.device_mesh, dims)  # type: ignore[attr-defined]

    def dims(self, weight_W: Any) -> tuple[int, ...]:
        """The dimensions of a weight that are sharded."""
        return tuple(sorted({weight_W.placements[index].dim % weight_W.dim() for index in self.mesh_dims}))

    def all_reduce_(self, rows_R: Tensor, largest: bool = False) -> None:
        """Sum (or take the maximum) over the ranks that share the weights' shards, in place."""
        operation = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
        for dim in self.mesh_dims:
            torch.distributed.all_reduce(rows_R, operation, group=self.mesh.get_group(dim))


def across(total_G: Tensor, weights: Iterable[Tensor], largest: bool = False) -> Tensor:
    """Reduce partial results over all processes, by one all-reduce for each sharding dimension of the mesh.

    Args:
        total_G: this process's sums (or maxima) over the weights; overwritten.
        weights: DTensors of one mesh; none leaves everything as it is.
        largest: maxima instead of sums.
    """
    first = next((one for one in weights if is_sharded(one)), None)
    shards = None if first is None else Shards.of(first)
    if shards is not None:
        shards.all_reduce_(total_G, largest)
    return total_G


def local_labels(
    weight_W: Tensor, labels: Sequence[Tensor | None], sizes: Sequence[int]
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """The labels of this rank's part of a weight, on its device."""
    device = weight_W.device
    if not is_sharded(weight_W):
        return tuple(None if label is None else label.to(device) for label in labels), tuple(sizes)
    shape, offset = extent(weight_W)
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
    shape, offset = extent(weight_W)
    for dim in shards.dims(weight_W):
        label, start, stop = labels[dim], offset[dim], offset[dim] + shape[dim]
        inside = [edge for edge in (start, stop) if 0 < edge < weight_W.shape[dim]]
        if inside and (label is None or any(bool(label[edge - 1] == label[edge]) for edge in inside)):
            raise ModelError(
                f"{name}: its shards cut groups along dimension {dim}, and NMSparseConstraint needs whole ones. "
                f"Shard another dimension, or choose shards that are a multiple of the group"
            )


def _is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def check_plan(model: nn.Module) -> None:
    """Refuse parameters that something else than ``fully_shard`` has sharded.

    Raises:
        ModelError: a parameter under a tensor-parallel plan; its name and placements.
    """
    managed: set[int] = set()
    for module in model.modules():
        if _is_fsdp(module):
            managed |= {id(parameter) for parameter in module.parameters()}
    meshes = set()
    for name, parameter in model.named_parameters():
        if not is_sharded(parameter):
            continue
        placements = parameter.placements  # type: ignore[attr-defined]
        sharded = sum(placement.is_shard() for placement in placements)
        if id(parameter) not in managed or sharded > 1 or any(one.is_partial() for one in placements):
            names = parameter.device_mesh.mesh_dim_names  # type: ignore[attr-defined]
            raise ModelError(
                f"model: {name} is under a tensor-parallel plan ({placements} on the mesh {names or 'without names'}). "
                "Allowed: fully_shard over one dimension of a mesh, alone or beside replicas"
            )
        meshes.add(parameter.device_mesh)  # type: ignore[attr-defined]
    if len(meshes) > 1:
        raise ModelError("model: its parameters are sharded over several meshes. Allowed: one mesh for all of them")


def reshard(model: nn.Module) -> None:
    """Free whole parameters left by a forward pass, so that changes reach the next one."""
    for module in model.modules():
        if _is_fsdp(module):
            module.reshard()  # type: ignore[operator]
