"""Checkpoints of a training under ``fully_shard``: every process writes its part, and any number of them goes on.

Model and optimizer are written by ``torch.distributed.checkpoint``, the pruner's state beside them by the first
process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruningawaretraining.distributed.collectives import barrier, rank
from pruningawaretraining.distributed.fsdp import reshard
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.files import read_torch_mapping, write_atomically
from pruningawaretraining.session.pruning import Pruning

PRUNER = "pruner.pt"


def save_sharded(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruning) -> None:
    """Write a checkpoint; every process calls it.

    Args:
        folder: a new folder that all processes see.
        model, optimizer, pruner: of the training.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    reshard(model)
    with pruner.paused():
        save(_states(model, optimizer), checkpoint_id=str(folder))
    state = pruner.state_dict()
    if rank() == 0:
        write_atomically(Path(folder) / PRUNER, lambda path: torch.save(state, path))
    barrier()


def read_pruner_state(folder: str | Path) -> dict[str, Any]:
    """The pruner's state in a checkpoint, to be loaded before ``fully_shard``: it brings masks to a fresh pruner.

    Raises:
        CheckpointError: the folder has no state of a pruner.
    """
    path = Path(folder) / PRUNER
    if not path.is_file():
        raise CheckpointError(f"folder: {str(folder)!r} holds no {PRUNER}. Allowed: a folder of save_sharded")
    return read_torch_mapping(path, "folder")


def load_sharded(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruning) -> None:
    """Load weights and optimizer into a model that is sharded already, over any number of processes.

    Args:
        folder: of :func:`save_sharded`.
        model, optimizer, pruner: freshly made; the pruner has its state already.
    """
    from torch.distributed.checkpoint.state_dict import set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    with pruner.paused():
        states = _states(model, optimizer)
        load(states, checkpoint_id=str(folder))
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    own, others = get_state_dict(model, optimizer)
    return {"model": own, "optimizer": others}
