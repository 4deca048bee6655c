"""Collectives of the processes that train one model together.

Everything here is a collective: every process has to come to it, in the same order. One process alone communicates
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@dataclass(frozen=True)
class Ranks:
    """The processes of a group, seen from one of them.

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

    def slice_of(self, examples: Any) -> Any:
        """This process's part of a tensor's or list's first dimension: each so-many-th example."""
        return examples[self.rank :: self.world] if self.world > 1 else examples

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


@contextmanager
def joined() -> Iterator[None]:
    """Inside the block the processes that torchrun has started are a group; without torchrun nothing happens.

    A group that is there already is used, and left alone afterwards.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available() and not dist.is_initialized()
    if not several:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()


def same_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers, such as running statistics."""
    if world_size() > 1:
        with torch.no_grad():
            for buffer in model.buffers():
                there = buffer.detach().to(backend_device(), copy=True).contiguous()
                dist.broadcast(there, 0)
                buffer.copy_(there)


def totals(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums of tensors over all processes, by one flat all-reduce.

    Args:
        tensors: of the same shapes and dtypes on every process; they are unchanged.
    """
    if world_size() == 1 or not tensors:
        return list(tensors)
    dtype = torch.float64 if any(one.dtype is torch.float64 for one in tensors) else torch.float32
    flat = torch.cat([one.detach().to(backend_device(), dtype).reshape(-1) for one in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat, [one.numel() for one in tensors])
    return [part.view(one.shape).to(one.device, one.dtype) for part, one in zip(parts, tensors, strict=True)]


def agreed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The first process's boolean tensors, on every process, by one broadcast.

    Args:
        tensors: of the same shapes on every process; they are unchanged.
    """
    if world_size() == 1:
        return tensors
    flat = torch.cat([one.detach().to(backend_device(), torch.uint8).reshape(-1) for one in tensors])
    dist.broadcast(flat, 0)
    parts = torch.split(flat, [one.numel() for one in tensors])
    return tuple(part.view(one.shape).to(one.device, one.dtype) for part, one in zip(parts, tensors, strict=True))


def gathered_rows(rows: Tensor) -> Tensor:
    """The rows of all processes one below the other; each may have its own number of them."""
    if world_size() == 1:
        return rows
    mine = rows.detach().to(backend_device())
    counts = [torch.zeros(1, dtype=torch.int64, device=mine.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(mine)], device=mine.device))
    most = max(int(count) for count in counts)
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])]).contiguous()
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded)
    return torch.cat([part[: int(count)] for part, count in zip(found, counts, strict=True)]).to(rows.device)


def average_gradients(model: nn.Module) -> None:
    """Average ``.grad`` over processes where no wrapper does so, by one flat all-reduce; a missing one counts as 0."""
    if world_size() == 1:
        return
    parameters = [one for one in model.parameters() if one.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [one.grad for one in parameters if one.grad is not None]
        for gradient, total in zip(gradients, totals(gradients), strict=True):
            gradient.copy_(total / world_size())


def backend_device() -> torch.device:
    """Device on which the backend needs tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
