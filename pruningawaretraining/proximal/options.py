"""Options of the param groups of :class:`PruneOptimizer`, read and checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.proximal.coupled import CoupledGrouper
from pruningawaretraining.proximal.groupers import Grouper
from pruningawaretraining.proximal.low_rank import SpectralGrouper
from pruningawaretraining.proximal.maps import GroupMap, ProxMap, SpectralMap
from pruningawaretraining.registry import build, canonical, lookup
from pruningawaretraining.schedules import sparsity_at

AnyGrouper: TypeAlias = Grouper | SpectralGrouper | CoupledGrouper
GROUPERS = (Grouper, SpectralGrouper, CoupledGrouper)

COMMON_KEYS = ("group_type", "prox_type", "reg_lambda", "gamma", "prox_freq", "gamma_index_slope")
KINDS = {"group_type": "grouper", "prox_type": "prox"}
RAMP_KEYS = ("min_sparsity_schedule", "prox_through_heal")
FIELD_KEYS = ("k", "num_heads", "npack", "pack_dim", "min_sparsity", "n_nonzero", "score_type")
OWN = "prox_"
"""Before a key of FIELD_KEYS or "gamma" it makes a key that no base optimizer has: some count steps in "k"."""
OPTION_KEYS = (*COMMON_KEYS, *RAMP_KEYS, *FIELD_KEYS)
OWN_NAMED = (f"{OWN}gamma", *(f"{OWN}{key}" for key in FIELD_KEYS))
WATCHED_KEYS = (*(key for key in OPTION_KEYS if key not in ("gamma", "reg_lambda")), *OWN_NAMED[1:])


def gamma_key(group: Mapping[str, Any]) -> str:
    """Where a param group's gamma is."""
    return OWN_NAMED[0] if OWN_NAMED[0] in group else "gamma"


def without_foreign(group: Mapping[str, Any], others: Iterable[str]) -> dict[str, Any]:
    """A param group's options by their short names, without what belongs to the base optimizer.

    Args:
        group: the param group.
        others: keys of the base optimizer.
    """
    foreign = set(others)
    view = {key: value for key, value in group.items() if key not in foreign or key not in OPTION_KEYS}
    return view | {key: group[OWN + key] for key in FIELD_KEYS if OWN + key in group}


@dataclass(frozen=True, eq=False)
class GroupOptions:
    """A param group's options, built.

    Args:
        grouper: how its weights are grouped.
        prox: what happens to the groups.
        prox_freq: steps between proximal steps.
        gamma_index_slope: thresholds are multiplied by ``linspace(1 - slope, 1 + slope, groups) / 2``.
        schedule: registered schedule of a hard map's fraction; "one_shot" holds it from the start.
        through_heal: whether singular values stay cut while healing.
    """

    grouper: AnyGrouper
    prox: ProxMap
    prox_freq: int = 1
    gamma_index_slope: float = 0.0
    schedule: str = "one_shot"
    through_heal: bool = True

    def fraction(self, step: int, warmup_steps: int, healing_start_step: int) -> float:
        """The fraction that a hard map zeroes at a step: 0 until the warm-up ends, all one step before healing."""
        if self.schedule == "one_shot" or step >= healing_start_step - 1:
            return self.prox.target
        if step <= warmup_steps:
            return 0.0
        t = (step - warmup_steps) / (healing_start_step - warmup_steps)
        return sparsity_at(self.schedule, t, 0.0, self.prox.target)

    @property
    def holds_rank(self) -> bool:
        """Whether weights are cut back to a rank while healing."""
        return self.through_heal and isinstance(self.grouper, SpectralGrouper)

    def due(self, step: int, warmup_steps: int, healing_start_step: int) -> bool:
        """Whether the proximal map runs at a step."""
        if self.prox.hard and step == healing_start_step - 1:
            return True
        return step >= warmup_steps and (step - warmup_steps) % self.prox_freq == 0


def read_options(
    group: Mapping[str, Any], where: str, ramp_possible: bool, others: Iterable[str] = (), base: str = ""
) -> GroupOptions:
    """Build the options of a param group.

    Args:
        group: the param group; it is not changed.
        where: how to call it in messages.
        ramp_possible: whether a ramp has an end (a healing phase).
        others: keys that belong to the base optimizer, which may change them at every step.
        base: its name, for messages.

    Raises:
        ConfigError: an unknown type, a missing or wrong option, a key that the base optimizer has too, or types that do
            not go together.
    """
    _check_collisions(group, where, others, base)
    group = without_foreign(group, others)
    if group.get("group_type") is None:
        raise ConfigError(f"{where}.group_type: missing, but needed beside prox_type={type_name(group['prox_type'])!r}")
    grouper = built("grouper", group["group_type"], group, f"{where}.group_type", GROUPERS)
    prox = built("prox", group["prox_type"], group, f"{where}.prox_type", (ProxMap,))
    if isinstance(prox, SpectralMap) != isinstance(grouper, SpectralGrouper):
        fitting = "SVDGrouper, PackedSVDGrouper" if isinstance(prox, SpectralMap) else "any but the SVD groupers"
        raise ConfigError(
            f"{where}.group_type: {type(grouper).__name__} does not go with {type(prox).__name__}. Allowed: {fitting}"
        )
    if isinstance(grouper, CoupledGrouper) and not isinstance(prox, GroupMap):
        raise ConfigError(f"{where}.prox_type: {type(prox).__name__} does not act on whole coupled groups")
    if not isinstance(group.get("reg_lambda", 0.0), Tensor):  # a tensor is not read, which would wait for its device
        number(group.get("reg_lambda", 0.0), f"{where}.reg_lambda", 0)
    return GroupOptions(
        grouper,
        prox,
        whole(group.get("prox_freq", 1), f"{where}.prox_freq"),
        number(group.get("gamma_index_slope", 0.0), f"{where}.gamma_index_slope", 0),
        _schedule(group.get("min_sparsity_schedule"), prox, ramp_possible, f"{where}.min_sparsity_schedule"),
        _through_heal(group.get("prox_through_heal"), grouper, f"{where}.prox_through_heal"),
    )


def _check_collisions(group: Mapping[str, Any], where: str, others: Iterable[str], base: str) -> None:
    """Refuse options whose keys are the base optimizer's: it would read or change them."""
    others = [key for key in others if key in OPTION_KEYS and key != "gamma"]
    if not others:
        return
    texts = {key: kind for key, kind in KINDS.items() if isinstance(group.get(key), str)}
    types = [lookup(kind, type_name(group[key]), f"{where}.{key}") for key, kind in texts.items()]
    types += [one for key in KINDS if isinstance(one := group.get(key), type)]
    fields = {field.name for one in types if dataclasses.is_dataclass(one) for field in dataclasses.fields(one)}
    for key in others:
        if key in fields and key in FIELD_KEYS and OWN + key not in group:
            raise ConfigError(f"{where}.{key}: it is a key of {base} as well. Allowed: {OWN}{key}")
        if key in (*COMMON_KEYS, *RAMP_KEYS):
            raise ConfigError(f"{where}.{key}: it is a key of {base} as well; the two cannot be told apart")


def built(kind: str, spec: Any, group: Mapping[str, Any], where: str, bases: tuple[type, ...]) -> Any:
    """The grouper or map that a param group names: a short name, a dotted path, a class, or an instance."""
    if isinstance(spec, bases):
        return spec
    entry = spec
    if isinstance(spec, str) or not (isinstance(spec, type) and issubclass(spec, bases)):
        entry = lookup(kind, type_name(spec), where)
    if not isinstance(entry, type) or not dataclasses.is_dataclass(entry) or issubclass(entry, CoupledGrouper):
        raise ConfigError(f"{where}: {type_name(spec)} has to be given as an instance, made for the model")
    fields = [field for field in dataclasses.fields(entry) if field.init]
    options = {field.name: group[field.name] for field in fields if field.name in group}
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    for key in required:
        if key not in options:
            raise ConfigError(f"{where.rpartition('.')[0]}.{key}: missing, but {type_name(spec)} needs it")
    if isinstance(spec, type) and entry is spec:
        return entry(**options)
    return build(kind, {"type": type_name(spec), **options}, where.rpartition(".")[0])


def type_name(spec: Any) -> str:
    """The short name of a type: the last part of a dotted path, or the name of a class or of an instance's class."""
    if isinstance(spec, str):
        return spec.rpartition(".")[2]
    return spec.__name__ if isinstance(spec, type) else type(spec).__name__


def stable_name(kind: str, spec: Any) -> str:
    """How a type is written in a state dict: its registered name, or its class's name."""
    name = type_name(spec)
    try:
        return canonical(kind, name)
    except ConfigError:
        return name


def check_keys(group: Mapping[str, Any], others: Iterable[str], where: str) -> None:
    """Refuse a key that looks like a misspelt option.

    Args:
        group: the param group.
        others: keys that belong to the base optimizer.
        where: how to call the group in messages.
    """
    known = {*OPTION_KEYS, *OWN_NAMED, *others, "params", "param_names"}
    for key in group:
        if isinstance(key, str) and key not in known:
            close = difflib.get_close_matches(key, OPTION_KEYS, n=1, cutoff=0.85)
            if close:
                raise ConfigError(f"{where}.{key}: not known; did you mean {close[0]!r}?")


def number(value: Any, where: str, least: float) -> float:
    """A finite number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{where}: {value!r} is not allowed. Allowed: a number of {least} or more")
    return float(value)


def whole(value: Any, where: str, least: int = 1) -> int:
    """A whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{where}: {value!r} is not allowed. Allowed: a whole number of {least} or more")
    return value


def _schedule(value: Any, prox: ProxMap, ramp_possible: bool, where: str) -> str:
    if value is None or value is False:
        return "one_shot"
    name = canonical("schedule", "cubic" if value is True else value, where)
    if not prox.hard or name == "one_shot":
        return "one_shot"
    if not ramp_possible:
        raise ConfigError(f"{where}: {value!r} needs a healing_start_step, where the ramp ends")
    return name


def _through_heal(value: Any, grouper: AnyGrouper, where: str) -> bool:
    if value and not isinstance(grouper, SpectralGrouper):
        raise ConfigError(f"{where}: {value!r} is for SVD groupers only, got {type(grouper).__name__}")
    return True if value is None else bool(value)
