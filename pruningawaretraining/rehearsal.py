"""A removal rehearsed before any training is spent on it: sets that cannot lose channels are left out, with the reason.

Shape suffixes: ``_G`` groups.

Models write widths into their code (a view, a constant that is added, attention heads). What a trace cannot see shows
when a channel of every set is gone, or half of them, and the model runs on its example inputs; then all is put back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.grouping import Grouping
from pruningawaretraining.inputs import ForwardFn, disagreement, outputs_of
from pruningawaretraining.patterns.channel import ChannelGroups, find_channels
from pruningawaretraining.patterns.head import is_of_heads
from pruningawaretraining.quantization import resting
from pruningawaretraining.removal import remove

log = logging.getLogger(__name__)


Left = Callable[[int, int], int]
"""(number of a set, its size) -> how many of its groups stay."""


def _all_but_one(number: int, size: int) -> int:
    return size - 1


def _a_part(number: int, size: int) -> int:
    """About half, and another part of every set: sets whose widths have to be equal show that."""
    return math.ceil(size * (0.35 + 0.3 * (number * 0.618034 % 1)))


@contextmanager
def _masked(grouping: Grouping, keep_G: Tensor) -> Iterator[None]:
    """Weights of the groups that go are zero inside the block."""
    changed: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for member, keep_W in grouping.without_role("buffer").expand(keep_G.float(), outside=1.0):
            if bool((keep_W == 0).any()):
                changed.append((member.parameter, member.parameter.detach().clone()))
                member.parameter.mul_(keep_W.to(member.parameter.device, member.parameter.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in reversed(changed):
                tensor.copy_(values)


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
        """Why the model does not run when each of these sets has lost a channel, or about half; "" if it does."""
        return (
            self._without(numbers, _all_but_one)
            or self._without(numbers, _a_part)
            or self._misread([number for number in numbers if is_of_heads(self.found.grouping.sets[number])])
        )

    def _without(self, numbers: Sequence[int], left: Left) -> str:
        """The problem when each set has lost its first channels, down to so many or the next multiple below."""
        keep_G = self._keep(numbers, left)
        outputs = [] if bool(keep_G.all()) else self._outputs_without(keep_G)
        return outputs if isinstance(outputs, str) else ""

    def _keep(self, numbers: Sequence[int], left: Left) -> Tensor:
        keep_G = torch.ones(self.found.grouping.size, dtype=torch.bool)
        for number in numbers:
            one = self.found.grouping.sets[number]
            multiple = max(1, self.multiples.get(one.name, 1) // one.width)
            kept = max(left(number, one.size) // multiple, 1) * multiple
            keep_G[one.start : max(one.stop - kept, one.start)] = False
        return keep_G

    def _outputs_without(self, keep_G: Tensor) -> list[Tensor] | str:
        """What the model computes without some groups, or why it does not run."""
        try:
            surgery = remove(self.model, self.found, keep_G)
        except ModelError as error:  # a layer would lose all: it reads but a part of what it is coupled to
            return str(error)
        try:
            with resting(self.model):
                return outputs_of(self.model, self.inputs, self.forward_fn)
        except ModelError as error:
            lines = str(error.__cause__ or error).strip().splitlines()
            return lines[0] if lines else type(error.__cause__ or error).__name__
        finally:
            surgery.undo()

    def _misread(self, numbers: Sequence[int]) -> str:
        """Why heads are not where they are thought to be: removed, they leave another model than masked; "" if not."""
        keep_G = self._keep(numbers, _a_part)
        if bool(keep_G.all()):
            return ""
        removed = self._outputs_without(keep_G)
        if isinstance(removed, str):
            return removed
        with _masked(self.found.grouping, keep_G), resting(self.model):
            masked = outputs_of(self.model, self.inputs, self.forward_fn)
        return "its heads are laid out in a way that is not understood" if disagreement(masked, removed) else ""

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
    units: Mapping[str, str] | None = None,
) -> ChannelGroups:
    """The channels whose removal the model survives; each set that is left out is a warning with the reason.

    Args:
        model: the model; it is as before afterwards.
        inputs, forward_fn: how to run it.
        chosen: the layers that may lose output channels.
        multiples: set -> what the number of its channels stays a multiple of.
        units: see :func:`pruningawaretraining.patterns.channel.find_channels`.

    Raises:
        ModelError: the inputs are rejected, or nothing can be removed.
    """
    found = find_channels(model, inputs, chosen, forward_fn, units)
    rehearsal = _Rehearsal(model, found, inputs, forward_fn, multiples or {})
    if len(rehearsal.able(range(len(found.grouping.sets)))) == len(found.grouping.sets):
        return found
    reasons = {
        number: f"without some of its {_kind(found, number)} the model does not run ({reason})"
        for number, reason in sorted(rehearsal.reasons.items())
    }
    left = found.without(reasons)
    for number, reason in reasons.items():
        log.warning("%s stays as it is: %s", found.grouping.sets[number].name, reason)
    if left.grouping.size == 0:
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(left.skipped.items())[:4])
        raise ModelError(f"model: {type(model).__name__} has no prunable channel group. {shown}")
    return left


def _kind(found: ChannelGroups, number: int) -> str:
    return "heads" if is_of_heads(found.grouping.sets[number]) else "channels"
