"""Sums that forward hooks keep for modules: of this process since the last event, and of all processes up to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.distributed.collectives import totals, world_size
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.models.calling import in_backward, is_probing


class RunningSums:
    """Base of collectors that add up numbers of a module by its name.

    With several processes each sees its own part of a batch. Their sums are combined at events.

    Args:
        in_eval: listen in eval mode too (calibration), not only while training.
    """

    def __init__(self, in_eval: bool = True) -> None:
        self.in_eval = in_eval
        self.own: dict[str, Tensor] = {}  # of this process, since the last event
        self.common: dict[str, Tensor] = {}  # of all processes, up to then
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.handles: list[RemovableHandle] = []

    def shapes_of(self, grouping: Grouping) -> dict[str, tuple[int, ...]]:
        """Name -> shape of its sums."""
        raise NotImplementedError

    def hook(self, model: nn.Module, name: str) -> RemovableHandle:
        """Listen to one of the names."""
        raise NotImplementedError

    def attach(self, model: nn.Module, grouping: Grouping) -> None:
        """Put a forward hook on every module.

        Raises:
            ConfigError: the groups are something else.
        """
        self.detach()
        self.shapes = self.shapes_of(grouping)
        self.handles = [self.hook(model, name) for name in self.shapes]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def listens(self, module: nn.Module) -> bool:
        """Whether a pass through a module counts."""
        return (module.training or self.in_eval) and not is_probing() and not in_backward()

    def add(self, name: str, seen: Tensor) -> None:
        """Add what has been seen."""
        known = self.own.get(name)
        self.own[name] = seen if known is None else known.to(seen.device).add_(seen)

    def agree(self) -> None:
        """See :class:`~pruningawaretraining.criteria.base.Collector`: one flat all-reduce."""
        if world_size() == 1 or not self.shapes:
            return
        none = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self.shapes.items()}
        rows = totals([self.own.get(name, none[name]) for name in self.shapes])
        self.common = {
            name: self.common.get(name, none[name]).to(row.device) + row
            for name, row in zip(self.shapes, rows, strict=True)
        }
        self.own = {}

    def all(self) -> dict[str, Tensor]:
        """The sums of every module that has been called."""
        found = dict(self.common)
        for name, own in self.own.items():
            found[name] = own + found[name].to(own.device) if name in found else own
        return found

    def on_before_step(self, grouping: Grouping, scale: Tensor | float = 1.0) -> None:
        """Do nothing before a step."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data: of all processes up to the last event, and of this one since then."""
        return {name: row.clone() for name, row in self.all().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~pruningawaretraining.criteria.base.Collector`."""
        for name, row in state.items():
            if not isinstance(row, Tensor) or (self.shapes and tuple(row.shape) != self.shapes.get(name)):
                raise CheckpointError(f"state: sums of {name!r}, which do not fit the groups that remain")
        loaded = {name: row.clone() for name, row in state.items()}
        self.own, self.common = (loaded, {}) if world_size() == 1 else ({}, loaded)
