"""The state dict of :class:`PruneOptimizer`: plain data out, and the right dtypes in.

A base optimizer that loads a state casts every tensor in it to the dtype of its parameter; masks, ranks and counters
must not go that way, so they are taken out before and put back after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.proximal.latent import OWN_KEYS
from pruningawaretraining.proximal.options import KINDS, gamma_key

COUNTERS = ("num_steps", "warmup_steps", "healing_start_step")
TYPES = KINDS
NameOf = Callable[[str, Any], str]


def pack_groups(
    groups: Sequence[Mapping[str, Any]], counters: Mapping[str, int], name_of: NameOf
) -> list[dict[str, Any]]:
    """Param groups with the counters, and with types by name."""
    packed = []
    for group in groups:
        named = {key: name_of(kind, group[key]) for key, kind in TYPES.items() if group.get(key) is not None}
        gamma = group.get(gamma_key(group))
        kept = {gamma_key(group): gamma.clone()} if isinstance(gamma, Tensor) else {}  # steps add to it in place
        packed.append({**group, **kept, **named, **counters})
    return packed


def unpack_counters(groups: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The counters that a state dict holds, as ints; none for a plain state of a base optimizer."""
    found: dict[str, int] = {}
    for key in COUNTERS:
        values = [group[key] for group in groups if key in group]
        if values:
            found[key] = int(values[0])
    return found


def unpack_groups(
    groups: Sequence[Mapping[str, Any]], live: Sequence[Mapping[str, Any]], name_of: NameOf
) -> list[dict[str, Any]]:
    """Param groups of a state dict without types and counters; options that a plain state lacks stay as they are.

    Raises:
        CheckpointError: a type differs.
    """
    unpacked = []
    for number, (group, ours) in enumerate(zip(groups, live, strict=True)):
        for key, kind in TYPES.items():
            theirs, mine = group.get(key), ours.get(key)
            if theirs is not None and (mine is None or name_of(kind, theirs) != name_of(kind, mine)):
                own = None if mine is None else name_of(kind, mine)
                raise CheckpointError(f"param_groups[{number}].{key}: the state has {theirs!r}, the optimizer {own!r}")
        kept = {key: value for key, value in ours.items() if key not in ("params", *TYPES, *group)}
        loaded = {key: value for key, value in group.items() if key not in (*COUNTERS, *TYPES)}
        unpacked.append({**kept, **loaded})
    return unpacked


def strip_own(state: Mapping[Any, Mapping[str, Any]]) -> tuple[dict[Any, dict[str, Any]], dict[Any, dict[str, Any]]]:
    """A packed state without our entries, and our entries."""
    plain: dict[Any, dict[str, Any]] = {}
    own: dict[Any, dict[str, Any]] = {}
    for index, inner in state.items():
        ours = {key: inner[key] for key in OWN_KEYS if key in inner}
        rest = {key: value for key, value in inner.items() if key not in OWN_KEYS}
        if ours:
            own[index] = ours
        if rest or not ours:
            plain[index] = rest
    return plain, own


def restore_own(
    state: dict[Tensor, Any],
    own: Mapping[Any, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    live: Sequence[Mapping[str, Any]],
) -> None:
    """Put our entries back under the live parameters, on their devices.

    Raises:
        CheckpointError: a shape differs.
    """
    numbers = [index for group in groups for index in group["params"]]
    weights = [weight for group in live for weight in group["params"]]
    for index, weight in zip(numbers, weights, strict=True):
        for key, value in own.get(index, {}).items():
            if key != "rank" and value.shape != weight.shape:
                raise CheckpointError(
                    f"state[{index}].{key}: its shape {tuple(value.shape)} is not the parameter's {tuple(weight.shape)}"
                )
            dtype = value.dtype if key == "rank" else weight.dtype
            state[weight][key] = value.detach().to(weight.device, dtype, copy=True)
