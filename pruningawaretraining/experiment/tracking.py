"""Weights & Biases and TensorBoard, when they are installed and asked for.

WANDB_ENTITY, WANDB_NAME and the other variables of Weights & Biases count.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pruningawaretraining.errors import ConfigError

Watch = Callable[[Mapping[str, Any]], None]
"""Takes one row of results: an epoch, or a sparsity."""


@contextlib.contextmanager
def tracked(project: str | None, name: str) -> Iterator[Watch]:
    """A function that logs rows inside the block.

    Args:
        project: of Weights & Biases; None for nowhere.
        name: of the run, unless WANDB_NAME is set.

    Raises:
        ConfigError: it is not installed.
    """
    if project is None:
        yield lambda row: None
        return
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError("--wandb: it is not installed. Allowed: pip install 'pruningawaretraining[wandb]'") from error
    run = wandb.init(project=project, name=os.environ.get("WANDB_NAME", name))
    try:
        yield lambda row: run.log(dict(row))
    finally:
        run.finish()


@contextlib.contextmanager
def on_board(folder: Path | None, *, resume: bool = False) -> Iterator[Watch]:
    """A function that logs epochs for TensorBoard inside the block: ``tensorboard --logdir FOLDER``.

    Args:
        folder: where the event files go; None for nowhere.
        resume: keep the event files of the run's earlier sessions.

    Raises:
        ConfigError: it is not installed.
    """
    if folder is None:
        yield lambda row: None
        return
    try:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        hint = "Allowed: pip install 'pruningawaretraining[tensorboard]'"
        raise ConfigError(f"--tensorboard: it is not installed. {hint}") from error
    with contextlib.ExitStack() as opened:
        writers: list[Any] = []

        def watch(row: Mapping[str, Any]) -> None:
            if not writers:  # only now: a run that is refused leaves what is there alone
                _clear(folder, resume)
                writers.append(tensorboard.SummaryWriter(str(folder)))
                opened.callback(writers[0].close)
            for key, value in row.items():
                if key != "epoch" and isinstance(value, (int, float)):
                    writers[0].add_scalar(f"{key}/{row.get('model', 'model')}", value, int(row["epoch"]))
            writers[0].flush()

        yield watch


def _clear(folder: Path, resume: bool) -> None:
    """Delete the event files of an earlier run, unless it is resumed."""
    for stale in folder.glob("events.out.tfevents.*"):
        if not resume:
            stale.unlink()


def each_of(*watches: Watch) -> Watch:
    """Hands every row to all of them."""

    def watch(row: Mapping[str, Any]) -> None:
        for one in watches:
            one(row)

    return watch
