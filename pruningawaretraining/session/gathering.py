"""From a model under ``fully_shard`` to a whole, pruned one."""

from __future__ import annotations

import torch
from torch import nn

from pruningawaretraining.checkpoint.records import own_state
from pruningawaretraining.distributed.fsdp import full_of, reshard
from pruningawaretraining.errors import ModelError


@torch.no_grad()
def copy_whole(sharded: nn.Module, whole: nn.Module) -> None:
    """Copy the tensors of a sharded model into a freshly built one; a collective.

    Args:
        sharded: its parameters lie on several processes.
        whole: the same model as it was built, on this process.

    Raises:
        ModelError: the models have other tensors.
    """
    reshard(sharded)
    own, others = own_state(sharded), own_state(whole)
    if own.keys() != others.keys():
        name = sorted(own.keys() ^ others.keys())[0]
        raise ModelError(f"model: {name!r} is in one model only. Allowed: the dense model as it was built")
    for name, value in own.items():
        others[name].copy_(full_of(value))
