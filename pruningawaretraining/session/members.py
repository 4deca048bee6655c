"""Members of a family: the models at which a run with a list of targets stops."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from pruningawaretraining.checkpoint.pruned import save_pruned
from pruningawaretraining.engine.rule import ActiveRule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """One model of a family.

    Attributes:
        number: of the member, from 0.
        name: its first number, as in file names: "0.70", "8.5ms", "sparsity-0.90".
        target: its numbers by key, such as ``{"macs": 0.7}``.
        model: the model, while the member is what it is.
    """

    number: int
    name: str
    target: Mapping[str, float]
    model: nn.Module = field(repr=False, compare=False)

    @property
    def file(self) -> str:
        """Name of its file: ``pruned-0.70.safetensors``."""
        return f"pruned-{self.name}.safetensors"

    def save(self, folder: str | Path) -> Path:
        """Write the model as it is now with ``save_pruned``, as :attr:`file` in a folder; the path of it."""
        path = Path(folder) / self.file
        save_pruned(self.model, path)
        return path


def member_of(rules: Iterable[ActiveRule], model: nn.Module) -> Member | None:
    """The member that a model is now; None before the first is met, and on the way to the next."""
    for one in rules:
        if one.state.holds:
            number = one.state.member - 1
            return Member(number, one.held, one.members[number].target.numbers, model)
    return None


def warn_of_missed(rules: Iterable[ActiveRule]) -> None:
    """Name the members that a training has ended without."""
    for one in rules:
        if one.missed and one.works and one.state.event:
            logger.warning(
                "%s.target: the training ended before %s: its last event would have been in %s %d",
                *(one.key, ", ".join(one.missed), one.times.counts, one.timelines[-1].last),
            )
