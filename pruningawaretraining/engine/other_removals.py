"""Following a removal that another pruner of the same model has made: masks are sliced as the weights were.

Shape suffixes: ``_G`` groups, ``_S`` slots of one member, ``_D`` entries of one dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.engine.engine import Engine
from pruningawaretraining.engine.weight_rules import WeightRule
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.models.optimizer_state import left_of


def follow_removed(engine: Engine, optimizers: Sequence[torch.optim.Optimizer], ended: bool) -> None:
    """Another pruner has removed channels: every mask goes on, on what is left. It may be called twice.

    Weights inside layers that are masked stay masked. Where events are still to come, the rule decides again, as it
    does after a removal by a rule of the same config.

    Args:
        engine: of the pruner that has removed nothing.
        optimizers: of the model.
        ended: whether its training is over.
    """
    if engine.coupled is not None:
        _follow_coupled(engine.coupled)
    for one in () if engine.weights is None else engine.weights.rules:
        if one.masks.active and (ended or not one.works):
            _follow_weights(one)
    if ended and engine.weights is not None:
        engine.weights.relabel()
    engine.after_removal(optimizers)


def _follow_coupled(coupled: CoupledGroups) -> None:
    """Let groups that can be removed follow, unless only a part of one has gone: the next look at the weights names
    its layer then."""
    alive_G = _alive(coupled.found.grouping)
    if alive_G is None:
        return
    if not bool(alive_G.all()):
        coupled.keep_D[coupled.live_D[~alive_G]] = False
    if any(left_of(one.parameter)[0] is not one.parameter for one in coupled.found.grouping.members):
        coupled.masks.clear()
        coupled.follow_removal(alive_G)
    keep_G = coupled.keep_D[coupled.live_D]
    if not torch.equal(coupled.masks.keep_G.cpu(), keep_G.cpu()):
        coupled.masks.set(keep_G)


def _alive(grouping: Grouping) -> Tensor | None:
    """The groups that are still there; None if only a part of one has gone."""
    gone_G1, stays_G1 = (torch.zeros(grouping.size + 1, dtype=torch.bool) for _ in range(2))
    for member in grouping.members:
        left, kept = left_of(member.parameter)
        dim = next((index for index, label in enumerate(member.labels) if label is not None), None)
        if member.role == "buffer" or member.slots is None or dim is None:
            continue
        stays_D = torch.full((len(member.slots),), left is not None and dim not in kept)
        if left is not None and dim in kept:
            stays_D[kept[dim].cpu()] = True
        slots = member.slots.cpu()
        gone_G1[slots[~stays_D]], stays_G1[slots[stays_D]] = True, True
    return None if bool((gone_G1 & stays_G1)[:-1].any()) else ~gone_G1[:-1]


def _follow_weights(one: WeightRule) -> None:
    """Slice the masks of a rule whose events are over."""
    if all(left_of(each.parameter)[0] is each.parameter for each in one.grouping.members):
        return
    before, (grouping, old_G) = one.masks, sliced(one.grouping)
    if grouping.members:
        after = Masks(grouping, dynamic=before.dynamic, followers=before.followers)
        after.steps, after.passing = before.steps, before.passing
        if before.store is None:
            after.store = None
        after.set(before.keep_G[old_G.to(before.keep_G.device)])
        one.grouping, one.masks = grouping, after
    before.clear()


def sliced(grouping: Grouping) -> tuple[Grouping, Tensor]:
    """The groups inside layers that are left after removals, on the tensors that are left; and their numbers before.

    Args:
        grouping: groups whose members have consecutive slots.
    """
    members, old_of = list[Member](), [torch.zeros(0, dtype=torch.int64)]
    size = 0
    for member in grouping.members:
        left, kept = left_of(member.parameter)
        if left is None:
            continue
        old_S = torch.arange(member.offset, member.offset + member.n_slots).view(member.sizes)
        labels, sizes = list(member.labels), list(member.sizes)
        for dim, indices in kept.items():
            if (label := labels[dim]) is None:
                continue
            here = label[indices.to(label.device)]
            known = torch.unique(here[here < sizes[dim]])
            old_S = old_S.index_select(dim, known.cpu())
            labels[dim] = torch.where(here < sizes[dim], torch.searchsorted(known, here), len(known))
            sizes[dim] = len(known)
        members.append(replace(member, parameter=left, labels=tuple(labels), sizes=tuple(sizes), offset=size))
        old_of.append(old_S.flatten())
        size += members[-1].n_slots
    old_G = torch.cat(old_of)
    bounds = [torch.searchsorted(old_G, torch.tensor([one.start, one.stop])).tolist() for one in grouping.sets]
    sets = tuple(replace(one, start=a, stop=b) for one, (a, b) in zip(grouping.sets, bounds, strict=True) if a < b)
    return replace(grouping, members=tuple(members), sets=sets, _cache={}), old_G
