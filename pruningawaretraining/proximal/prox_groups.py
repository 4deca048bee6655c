"""Units: the param groups that take one proximal step together, and the plan they share."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import is_sharded, local_of
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.proximal.coupled import CoupledGrouper
from pruningawaretraining.proximal.element_plans import LassoPlan, RankedPlan, element_plan
from pruningawaretraining.proximal.groupers import ElemGrouper, Grouper
from pruningawaretraining.proximal.latent import ParamSlot
from pruningawaretraining.proximal.low_rank import SpectralGrouper
from pruningawaretraining.proximal.maps import (
    ElementMap,
    GroupMap,
    NMSparseConstraint,
    ProxGroupLasso,
    Scale,
    SpectralMap,
)
from pruningawaretraining.proximal.options import WATCHED_KEYS, GroupOptions, check_keys, gamma_key, read_options
from pruningawaretraining.proximal.plans import CopyPlan, NormPlan, coupled_plan, grouper_plan
from pruningawaretraining.proximal.pools import pays
from pruningawaretraining.proximal.spectral_plan import SpectralPlan
from pruningawaretraining.proximal.weight_pairs import WeightPair

Plan: TypeAlias = NormPlan | CopyPlan | LassoPlan | RankedPlan | SpectralPlan
ParamGroup: TypeAlias = dict[str, Any]


class Unit:
    """One proximal step over one param group, or over those that share a coupled grouper.

    Args:
        indices: which param groups.
        options: what they ask for.
        pool: whether small weights are worked on together; None for what is faster on their device.
    """

    def __init__(self, indices: Sequence[int], options: GroupOptions, pool: bool | None = None) -> None:
        self.indices, self.options, self.pool = tuple(indices), options, pool
        self._key: list[int] = []
        self._planned: list[ParamSlot] = []
        self._sharded = True
        self._places: list[ParamSlot] = []
        self._seen: list[tuple[list[Tensor], list[Tensor]]] = []
        self._plan: Plan | None = None

    def scale(self, groups: Sequence[ParamGroup]) -> Scale:
        """``reg_lambda * gamma`` of the first param group."""
        first = groups[self.indices[0]]
        scale: Scale = first["reg_lambda"] * first[gamma_key(first)]
        return scale

    def places(self, groups: Sequence[ParamGroup]) -> list[ParamSlot]:
        """All the weights of the unit; looked up again only when one of them has been replaced."""
        lists = [groups[number]["params"] for number in self.indices]
        same = len(self._seen) == len(lists) and all(
            params is known and len(params) == len(seen) and all(map(operator.is_, params, seen))
            for params, (known, seen) in zip(lists, self._seen, strict=True)
        )
        if not same:
            self._seen = [(params, list(params)) for params in lists]
            self._places = [
                ParamSlot(params, index, weight, weight_name(groups[number], number, index))
                for number, params in zip(self.indices, lists, strict=True)
                for index, weight in enumerate(params)
            ]
            self._sharded = any(is_sharded(place.weight) for place in self._places)
            self._plan = None
        return self._places

    def check(self, groups: Sequence[ParamGroup]) -> None:
        """Refuse weights that the grouper cannot group.

        Raises:
            ConfigError: names the weight, or what is missing from the coupled groups.
        """
        grouper, places = self.options.grouper, self.places(groups)
        if isinstance(grouper, CoupledGrouper):
            self._check_coupled(grouper, places)
            return
        for place in places:
            grouper.check(tuple(place.weight.shape), place.name)
            prox = self.options.prox
            if isinstance(prox, NMSparseConstraint) and isinstance(grouper, Grouper):
                size = grouper.group_size(tuple(place.weight.shape))
                if prox.n_nonzero > size:
                    raise ConfigError(
                        f"{place.name}: n_nonzero={prox.n_nonzero} is more than the {size} elements of a group"
                    )

    def _check_coupled(self, grouper: CoupledGrouper, places: Sequence[ParamSlot]) -> None:
        if not all(grouper.knows(place.weight) for place in places):
            grouper.refresh()
        for place in places:
            if id(place.weight) not in grouper.members and id(place.weight) not in grouper.bystanders:
                raise ConfigError(f"{place.name}: it belongs to no group of {grouper!r}; put it in a group of its own")
        given = {id(place.weight) for place in places}
        names = {id(member.parameter): member.name for member in grouper.grouping.members}
        for parameter in grouper.parameters():
            if parameter.requires_grad and id(parameter) not in given:
                raise ConfigError(
                    f"params: {names[id(parameter)]} belongs to {grouper!r}, but no param group with it has it"
                )

    def plan(self, places: Sequence[ParamSlot], sources: Sequence[Tensor]) -> Plan:
        """The plan for these weights and sources; made once, and again when a tensor has been replaced or moved."""
        tensors = [*(place.weight for place in places), *sources]
        if self._sharded:
            tensors = [local_of(tensor) for tensor in tensors]
        key = [tensor.data_ptr() for tensor in tensors]
        same = len(places) == len(self._planned) and all(map(operator.is_, places, self._planned))
        if self._plan is None or not same or key != self._key:
            self._plan, self._key, self._planned = self._make(places, sources), key, list(places)
        return self._plan

    def _make(self, places: Sequence[ParamSlot], sources: Sequence[Tensor]) -> Plan:
        options = self.options
        grouper, prox, slope = options.grouper, options.prox, options.gamma_index_slope
        parts = [WeightPair(s.detach(), p.weight.detach(), p.name) for p, s in zip(places, sources, strict=True)]
        pool = pays(parts[0].source.device) if self.pool is None else self.pool
        if isinstance(grouper, CoupledGrouper):
            assert isinstance(prox, GroupMap)
            return self._make_coupled(grouper, prox, places, parts, pool)
        if isinstance(grouper, SpectralGrouper):
            assert isinstance(prox, SpectralMap)
            return SpectralPlan(prox, grouper, parts, slope)
        if isinstance(prox, ElementMap):
            return element_plan(prox, grouper, parts, slope, pool)
        assert isinstance(prox, GroupMap)
        if isinstance(prox, ProxGroupLasso) and isinstance(grouper, ElemGrouper):
            return LassoPlan(grouper, parts, slope, pool)  # the norm of one element is its magnitude
        return grouper_plan(prox, grouper, parts, slope, pool)

    def _make_coupled(
        self,
        grouper: CoupledGrouper,
        prox: GroupMap,
        places: Sequence[ParamSlot],
        parts: Sequence[WeightPair],
        pool: bool,
    ) -> Plan:
        if not all(grouper.knows(place.weight) for place in places):
            grouper.refresh()
        members = [grouper.members.get(id(place.weight), []) for place in places]
        pairs = [(part, one) for part, found in zip(parts, members, strict=True) for one in found]
        loose = [part for part, found in zip(parts, members, strict=True) if not found]
        sets = grouper.grouping.sets
        runs = [slice(one.start, one.stop) for one in sets]
        slope = self.options.gamma_index_slope
        return coupled_plan(prox, pairs, loose, grouper.grouping.size, runs, slope, grouper.balance(), pool)


def weight_name(group: ParamGroup, number: int, index: int) -> str:
    """How to call a weight: by its name, if the optimizer was given one."""
    names = group.get("param_names")
    return str(names[index]) if names else f"param_groups[{number}].params[{index}]"


def watched(groups: Sequence[ParamGroup], others: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Options of all groups, without those that are the base optimizer's and those that may change (reg_lambda)."""
    keys = [key for key in WATCHED_KEYS if key not in others]
    return [{key: group.get(key) for key in keys} for group in groups]


def check_frozen(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> None:
    """Refuse options that have changed.

    Args:
        before, now: options of all groups, see :func:`watched`; groups may have been added.

    Raises:
        ConfigError: an option has changed; it names the group, the key and both values.
    """
    for number, (one, other) in enumerate(zip(before, now, strict=False)):
        for key, value in one.items():
            if other[key] != value:
                raise ConfigError(
                    f"param_groups[{number}].{key}: {other[key]!r} was {value!r} when the optimizer was made, and "
                    "options stay. Allowed: reg_lambda may change, a schedule (min_sparsity_schedule), or a new "
                    "PruneOptimizer"
                )


def build_units(groups: Sequence[ParamGroup], others: Sequence[str], ramp_possible: bool, base: str = "") -> list[Unit]:
    """The units of an optimizer's param groups.

    Args:
        groups: the param groups; those without a ``prox_type`` are not regularised.
        others: keys of the base optimizer.
        ramp_possible: whether there is a healing phase, where a ramp ends.
        base: name of the base optimizer, for messages.

    Raises:
        ConfigError: an option that cannot be used; it names the group and the key.
    """
    found: list[tuple[list[int], GroupOptions]] = []
    shared: dict[int, tuple[list[int], GroupOptions]] = {}
    for number, group in enumerate(groups):
        check_keys(group, others, f"param_groups[{number}]")
        if group.get("prox_type") is None:
            continue
        options = read_options(group, f"param_groups[{number}]", ramp_possible, others, base)
        entry = shared.get(id(options.grouper)) if isinstance(options.grouper, CoupledGrouper) else None
        if entry is None:
            entry = ([number], options)
            found.append(entry)
            shared[id(options.grouper)] = entry
        else:
            _check_same(groups[entry[0][0]], group, entry[0][0], number)
            entry[0].append(number)
    units = [Unit(indices, options) for indices, options in found]
    for unit in units:
        unit.check(groups)
    return units


def _check_same(first: ParamGroup, other: ParamGroup, first_number: int, number: int) -> None:
    for key in ("reg_lambda", *WATCHED_KEYS):
        if not _equal(first.get(key), other.get(key)):
            raise ConfigError(
                f"param_groups[{number}].{key}: {other.get(key)!r} differs from {first.get(key)!r} in "
                f"param_groups[{first_number}], which shares its coupled grouper"
            )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or bool(torch.equal(torch.as_tensor(a), torch.as_tensor(b)))
    return bool(a == b)
