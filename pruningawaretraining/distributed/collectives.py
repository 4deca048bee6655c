"""The processes that train one model together: what they share, and the wrapper that a removal outdates.

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
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining.errors import ModelError


def world() -> int:
    """How many processes there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@dataclass(frozen=True)
class Share:
    """A process's part of every batch: each so-many-th example.

    Args:
        rank: number of the process.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def own(cls) -> Share:
        """That of this process."""
        return cls(rank(), world())

    def of(self, examples: Any) -> Any:
        """The share of a tensor's or list's first dimension."""
        return examples[self.rank :: self.world] if self.world > 1 else examples


WHOLE = Share()
"""All of every batch."""


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


def meet() -> None:
    """Wait for every process."""
    if world() > 1:
        dist.barrier()


def same_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers, such as running statistics."""
    if world() > 1:
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
    if world() == 1 or not tensors:
        return list(tensors)
    dtype = torch.float64 if any(one.dtype is torch.float64 for one in tensors) else torch.float32
    flat = torch.cat([one.detach().to(backend_device(), dtype).reshape(-1) for one in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat, [one.numel() for one in tensors])
    return [part.view(one.shape).to(one.device, one.dtype) for part, one in zip(parts, tensors, strict=True)]


def agreed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The first process's tensors of truth values, on every process, by one broadcast.

    Args:
        tensors: of the same shapes on every process; they are unchanged.
    """
    if world() == 1:
        return tensors
    flat = torch.cat([one.detach().to(backend_device(), torch.uint8).reshape(-1) for one in tensors])
    dist.broadcast(flat, 0)
    parts = torch.split(flat, [one.numel() for one in tensors])
    return tuple(part.view(one.shape).to(one.device, one.dtype) for part, one in zip(parts, tensors, strict=True))


def gathered_rows(rows: Tensor) -> Tensor:
    """The rows of all processes one below the other; each may have its own number of them."""
    if world() == 1:
        return rows
    mine = rows.detach().to(backend_device())
    counts = [torch.zeros(1, dtype=torch.int64, device=mine.device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([len(mine)], device=mine.device))
    most = max(int(count) for count in counts)
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])]).contiguous()
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded)
    return torch.cat([part[: int(count)] for part, count in zip(found, counts, strict=True)]).to(rows.device)


def average_gradients(model: nn.Module) -> None:
    """Average ``.grad`` over processes where no wrapper does so, by one flat all-reduce; a missing one counts as 0."""
    if world() == 1:
        return
    parameters = [one for one in model.parameters() if one.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [one.grad for one in parameters if one.grad is not None]
        for gradient, total in zip(gradients, totals(gradients), strict=True):
            gradient.copy_(total / world())


def backend_device() -> torch.device:
    """Where tensors have to be for the backend."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


KEPT_OPTIONS: dict[str, Any] = {
    "device_ids": None,
    "output_device": None,
    "dim": 0,
    "broadcast_buffers": True,
    "find_unused_parameters": False,
    "gradient_as_bucket_view": False,
    "static_graph": False,
    "mixed_precision": None,
    "skip_all_reduce_unused_params": False,
}
"""Options of DistributedDataParallel that it keeps under their names, with their defaults."""


def rewrapped(wrapped: nn.Module) -> nn.Module:
    """A new DistributedDataParallel around the same module, with the options and communication hooks of the old one.

    DistributedDataParallel holds on to the parameters that it was made with, so it has to be made anew once channels
    have been removed. A torch.compile wrapper around it is made anew too; any other module is returned as it is.

    Args:
        wrapped: the wrapper, on every process.

    Raises:
        ModelError: its gradients are delayed or taken to an optimizer of its own, which cannot be carried over.
    """
    if isinstance(wrapped, torch._dynamo.OptimizedModule if hasattr(torch, "_dynamo") else ()):
        inner = rewrapped(wrapped._orig_mod)
        return wrapped if inner is wrapped._orig_mod else type(wrapped)(inner, wrapped.dynamo_ctx)
    if not isinstance(wrapped, DistributedDataParallel):
        return wrapped
    if getattr(wrapped, "_delay_all_reduce_params", None):
        raise ModelError("model: its gradients are delayed (delay_all_reduce_named_params). Allowed: wrap it by hand")
    new = DistributedDataParallel(wrapped.module, **_options_of(wrapped))
    for hook, state in getattr(wrapped, "_comm_hooks", ()):
        new.register_comm_hook(state, hook)
    new.training = wrapped.training
    new.require_backward_grad_sync = wrapped.require_backward_grad_sync
    return new


def rewrap_in_place(wrapped: nn.Module) -> None:
    """Make an outdated DistributedDataParallel anew where it is, for trainers that hold on to the wrapper itself.

    Args:
        wrapped: the wrapper, on every process; anything else, and one that is up to date, stays as it is.

    Raises:
        ModelError: its gradients are delayed.
    """
    inner = wrapped._orig_mod if hasattr(wrapped, "_orig_mod") else wrapped
    if not isinstance(inner, DistributedDataParallel) or not outdated(inner):
        return
    if getattr(inner, "_delay_all_reduce_params", None):
        raise ModelError("model: its gradients are delayed (delay_all_reduce_named_params). Allowed: wrap it by hand")
    options, hooks = _options_of(inner), list(getattr(inner, "_comm_hooks", ()))
    training, synchronises, module = inner.training, inner.require_backward_grad_sync, inner.module
    DistributedDataParallel.__init__(inner, module, **options)
    for hook, state in hooks:
        inner.register_comm_hook(state, hook)
    inner.training, inner.require_backward_grad_sync = training, synchronises


def _options_of(wrapped: DistributedDataParallel) -> dict[str, Any]:
    """The options that a wrapper was made with, as far as this version of PyTorch has them."""
    found = {name: getattr(wrapped, name, default) for name, default in KEPT_OPTIONS.items()}
    options = {name: value for name, value in found.items() if value != KEPT_OPTIONS[name]}
    if getattr(wrapped, "device_mesh", None) is not None:
        options["device_mesh"] = wrapped.device_mesh
    else:
        options["process_group"] = wrapped.process_group
    bytes_cap = getattr(wrapped, "bucket_bytes_cap", None)
    if bytes_cap is not None and not getattr(wrapped, "bucket_bytes_cap_default", False):
        options["bucket_cap_mb"] = bytes_cap / (1024 * 1024)
    return options


def outdated(wrapped: nn.Module) -> bool:
    """Whether a DistributedDataParallel no longer averages the gradients of the parameters that its module has."""
    if hasattr(torch, "_dynamo") and isinstance(wrapped, torch._dynamo.OptimizedModule):
        return outdated(wrapped._orig_mod)
    if not isinstance(wrapped, DistributedDataParallel):
        return False
    known = {id(one) for one in getattr(wrapped, "_module_parameters", ())}
    ignored = set(getattr(wrapped, "parameters_to_ignore", ()))
    now = [one for name, one in wrapped.module.named_parameters() if one.requires_grad and name not in ignored]
    there = {id(one) for one in wrapped.module.parameters()}
    return any(id(one) not in known for one in now) or not known <= there
