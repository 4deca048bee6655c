"""Statistics of criteria besides the weights: costs, masks, and values collected in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.groups.reductions import count_nan
from pruningawaretraining.registry import calling, check_returned, lookup, name_of, names


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


EVERY_KIND = ("channel", "expert", "block", "weight")
EXPECTED_SCORES = "a vector of {} real numbers, one for each group, with no NaN"
EXPECTED_MASKS = "a bool vector of {}, True for each group that is kept"


@dataclass(frozen=True)
class Needs:
    """Declares what a criterion needs; it has it as its class attribute ``needs``.

    Args:
        kinds: the groups that it can score: "channel" (heads included), "expert", "block" (of layers), "weight" (inside
            layers), or of these only "tile" (single weights, NxM and N:M); see
            :class:`~pruningawaretraining.config.options.Support`.
        whole_layers: whether a layer has to be whole for it; False where scores are sums over weights alone.
        adds_up: whether its scores are in one unit and add up, so that they can be weighed against costs.
        loss: whether they are changes of the loss (or of outputs, which stand for it), so that channels, heads and
            whole blocks compare.
    """

    kinds: tuple[str, ...] = EVERY_KIND
    whole_layers: bool = True
    adds_up: bool = False
    loss: bool = False


def needs_of(criterion: Any) -> Needs:
    """The needs of a criterion (or its class), combined with those of the criterion that it weighs, if any."""
    own: Needs | None = getattr(criterion, "needs", None)
    if not (own is None or isinstance(own, Needs)):
        raise ConfigError(
            f"criterion {name_of('criterion', criterion)!r}: its needs are {own!r:.80}. Allowed: Needs(...)"
        )
    base = getattr(criterion, "base", None)
    if base is None or isinstance(base, (str, Mapping)):  # the class itself has only the name of its default
        return own or Needs()
    inner = needs_of(base)
    if own is None:
        return inner
    kinds = [one for one in inner.kinds if _among(one, own.kinds)] + [one for one in own.kinds if one in inner.kinds]
    whole, adds = own.whole_layers or inner.whole_layers, own.adds_up and inner.adds_up
    return Needs(tuple(dict.fromkeys(kinds)), whole, adds, own.loss and inner.loss)


def scores_of(criterion: Any, grouping: Grouping, statistics: Statistics) -> Tensor:
    """A criterion's scores of groups, detached; of sharded weights, it sees whole ones where it needs them.

    Raises:
        ExtensionError: the criterion raises, or does not return one number for each group.
    """
    seen = grouping.gathered() if needs_of(criterion).whole_layers else grouping  # a collective
    with calling("criterion", criterion, EXPECTED_SCORES.format(grouping.size)):
        scores_G = criterion.score(seen, statistics)
    return checked_scores(criterion, scores_G, grouping.size)


def checked_scores(criterion: Any, scores_G: Any, size: int, nan: bool = True) -> Tensor:
    """Scores that a criterion has returned, detached; whole numbers become floating-point ones.

    Args:
        criterion: the criterion.
        scores_G: what it returned.
        size: how many groups there are.
        nan: whether NaN is looked for, which waits for the device.

    Raises:
        ExtensionError: they are not one number for each of ``size`` groups.
    """
    expected = EXPECTED_SCORES.format(size)
    good = isinstance(scores_G, Tensor) and scores_G.shape == (size,) and scores_G.device.type != "meta"
    good = good and scores_G.layout is torch.strided
    good = good and not scores_G.is_complex() and scores_G.dtype is not torch.bool
    check_returned(good, "criterion", criterion, scores_G, expected)
    found: Tensor = scores_G.detach()
    missing = count_nan(found) if nan else 0
    check_returned(not missing, "criterion", criterion, found, expected, f"NaN for {missing} of {size} groups")
    return found if found.is_floating_point() else found.double()


def collector_of(criterion: Any) -> Collector | None:
    """A new collector for a criterion (or for the one that it weighs), or None where it needs nothing of training."""
    make = getattr(criterion, "collector", None)
    if make is not None:
        with calling("criterion", criterion, "a collector"):
            made: Collector = make()
        return made
    base = getattr(criterion, "base", None)
    return None if base is None else collector_of(base)


def measures(criterion: Any) -> bool:
    """Whether a criterion measures what it needs itself, on data that the pruner is given."""
    return hasattr(criterion, "measured")


def solves(criterion: Any) -> bool:
    """Whether a criterion prunes weights itself, on data that the pruner is given, and moves those that stay."""
    return hasattr(criterion, "solver")


def refined(criterion: Any, grouping: Grouping, keep_G: Tensor, statistics: Statistics, nested: bool) -> Tensor:
    """The masks after a criterion has exchanged groups of equal count, where it can.

    Args:
        criterion: the criterion.
        grouping: the groups.
        keep_G: the masks that were chosen by its scores.
        statistics: what it scored them with.
        nested: whether groups that were masked before stay so.
    """
    refine = getattr(criterion, "refine", None)
    if refine is None:
        return keep_G
    if not nested:
        statistics = replace(statistics, keep_G=None)
    with calling("criterion", criterion, EXPECTED_MASKS.format(grouping.size)):
        refined_G = refine(grouping, keep_G, statistics)
    return checked_masks("criterion", criterion, refined_G, grouping.size)


def checked_masks(kind: str, piece: Any, keep_G: Any, size: int) -> Tensor:
    """Masks that a registered piece has returned.

    Raises:
        ExtensionError: they are not one truth value for each of ``size`` groups.
    """
    good = isinstance(keep_G, Tensor) and keep_G.shape == (size,) and keep_G.dtype is torch.bool
    check_returned(good and keep_G.device.type != "meta", kind, piece, keep_G, EXPECTED_MASKS.format(size))
    found: Tensor = keep_G
    return found


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
    if not callable(getattr(criterion, "score", None)):
        raise ConfigError(
            f"{key}: {named!r} has no method 'score'. Allowed: a class with score(grouping, statistics), which returns "
            "one number for each group"
        )
    if not _among(kind, kinds):
        fitting = [one for one in names("criterion") if _among(kind, needs_of(lookup("criterion", one)).kinds)]
        raise ConfigError(
            f"{key}: {named!r} scores {' and '.join(_PLURAL[one] for one in kinds)}, not the groups of {pattern!r}. "
            f"Allowed: {', '.join(fitting)}"
        )


def _among(kind: str, kinds: tuple[str, ...]) -> bool:
    return kind in kinds or (kind == "tile" and "weight" in kinds)


_PLURAL = {
    "channel": "channels and heads",
    "expert": "experts",
    "block": "whole blocks of layers",
    "weight": "weights inside layers",
    "tile": "single weights, NxM and N:M",
}
