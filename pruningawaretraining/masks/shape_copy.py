"""A copy of a model without memory: it tells in little time whether shapes go together."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.files import BROKEN
from pruningawaretraining.masks.pruned_copy import bare_copy
from pruningawaretraining.models.calling import ForwardFn, outputs_of
from pruningawaretraining.models.trees import map_tensors
from pruningawaretraining.patterns.channel_groups import ChannelGroups

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ShapeCopy:
    """A model on the meta device, its groups and its inputs there."""

    model: nn.Module
    found: ChannelGroups
    inputs: Any


def shape_copy(model: nn.Module, found: ChannelGroups, inputs: Any, forward_fn: ForwardFn | None) -> ShapeCopy | None:
    """Copy a model to the meta device.

    Args:
        model: is not changed.
        found: its groups.
        inputs, forward_fn: how to run it.

    Returns:
        The copy; None for a model that does not run there, since its code looks at values or makes tensors elsewhere.
    """
    try:
        copied = bare_copy(model, "meta")
        made = ShapeCopy(copied, found.on(copied), map_tensors(lambda one: one.to("meta"), inputs))
        outputs_of(copied, made.inputs, forward_fn)
    except (ModelError, *BROKEN) as error:
        logger.debug("does not run on the meta device: %s", error)
        return None
    return made
