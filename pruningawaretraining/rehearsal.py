"""A removal rehearsed before any training is spent on it: sets that cannot lose channels are left out, with the reason.

Shape suffixes: ``_G`` groups.

Models write widths into their code (a view, a constant that is added, attention heads). What a trace cannot see shows
when a channel of every set is gone, or half of them, and the model runs on its example inputs; then all is put back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.inputs import ForwardFn, outputs_of
from pruningawaretraining.patterns.channel import ChannelGroups, find_channels
from pruningawaretraining.quantization import resting
from pruningawaretraining.removal import remove

log = logging.getLogger(__name__)


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
        self.multiples = multiples
        self.reasons: dict[int, str] = {}

    def problem(self, numbers: Sequence[int]) -> str:
        """Why the model does not run when each of these sets has lost a channel, or its first half; "" if it does."""
        return self._without(numbers, lambda size: size - 1) or self._without(numbers, lambda size: -(-size // 2))

    def _without(self, numbers: Sequence[int], left: Callable[[int], int]) -> str:
        """The problem when each set has lost its first channels, down to so many or the next multiple below."""
        keep_G = torch.ones(self.found.grouping.size, dtype=torch.bool)
        for number in numbers:
            one = self.found.grouping.sets[number]
            multiple = max(1, self.multiples.get(one.name, 1) // one.width)
            kept = max(left(one.size) // multiple, 1) * multiple
            keep_G[one.start : max(one.stop - kept, one.start)] = False
        if bool(keep_G.all()):
            return ""
        try:
            surgery = remove(self.model, self.found.grouping, keep_G, norms=self.found.norms)
        except ModelError as error:  # a layer would lose all: it reads but a part of what it is coupled to
            return str(error)
        try:
            with resting(self.model):
                outputs_of(self.model, self.inputs, self.forward_fn)
        except ModelError as error:
            lines = str(error.__cause__ or error).strip().splitlines()
            return lines[0] if lines else type(error.__cause__ or error).__name__
        finally:
            surgery.undo()
        return ""

    def able(self, numbers: Sequence[int]) -> list[int]:
        """The sets that can lose channels, together: halves are tried until the others are found."""
        problem = self.problem(numbers)
        if not problem:
            return list(numbers)
        if len(numbers) == 1:
            self.reasons[numbers[0]] = problem
            return []
        middle = len(numbers) // 2
        left, right = self.able(numbers[:middle]), self.able(numbers[middle:])
        if len(left) + len(right) < len(numbers) and not self.problem([*left, *right]):
            return [*left, *right]
        for number in right:
            problem = self.problem([*left, number])
            if problem:
                self.reasons[number] = problem
            else:
                left.append(number)
        return left


def removable_channels(
    model: nn.Module,
    inputs: Any,
    chosen: set[str],
    forward_fn: ForwardFn | None = None,
    multiples: Mapping[str, int] | None = None,
) -> ChannelGroups:
    """The channels whose removal the model survives; each set that is left out is a warning with the reason.

    Args:
        model: the model; it is as before afterwards.
        inputs, forward_fn: how to run it.
        chosen: the layers that may lose output channels.
        multiples: set -> what the number of its channels stays a multiple of.

    Raises:
        ModelError: the inputs are rejected, or nothing can be removed.
    """
    found = find_channels(model, inputs, chosen, forward_fn)
    rehearsal = _Rehearsal(model, found, inputs, forward_fn, multiples or {})
    if len(rehearsal.able(range(len(found.grouping.sets)))) == len(found.grouping.sets):
        return found
    reasons = {
        number: f"without some of its channels the model does not run ({reason})"
        for number, reason in sorted(rehearsal.reasons.items())
    }
    left = found.without(reasons)
    for number, reason in reasons.items():
        log.warning("%s stays as it is: %s", found.grouping.sets[number].name, reason)
    if left.grouping.size == 0:
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(left.skipped.items())[:4])
        raise ModelError(f"model: {type(model).__name__} has no prunable channel group. {shown}")
    return left
