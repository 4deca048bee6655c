"""Sets of groups whose tensors all lie in one module: which of these modules fail without some of their groups.

A block of attention that states its number of heads fails by itself, whatever comes before and after it. So every such
module is called once, with the inputs that it has in the dense model, and all of them are known after one forward pass.
"""

from __future__ import annotations

import os
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
Round = dict[str, int]
"""Module -> the number of a set that has all of its tensors in it; none of these modules is in another."""


def rounds_of(grouping: Grouping) -> list[Round]:
    """The sets that have all of their tensors in one module, in as few rounds as there are such sets in one of them."""
    paths: dict[int, list[list[str]]] = {}
    for member in grouping.members:
        if member.slots is not None:
            slots = member.slots.cpu()
            for number in set(grouping.set_ids[slots[slots < grouping.size]].tolist()):
                paths.setdefault(number, []).append(member.name.split(".")[:-1])
    rounds: list[tuple[Round, set[str]]] = []
    for number, names in sorted(paths.items()):
        owner = os.path.commonprefix(names)
        above = {".".join(owner[:length]) for length in range(1, len(owner) + 1)}
        name = ".".join(owner)
        if not owner:
            continue
        free = next((one for one in rounds if name not in one[1] and above.isdisjoint(one[0])), None)
        if free is None:
            rounds.append(free := ({}, set()))
        free[0][name] = number
        free[1].update(above)
    return [one for one, _ in rounds]


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
    rounds = rounds_of(found.grouping)
    called = _calls(model, inputs, forward_fn, set().union(*rounds))
    reasons: dict[int, str] = {}
    for one in rounds:
        here = {name: number for name, number in one.items() if name in called}
        tried_G = torch.ones_like(keep_G)
        for number in here.values():
            tried = found.grouping.sets[number]
            tried_G[tried.start : tried.stop] = keep_G[tried.start : tried.stop]
        try:
            surgery = remove(model, found, tried_G)
        except ModelError:  # a layer would lose all
            continue
        try:
            reasons.update(_failing(model, here, called))
        finally:
            surgery.undo()
    return reasons


def _failing(model: nn.Module, names: Round, called: dict[str, Called]) -> dict[int, str]:
    """Call modules as they were called before; the sets of those that fail."""
    reasons: dict[int, str] = {}
    with torch.no_grad(), evaluating(model), resting(model):
        for name, number in names.items():
            try:
                checked_call(
                    model.get_submodule(name), called[name], lambda module, given: module(*given[0], **given[1])
                )
            except ModelError as error:
                reasons[number] = problem_of(error)
    return reasons


def _calls(model: nn.Module, inputs: Any, forward_fn: ForwardFn | None, names: set[str]) -> dict[str, Called]:
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
