"""Statistics of criteria besides the weights: costs, masks, and values collected in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.registry import lookup, names


class GroupCost(Protocol):
    """A cost as a function of masks; see :class:`pruningawaretraining.costs.macs.LinearCost`."""

    names: tuple[str, ...]
    base_L: Tensor

    def __call__(self, keep_G: Tensor) -> float: ...
    def saving_G(self, keep_G: Tensor) -> Tensor: ...


@dataclass
class Statistics:
    """Statistics passed to every criterion.

    Args:
        macs: the MACs of the model as a function of its masks, None for patterns that save none.
        keep_G: groups that are not masked yet, None for all.
        scale: for each set, what a criterion divided its scores by at the first event; None before it.
        first_G: the scores that it divided.
        tensors: named statistics that a criterion gathered (moving averages, activations), one a member or group.
    """

    macs: GroupCost | None = None
    keep_G: Tensor | None = None
    scale: list[float] | None = None
    first_G: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Criterion(Protocol):
    """Importance of groups: larger is kept."""

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        """One score for each group (vector of ``grouping.size``)."""
        ...


class Collector(Protocol):
    """Collects statistics during training for :attr:`Statistics.tensors`; one that reads gradients before a step says
    so with a class attribute ``reads_gradients = True``."""

    def attach(self, model: nn.Module, grouping: Grouping) -> None:
        """Start collecting, with forward hooks if activations are needed."""

    def detach(self) -> None:
        """Remove the hooks."""

    def on_before_step(self, grouping: Grouping, scale: Tensor | float = 1.0) -> None:
        """Once in every real optimizer step, after gradients have been reduced over ranks: read ``.grad``.

        Args:
            grouping: the groups as they are now.
            scale: what the gradients are still multiplied with (a loss scale that is not yet divided out).
        """

    def agree(self) -> None:
        """Share what each process has seen alone; a collective, called at events and before any other use of it.

        Statistics of gradients need no exchange: gradients have been averaged over the processes.
        """

    def tensors(self) -> dict[str, Tensor]:
        """The collected statistics."""

    def restrict(self, grouping: Grouping, keep_G: Tensor) -> None:
        """Follow a removal of groups; ``grouping`` is the remainder."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: it is of other groups.
        """


EVERY_KIND = ("channel", "block", "weight")


@dataclass(frozen=True)
class Needs:
    """Declares what a criterion needs; it has it as its class attribute ``needs``.

    Args:
        kinds: the groups that it can score: "channel" (heads included), "block" (of layers), "weight" (inside layers);
            see :class:`~pruningawaretraining.config.options.Support`.
        whole_layers: whether a layer has to be whole for it; False where scores are sums over weights alone.
        adds_up: whether its scores are in one unit and add up, so that they can be weighed against costs.
    """

    kinds: tuple[str, ...] = EVERY_KIND
    whole_layers: bool = True
    adds_up: bool = False


def needs_of(criterion: Any) -> Needs:
    """The needs of a criterion (or its class), combined with those of the criterion that it weighs, if any."""
    own: Needs | None = getattr(criterion, "needs", None)
    base = getattr(criterion, "base", None)
    if base is None or isinstance(base, (str, Mapping)):  # the class itself has only the name of its default
        return own or Needs()
    inner = needs_of(base)
    if own is None:
        return inner
    kinds = tuple(one for one in own.kinds if one in inner.kinds)
    return Needs(kinds, own.whole_layers or inner.whole_layers, own.adds_up and inner.adds_up)


def scorable(grouping: Grouping, criterion: Any) -> Grouping:
    """The groups as a criterion scores them: of sharded weights, whole ones where it needs them (a collective)."""
    return grouping.gathered() if needs_of(criterion).whole_layers else grouping


def collector_of(criterion: Any) -> Collector | None:
    """A new collector for a criterion (or for the one that it weighs), or None where it needs nothing of training."""
    make = getattr(criterion, "collector", None)
    if make is not None:
        made: Collector = make()
        return made
    base = getattr(criterion, "base", None)
    return None if base is None else collector_of(base)


def measures(criterion: Any) -> bool:
    """Whether a criterion measures what it needs itself, on data that the pruner is given."""
    return hasattr(criterion, "measured")


def refined(criterion: Any, grouping: Grouping, keep_G: Tensor, statistics: Statistics) -> Tensor:
    """The masks after a criterion has exchanged groups of equal count, where it can."""
    refine = getattr(criterion, "refine", None)
    return keep_G if refine is None else refine(grouping, keep_G, statistics)


def check_kind(criterion: Any, kind: str, key: str, named: Any, pattern: Any) -> None:
    """Refuse a criterion that cannot score the groups of a pattern.

    Args:
        criterion: the criterion, built.
        kind: of the pattern's groups.
        key: of the criterion in the config.
        named, pattern: the criterion and the pattern as the config has them.

    Raises:
        ConfigError: it names the criterion, and patterns and criteria that go together.
    """
    kinds = needs_of(criterion).kinds
    if kind not in kinds:
        fitting = [one for one in names("criterion") if kind in needs_of(lookup("criterion", one)).kinds]
        raise ConfigError(
            f"{key}: {named!r} scores {' and '.join(_PLURAL[one] for one in kinds)}, not the groups of {pattern!r}. "
            f"Allowed: {', '.join(fitting)}"
        )


_PLURAL = {"channel": "channels and heads", "block": "whole blocks of layers", "weight": "weights inside layers"}
