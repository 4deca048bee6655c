"""Tensors that meet entry by entry: which of their slots go together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pruningawaretraining.patterns.labels.slots import NOBODY, Array, Reason, Slots, aligned, pattern, varying


@dataclass(eq=False)
class Operand:
    """A tensor that takes part in an operation.

    Args:
        shape: its shape, aligned with the others.
        arrays: its slots.
        why_fixed: what a dimension without slots is.
    """

    shape: tuple[int, ...]
    arrays: list[Array]
    why_fixed: str = "a tensor whose size is fixed"
    wide: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.wide = {dim for dim, size in enumerate(self.shape) if size > 1}

    @classmethod
    def of(cls, shape: Sequence[int], arrays: Iterable[Array], dims: int, why_fixed: str) -> Operand:
        """Aligned by leading dimensions of 1."""
        whole = (1,) * (dims - len(shape)) + tuple(shape)
        return cls(whole, [aligned(one, dims) for one in arrays], why_fixed)


def meet(slots: Slots, operands: Sequence[Operand], reason: Reason) -> list[Array]:
    """Join what meets, and return the slots of the result.

    Slots that vary along the same dimensions are joined. A dimension that another operand has without slots is fixed:
    slots that vary along it alone stay, others go together along it.
    """
    operands = [one for one in operands if one.wide]
    while any(_settle(slots, one, other, reason) for one in operands for other in operands if one is not other):
        pass
    keyed: dict[tuple[int, ...], list[list[Array]]] = {}
    for one in operands:
        own: dict[tuple[int, ...], list[Array]] = {}
        for array in one.arrays:
            own.setdefault(varying(array), []).append(array)
        for key, arrays in own.items():
            keyed.setdefault(key, []).append(arrays)
    found: list[Array] = []
    for lists in keyed.values():
        found += _joined(slots, lists, reason)
    return found


def _settle(slots: Slots, one: Operand, other: Operand, reason: Reason) -> bool:
    """Reduce the slots of one operand to what the other allows; whether that changed anything."""
    for position, array in enumerate(one.arrays):
        own = set(varying(array))
        shared = own & other.wide
        theirs = [set(varying(a)) for a in other.arrays]
        if not shared or own in theirs:
            continue
        covered = set().union(*theirs) if theirs else set()
        fixed = shared - covered
        if own <= fixed:
            slots.lock(array, reason(f"meets {other.why_fixed}"))
            del one.arrays[position]
            return True
        if fixed:
            one.arrays[position] = slots.tie(array, fixed)
            return True
        if len(own) > 1:  # they overlap in some dimensions only: the last one decides
            one.arrays[position] = slots.tie(array, sorted(own)[:-1])
            return True
        # what varies along this dimension there varies along others too, and is reduced in its turn
    return False


def _joined(slots: Slots, lists: list[list[Array]], reason: Reason) -> list[Array]:
    """One array for each that the operands have along the same dimensions."""
    first, *others = sorted(lists, key=len, reverse=True)
    result = list(first)
    patterns: list[bytes] | None = None
    for arrays in others:
        if len(first) == len(arrays) == 1:
            slots.join(result[0], arrays[0])
            result[0] = filled(result[0], arrays[0])
            continue
        patterns = patterns or [pattern(one) for one in first]
        free = list(range(len(first)))
        for array in arrays:
            same = [number for number in free if patterns[number] == pattern(array)]
            if not same:
                slots.lock(array, reason("meets channels that are ordered otherwise"))
                continue
            free.remove(same[0])
            slots.join(result[same[0]], array)
    return result


def filled(one: Array, other: Array) -> Array:
    """The first where it has slots, the second elsewhere."""
    return one if (one >= 0).all() else np.where(one == NOBODY, other, one)
