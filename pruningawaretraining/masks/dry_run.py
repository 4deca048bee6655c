"""Dry-run the removal before training: sets that cannot lose channels are left out, with the reason.

Shape suffixes: ``_G`` groups.

Widths that code states (a view, attention heads) show when a channel of every set is removed, or half of them, and the
model runs on its example inputs. Then all is restored. Meanwhile weights that start constant or tiny are random: a
branch that starts at zero would hide its effect.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.masks.agreed_groups import found_by_all
from pruningawaretraining.masks.bisection import working
from pruningawaretraining.masks.confined import failing_inside
from pruningawaretraining.masks.culprits import failing_module, problem_of, sets_within
from pruningawaretraining.masks.removal import remove
from pruningawaretraining.masks.shape_copy import ShapeCopy, shape_copy
from pruningawaretraining.masks.telling import NOTHING_TOLD, outputs_depend
from pruningawaretraining.masks.temporary import temporarily_masked
from pruningawaretraining.masks.unprunable import warn_of_rest
from pruningawaretraining.models.calling import ForwardFn, outputs_of
from pruningawaretraining.models.comparison import Comparison, NoFloat64, Outputs
from pruningawaretraining.models.fake_quant import resting
from pruningawaretraining.models.probes import perturbed
from pruningawaretraining.patterns.channel import find_channels
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.coupling import TRACE_LIMIT
from pruningawaretraining.patterns.depth import find_blocks
from pruningawaretraining.patterns.expert import is_of_experts
from pruningawaretraining.patterns.head import is_of_heads

logger = logging.getLogger(__name__)

MISREAD = (
    "removed, some of it would leave another model than masked: an operation that is not understood, or a number that "
    "the code computes from its width, such as a scale"
)
Left = Callable[[int, int], int]
"""(number of a set, its size) -> how many of its groups stay."""


def _all_but_one(number: int, size: int) -> int:
    return size - 1


def _a_part(number: int, size: int) -> int:
    """About half of every set, a different part of each: sets whose widths must be equal show."""
    return math.ceil(size * (0.35 + 0.3 * (number * 0.618034 % 1)))


class _Rehearsal:
    def __init__(
        self,
        model: nn.Module,
        found: ChannelGroups,
        inputs: Any,
        forward_fn: ForwardFn | None,
        multiples: Mapping[str, int],
    ) -> None:
        self.model, self.found, self.inputs, self.forward_fn = model, found, inputs, forward_fn
        self.comparison = Comparison(model, inputs, forward_fn)
        self.multiples, self.reasons = multiples, dict[int, str]()
        self._failed_in: str | None = None
        self._shapes: ShapeCopy | None = None
        self.told = True  # whether every comparison told something

    def problem_without(self, keep_G: Tensor) -> str:
        """Why the model fails with these groups alone; "" if it works."""
        try:
            with self.comparison.in_float64():
                return self._problem_without(keep_G)
        except NoFloat64 as error:
            logger.debug("not on one set of float64 copies: %s", error)
            return self._problem_without(keep_G)

    def _problem_without(self, keep_G: Tensor) -> str:
        outputs = self._without(keep_G, self.comparison.outputs)
        return outputs if isinstance(outputs, str) else self._misread(keep_G, outputs)

    def problem(self, numbers: Sequence[int]) -> str:
        """Why the model fails without a channel of each of these sets, or about half of them; "" if it works."""
        ran = self._without(self._keep(numbers, _all_but_one), self._run)
        return ran if isinstance(ran, str) else self.problem_without(self._keep(numbers, _a_part))

    def _problem_of_shapes(self, numbers: Sequence[int]) -> str:
        """Why the model fails without about half of each of these sets, as far as shapes tell."""
        keep_G = self._keep(numbers, _a_part)
        ran = self._without(keep_G, self._run, self._shapes)
        if isinstance(ran, str) and len(numbers) == 1:
            ran = self._without(keep_G, self._run)
        return ran if isinstance(ran, str) else ""

    def _keep(self, numbers: Sequence[int], left: Left) -> Tensor:
        keep_G = torch.ones(self.found.grouping.size, dtype=torch.bool)
        for number in numbers:
            one = self.found.grouping.sets[number]
            multiple = max(1, self.multiples.get(one.name, 1) // one.width)
            kept = max(left(number, one.size) // multiple * multiple, multiple, one.least)
            keep_G[one.start : max(one.stop - kept, one.start)] = False
        return keep_G

    def _without(self, keep_G: Tensor, run: Callable[..., Outputs], shapes: ShapeCopy | None = None) -> Outputs | str:
        """Outputs of the model (or of a copy of it) without some groups, or the error that it raises."""
        if bool(keep_G.all()):
            return Outputs([], exact=True)
        model, found = (self.model, self.found) if shapes is None else (shapes.model, shapes.found)
        try:
            surgery = remove(model, found, keep_G)
        except ModelError as error:  # a layer would lose all: it reads but a part of what it is coupled to
            return str(error)
        try:
            return run() if shapes is None else run(model, shapes.inputs)
        except ModelError as error:
            self._failed_in = failing_module(error, model)
            return problem_of(error)
        finally:
            surgery.undo()

    def _run(self, *copied: Any) -> Outputs:
        """Outputs of the model, or of a copy on inputs of its own."""
        model, inputs = copied or (self.model, self.inputs)
        with resting(model):
            return Outputs(outputs_of(model, inputs, self.forward_fn), exact=False)

    def _misread(self, keep_G: Tensor, removed: Outputs) -> str:
        """Why groups are misread: the removed model differs from the masked one; "" if they agree."""
        if all(one.is_meta for one in removed.tensors):
            return ""
        with temporarily_masked(self.model, self.found, keep_G):
            masked = self.comparison.outputs()
            verdict = self.comparison.verdict(masked, removed)
            if verdict.informative and not verdict.difference:
                self.told &= outputs_depend(self.comparison, self.model, self.found, keep_G, masked)
        self.told &= verdict.informative
        return MISREAD if verdict.difference else ""

    def able(self) -> list[int]:
        """The sets that can lose channels, together."""
        numbers = list(range(len(self.found.grouping.sets)))
        if not self.problem(numbers):
            return numbers
        inside = failing_inside(self.model, self.found, self.inputs, self.forward_fn, self._keep(numbers, _a_part))
        self.reasons = inside
        numbers = [one for one in numbers if one not in inside]
        if inside and not self.problem(numbers):
            return numbers
        self._shapes = shape_copy(self.model, self.found, self.inputs, self.forward_fn)
        alone = self._failing_alone(numbers)
        left, together = working([one for one in numbers if one not in alone], self._problem_of_shapes)
        able, others = working(left, self.problem)
        self.reasons = {**inside, **alone, **together, **others}
        return able

    def _failing_alone(self, numbers: Sequence[int]) -> dict[int, str]:
        """Sets without which alone the model fails, looked for where it fails without all; each with its problem."""
        found: dict[int, str] = {}
        while self._problem_of_shapes([one for one in numbers if one not in found]) and self._failed_in is not None:
            near = set(sets_within(self.found.grouping, self._failed_in)) - found.keys()
            problems = {one: problem for one in sorted(near) if (problem := self._problem_of_shapes([one]))}
            if not problems:
                break
            found.update(problems)
        return found


def removable_channels(
    model: nn.Module,
    inputs: Any,
    chosen: set[str],
    forward_fn: ForwardFn | None = None,
    multiples: Mapping[str, int] | None = None,
    units: Mapping[str, str] | None = None,
    limit: float = TRACE_LIMIT,
    own: Sequence[ChannelGroups] = (),
) -> ChannelGroups:
    """The channels whose removal the model survives; each set that is left out is a warning with the reason.

    Args:
        model: the model; it is as before afterwards.
        inputs, forward_fn: how to run it.
        chosen: the layers that may lose output channels.
        multiples: set -> what the number of its channels stays a multiple of.
        units, limit, own: see :func:`pruningawaretraining.patterns.channel.find_channels`.

    Raises:
        ModelError: the inputs are rejected, or nothing can be removed.
    """

    def find(stated: bool) -> ChannelGroups:
        return found_by_all(
            model, limit, lambda left: find_channels(model, inputs, chosen, forward_fn, units, left, own, stated)
        )

    def rehearsed(found: ChannelGroups) -> tuple[ChannelGroups, _Rehearsal, list[int]]:
        rehearsal = _Rehearsal(model, found, inputs, forward_fn, multiples or {})
        with perturbed(model):
            return found, rehearsal, rehearsal.able()

    found, rehearsal, able = rehearsed(find(stated=False))
    if _may_state(found, rehearsal.reasons):  # perhaps it runs if attributes follow that code states widths with
        with suppress(ModelError):
            other = find(stated=True)
            again = None if other.is_like(found) else rehearsed(other)
            if again is not None and _groups(other, again[2]) > _groups(found, able):
                found, rehearsal, able = again
    if not rehearsal.told:
        logger.warning(NOTHING_TOLD, type(model).__name__)
    left = found if len(able) == len(found.grouping.sets) else _without(model, found, rehearsal.reasons)
    warn_of_rest(model, left, inputs, forward_fn, chosen)
    return left


def _without(model: nn.Module, found: ChannelGroups, why: Mapping[int, str]) -> ChannelGroups:
    """The channels without the sets that stay; each is a warning with the reason."""
    reasons = {number: _why(found, number, reason) for number, reason in sorted(why.items())}
    left = found.without(reasons)
    for number, reason in reasons.items():
        logger.warning("%s stays as it is: %s", found.grouping.sets[number].name, reason)
    if left.grouping.size == 0:
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(left.skipped.items())[:4])
        raise ModelError(f"model: {type(model).__name__} has no prunable channel group. {shown}")
    return left


def _may_state(found: ChannelGroups, reasons: Mapping[int, str]) -> bool:
    """Whether the model does not run without some channels (heads are numbers of their own)."""
    sets = found.grouping.sets
    return any(reason != MISREAD and not is_of_heads(sets[number]) for number, reason in reasons.items())


def _groups(found: ChannelGroups, able: Sequence[int]) -> int:
    return sum(found.grouping.sets[number].size for number in able)


def removable_blocks(
    model: nn.Module, inputs: Any, chosen: set[str], forward_fn: ForwardFn | None = None
) -> ChannelGroups:
    """The residual blocks that the model can do without; each that has to stay is a warning with the reason.

    Args:
        model: the model; it is as before afterwards.
        inputs, forward_fn: how to run it.
        chosen: the blocks that may go.

    Raises:
        ModelError: the inputs are rejected, or no block can go.
    """
    found = find_blocks(model, inputs, chosen, forward_fn)
    blocks = found.grouping.sets[0].layers
    with perturbed(model):
        reasons = _needed(_Rehearsal(model, found, inputs, forward_fn, {}), blocks)
    for name, reason in reasons.items():
        logger.warning("%s stays: %s", name, reason)
    if len(reasons) == len(blocks):
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:4])
        raise ModelError(f"model: {type(model).__name__} has no residual block that could go. {shown}")
    if reasons:
        left = find_blocks(model, inputs, set(blocks) - reasons.keys(), forward_fn)
        found = replace(left, skipped={**found.skipped, **reasons})
    if found.grouping.size == 1:
        name = found.grouping.sets[0].name
        logger.warning(
            "%s stays: it is the only selected residual block that could be removed, and one must stay", name
        )
    return found


def _needed(rehearsal: _Rehearsal, names: Sequence[str]) -> dict[str, str]:
    """Block -> why it cannot be removed; tried one by one if the model fails without all of them."""
    one_by_one = ~torch.eye(len(names), dtype=torch.bool)
    if not any(rehearsal.problem_without(~one_by_one[end]) for end in (0, -1)):
        return {}
    problems = {name: rehearsal.problem_without(keep_G) for name, keep_G in zip(names, one_by_one, strict=True)}
    return {
        name: reason if reason == MISREAD else f"without it the model does not run ({reason})"
        for name, reason in problems.items()
        if reason
    }


def _why(found: ChannelGroups, number: int, reason: str) -> str:
    if reason == MISREAD:
        return reason
    one = found.grouping.sets[number]
    kind = "heads" if is_of_heads(one) else "experts" if is_of_experts(one) else "channels"
    return f"without some of its {kind} the model does not run ({reason})"
