"""Sets of groups whose tensors all lie in one module: which of these modules fail without some of their groups.

A block of attention that states its number of heads fails by itself, whatever comes before and after it. So every such
module is called once, with the inputs that it has in the dense model, and all of them are known after one forward pass.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.masks.culprits import problem_of
from pruningawaretraining.masks.removal import remove
from pruningawaretraining.models.calling import ForwardFn, checked_call, evaluating, outputs_of
from pruningawaretraining.models.fake_quant import resting
from pruningawaretraining.patterns.channel_groups import ChannelGroups

Called = tuple[tuple[Any, ...], dict[str, Any]]


def confined_sets(grouping: Grouping) -> dict[str, int]:
    """Module -> the number of the set that has all of its tensors in it; none of these modules is in another."""
    paths: dict[int, list[list[str]]] = {}
    for member in grouping.members:
        if member.slots is not None:
            slots = member.slots.cpu()
            for number in grouping.set_ids[slots[slots < grouping.size]].unique().tolist():
                paths.setdefault(number, []).append(member.name.split(".")[:-1])
    owners = {number: ".".join(os.path.commonprefix(names)) for number, names in paths.items()}
    times = Counter(owners.values())
    alone = {owner: number for number, owner in owners.items() if owner and times[owner] == 1}
    return {owner: number for owner, number in alone.items() if not _is_within(owner, alone)}


def _is_within(name: str, others: dict[str, int]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in others for length in range(1, len(parts)))


def failing_inside(
    model: nn.Module, found: ChannelGroups, inputs: Any, forward_fn: ForwardFn | None, keep_G: Tensor
) -> dict[int, str]:
    """Sets without some groups of which a module fails on the inputs that it has in the dense model, each with why.

    Args:
        model: is as before afterwards.
        found: its groups.
        inputs, forward_fn: how to run it.
        keep_G: True for groups that stay; those of sets in more than one module stay all the same.

    Raises:
        ModelError: the inputs are rejected.
    """
    sets = confined_sets(found.grouping)
    called = _calls(model, inputs, forward_fn, sets)
    tried_G = torch.ones_like(keep_G)
    for name in called:
        one = found.grouping.sets[sets[name]]
        tried_G[one.start : one.stop] = keep_G[one.start : one.stop]
    try:
        surgery = remove(model, found, tried_G)
    except ModelError:  # a layer would lose all
        return {}
    reasons: dict[int, str] = {}
    try:
        with torch.no_grad(), evaluating(model), resting(model):
            for name, call in called.items():
                try:
                    checked_call(model.get_submodule(name), call, lambda module, given: module(*given[0], **given[1]))
                except ModelError as error:
                    reasons[sets[name]] = problem_of(error)
    finally:
        surgery.undo()
    return reasons


def _calls(model: nn.Module, inputs: Any, forward_fn: ForwardFn | None, names: dict[str, int]) -> dict[str, Called]:
    """What each of these modules is called with in a forward pass, the first time."""
    called: dict[str, Called] = {}

    def noted(name: str) -> Any:
        return lambda _module, args, kwargs: called.setdefault(name, (args, dict(kwargs))) and None

    handles = [model.get_submodule(one).register_forward_pre_hook(noted(one), with_kwargs=True) for one in names]
    try:
        with resting(model):
            outputs_of(model, inputs, forward_fn)
    finally:
        for handle in handles:
            handle.remove()
    return called
