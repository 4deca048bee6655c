"""Batches of a loader: inputs and targets, and micro-batches of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.models.calling import shown
from pruningawaretraining.models.trees import map_tensors, tensors_of

logger = logging.getLogger(__name__)

LossFn = Callable[[Any, Any], Tensor]
Statistic = tuple[Tensor, Tensor, Tensor]


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """A batch as what the model is called with, and what the loss gets beside the outputs.

    Raises:
        ConfigError: it is neither a pair nor a mapping.
    """
    if isinstance(batch, Mapping):
        return batch, batch.get("labels", batch)
    if isinstance(batch, (list, tuple)) and len(batch) >= 2:
        inputs = batch[0] if len(batch) == 2 else tuple(batch[:-1])
        return tuple(inputs) if isinstance(inputs, list) else inputs, batch[-1]
    raise ConfigError(f"dataloader: a batch is {shown(batch)}. Allowed: (inputs, targets), or a mapping of inputs")


def split(batch: Any, size: int | None) -> Iterator[Any]:
    """A batch in pieces of ``size`` samples (along the first dimension of its tensors)."""
    if size is None:
        yield batch
        return
    lengths = {tensor.shape[0] for tensor in tensors_of(batch) if tensor.dim()}
    if len(lengths) != 1:
        raise ConfigError(f"micro_batch: a batch with first dimensions {sorted(lengths)} cannot be split")
    length = lengths.pop()
    for start in range(0, length, size):
        count = min(size, length - start)
        yield map_tensors(lambda one: one[start : start + count] if one.dim() else one, batch)  # noqa: B023
