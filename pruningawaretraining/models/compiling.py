"""Compiled code of a model, and when it becomes stale."""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

logger = logging.getLogger(__name__)


def forget_compiled() -> None:
    """Drop compiled graphs, so that the next call compiles the model as it is now.

    Compiled code does not look for forward hooks where there were none when it was made, so the first hook has to be
    told to it; and graphs of a model that has lost channels since would only fill the cache, until its limit
    (``torch._dynamo.config.recompile_limit``, 8) turns compilation off. Nothing happens where nothing is compiled.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["stats"]["unique_graphs"]:
        logger.debug("compiled graphs are dropped: the model has changed")
        torch.compiler.reset()


def uncompiled() -> AbstractContextManager[object]:
    """Inside the block compiled modules run as they are written, so that hooks and tracing see every layer.

    Where the block itself is being compiled or exported by dynamo, it is read as it is written anyway.
    """
    if "torch._dynamo" not in sys.modules or torch.compiler.is_dynamo_compiling():
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager
