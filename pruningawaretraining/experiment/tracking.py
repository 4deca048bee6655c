"""Weights & Biases, when it is installed and asked for. WANDB_ENTITY, WANDB_NAME and its other variables count."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pruningawaretraining.errors import ConfigError

Watch = Callable[[Mapping[str, Any]], None]
"""Takes one row of results: an epoch, or a sparsity."""


@contextlib.contextmanager
def tracked(project: str | None, name: str) -> Iterator[Watch]:
    """What rows are handed to inside the block.

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
