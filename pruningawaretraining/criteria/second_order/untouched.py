"""Restore a model, its buffers and the random states after reading data."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruningawaretraining.models.calling import (
    evaluating,
    full_precision,
)

logger = logging.getLogger(__name__)

LossFn = Callable[[Any, Any], Tensor]
Statistic = tuple[Tensor, Tensor, Tensor]


@contextmanager
def untouched(model: nn.Module, dataloader: Any = None) -> Iterator[None]:
    """In eval mode and without autocast inside the block; modes, buffers and random states are restored after it."""
    with ExitStack() as stack:
        stack.enter_context(_random_states(dataloader))
        stack.enter_context(_buffers(model))
        stack.enter_context(evaluating(model))
        stack.enter_context(full_precision(model))
        yield


@contextmanager
def _buffers(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def _random_states(dataloader: Any) -> Iterator[None]:
    sources = (dataloader, getattr(dataloader, "sampler", None))
    generators = {id(one): one for one in (getattr(source, "generator", None) for source in sources)}
    states = [(one, one.get_state()) for one in generators.values() if isinstance(one, torch.Generator)]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in states:
            generator.set_state(state)
