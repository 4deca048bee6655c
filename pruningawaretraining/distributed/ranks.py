"""The processes that share the blocks; one alone needs none of this."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pruningawaretraining.distributed.collectives import backend_device, rank, world_size


@dataclass(frozen=True)
class Ranks:
    """This process and how many there are.

    Args:
        rank: number of this process.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of the default process group, or one alone."""
        return cls(rank(), world_size())

    def broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        """The owner's tensor, on every rank."""
        if self.world > 1:
            there = tensor.to(backend_device(), copy=True).contiguous()
            dist.broadcast(there, owner)
            return there.to(tensor.device)
        return tensor

    def gather(self, tensor: Tensor, owner: int) -> Tensor | None:
        """Every rank's tensor side by side along dimension 1, on the owner; None elsewhere."""
        if self.world == 1:
            return tensor
        there = tensor.to(backend_device()).contiguous()
        found = [torch.empty_like(there) for _ in range(self.world)] if self.rank == owner else None
        dist.gather(there, found, owner)
        return None if found is None else torch.cat(found, 1)

    def total(self, number: int) -> int:
        """The sum over ranks."""
        return number if self.world == 1 else int(self.sum(torch.tensor(number)))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        if self.world == 1:
            return tensor
        there = tensor.to(backend_device(), copy=True).contiguous()
        dist.all_reduce(there)
        return there.to(tensor.device)

    def share(self, number: int) -> int:
        """This rank's part of a number of equal tasks, rounded up: the same on every rank."""
        return -(-number // self.world)


ALONE = Ranks()
"""One process."""
