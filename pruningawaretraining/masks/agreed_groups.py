"""Coupled channels that every process finds alike, whatever its clock says of the time limit."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from pruningawaretraining.distributed.collectives import agreed, rank, world_size
from pruningawaretraining.errors import ModelError
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.channel_labels import producer_names
from pruningawaretraining.patterns.raw_products import raw_weights

LATE = "the first process did not find its coupled channels within trace_limit"


def found_by_all(model: nn.Module, limit: float, find: Callable[[float], ChannelGroups]) -> ChannelGroups:
    """The first process's findings within its time limit; the others follow it, since clocks differ."""
    if world_size() == 1:
        return find(limit)
    names, found, problem = [*producer_names(model), *raw_weights(model)], None, None
    try:
        found = find(limit if rank() == 0 else math.inf)
    except ModelError as error:
        problem = error
    mine = {one.name for one in found.grouping.sets} if found is not None else set()
    (first,) = agreed(torch.tensor([name in mine for name in names]))
    if found is None:
        raise ModelError(str(problem)) from problem
    missing = {name for name, there in zip(names, first.tolist(), strict=True) if not there}
    late = {number: LATE for number, one in enumerate(found.grouping.sets) if one.name in missing}
    return found.without(late) if late else found
