"""Everything beside the model that a mask or a removal has to reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pruningawaretraining.models.exported_graph import ExportedGraph


@dataclass
class RemovalContext:
    """Follows the model: optimizers, averages, graphs.

    Args:
        optimizers: their parameters and states.
        followers: moving averages of the model.
        graphs: exported from the model.
        before_removal: called when the model is masked as it will be removed.
        after_removal: lets the library's own things follow once the model has been changed; it may be called twice.
        told: called once all that is done.
        member_done: called when the fine-tuning of a family's member is over, before the model changes.
    """

    optimizers: Sequence[torch.optim.Optimizer] = ()
    followers: Sequence[nn.Module] = ()
    graphs: Sequence[ExportedGraph] = ()
    before_removal: Callable[[], None] = lambda: None
    after_removal: Callable[[], None] = lambda: None
    told: Callable[[], None] = lambda: None
    member_done: Callable[[], None] = lambda: None
