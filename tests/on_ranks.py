"""Functions on several processes of one group, as under torchrun.

The processes are forked from a server that has imported what they need, once for a whole session of tests: importing it
anew in each takes longer than most of what they prove. ``test_run_ranks.py`` and ``test_integrations.py`` use torchrun.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LONGEST = 300
"""Seconds after which processes that wait for each other are given up."""
IMPORTED = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torchvision",
    "pruningawaretraining.session.one_shot",
    "pruningawaretraining.session.pruning",
    "pruningawaretraining.patterns.labels.trace",
    "pruningawaretraining.proximal",
    "pruningawaretraining.criteria.second_order.criteria",
)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(IMPORTED))


def on_ranks(count: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function of a module returns on every process, by rank.

    Args:
        count: processes, which form one gloo group.
        folder: of the test; every call makes one in it.
        function: called with the arguments on each.
        arguments: of the function.

    Raises:
        Exception: what it raised on some process.
    """
    mine = folder / f"ranks{len(list(folder.glob('ranks*')))}"
    mine.mkdir()
    with ProcessPoolExecutor(count, _CONTEXT) as pool:
        members = [pool.submit(_member, rank, count, mine, function, arguments) for rank in range(count)]
        for one in members:
            one.result(LONGEST)
    return [torch.load(mine / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _member(rank: int, count: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    place, longest = f"file://{folder / 'store'}", timedelta(seconds=LONGEST)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=count, timeout=longest)
    try:
        torch.save(function(*arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
