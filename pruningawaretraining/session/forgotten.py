"""Moving averages and wrappers that the pruner was not given, found where the training loop keeps them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining.distributed.collectives import world_size
from pruningawaretraining.masks.averages import HOLDERS, copies_inside, is_alike, is_near
from pruningawaretraining.models.calling import unwrap
from pruningawaretraining.models.private import private_of
from pruningawaretraining.session.averages import FOLLOWS
from pruningawaretraining.session.takeover import ATTRIBUTE as PRUNER
from pruningawaretraining.session.variables import Found, attributes_of, is_a, variables

logger = logging.getLogger(__name__)

UPDATES = ("update_parameters", "update")
"""Methods of averages: AveragedModel's, and those of timm, ultralytics and others."""


def forgotten_averages(model: nn.Module, known: Sequence[nn.Module]) -> list[Any]:
    """Return the averages of a model among the variables of the functions that are being called, and in what these
    hold: attributes (``trainer.ema``), lists and dicts. They are only read.

    Averages that follow another pruner's model, and those whose weights are not like the model's, are of other models.
    Several are taken where one list or dict holds them and no other model with a pruner is at hand, else none is.

    Args:
        model: the model.
        known: averages that follow it already.
    """
    found, others = list[Found](), False
    for one in variables(model):
        if _is_average(one.value, model, known):
            found.append(one)
        others = others or (is_a(one.value, nn.Module) and private_of(one.value, PRUNER) is not None)
    kinds, paths = ", ".join(type(one.value).__name__ for one in found), ", ".join(one.path for one in found)
    together = len({id(one.holder) for one in found}) == 1 and isinstance(next(iter(found)).holder, (list, tuple, dict))
    if len(found) > 1 and (others or not together):
        logger.warning(
            "ema: %s look like averages of the model, and none follows it. Give the right one as ema=, or now: "
            "pruner.attach_ema(%s)",
            *(kinds, " or ".join(one.path for one in found)),
        )
        return []
    if found:
        text = "is an average of the model and follows" if len(found) == 1 else "are averages of the model and follow"
        given = paths if len(found) == 1 else f"[{paths}]"
        logger.warning("ema: %s %s it from here on. To say so: ema=%s", kinds, text, given)
    return [one.value for one in found]


def wrappers_around(model: nn.Module) -> list[nn.Module]:
    """Return the DistributedDataParallel wrappers of a model among the same variables: those of a script that wraps the
    model before it makes the pruner were made before anybody noticed.

    Args:
        model: without wrappers.
    """
    if world_size() == 1:
        return []
    wrappers = [one.value for one in variables(model) if is_a(one.value, DistributedDataParallel)]
    return [one for one in wrappers if unwrap(one) is model]


def _updates(one: Any) -> bool:
    """Whether an object has a method that averages have."""
    return any(callable(getattr(type(one), name, None)) for name in UPDATES)


def _is_average(one: Any, model: nn.Module, known: Sequence[nn.Module]) -> bool:
    if not _updates(one):
        return False
    held = attributes_of(one)
    inside = [{**held.get("_modules", {}), **held}.get(name) for name in HOLDERS]
    modules = [found for found in inside if isinstance(found, nn.Module)]
    copies = [copy for module in modules for copy in copies_inside(module, model).values()]
    followed = [each for each in (one, *modules, *copies) if isinstance(each, nn.Module)]
    if any(each is other for each in followed for other in (model, *known)):
        return False
    if any(private_of(each, FOLLOWS) for each in followed):
        return False
    return any(is_alike(each, model) and is_near(each, model) for each in (*modules, *copies))


Shapes = dict[str, torch.Size]


def shapes_of(model: nn.Module) -> Shapes:
    """Name -> shape of the model's parameters."""
    return {name: one.shape for name, one in model.named_parameters()}


def tell_of_tensors(model: nn.Module, before: Shapes, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Warn of lists and dicts of tensors that a removal has left behind: averages that are no modules, and lists of
    parameters that gradients are clipped by.

    Args:
        model: the model, without what was removed.
        before: the shapes of its parameters before that.
        optimizers: their own lists have followed.
    """
    followed = {id(group["params"]) for one in optimizers for group in one.param_groups}
    frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
    ordered = [list(before.values()), [shape for name, shape in before.items() if name not in frozen]]
    left = [
        one.path
        for one in variables(model)
        if id(one.value) not in followed
        and not is_a(one.holder, nn.Module)
        and not any(one.holder is known for known in optimizers)
        and (_has_shapes(one.value, before, ordered) or _is_state_of(one, before))
    ]
    if left:
        logger.warning(
            "removal: tensors in %s have the shapes that the model's parameters had. An average, or a list that "
            "gradients are clipped by, must be rebuilt in your own function: pruner.after_removal = ...",
            ", ".join(left),
        )


def _is_state_of(one: Found, before: Shapes) -> bool:
    """Whether it is a whole state dict that an object keeps and updates: others are of checkpoints."""
    if not issubclass(type(one.value), dict) or issubclass(type(one.holder), dict) or not _updates(one.holder):
        return False
    found = [(dict.get(one.value, name), shape) for name, shape in before.items()]
    return all(isinstance(value, torch.Tensor) and value.shape == shape for value, shape in found)


def _has_shapes(value: Any, before: Shapes, ordered: Sequence[list[torch.Size]]) -> bool:
    if type(value) in (dict, OrderedDict) and value and len(value) <= len(before) and before.keys() >= value.keys():
        found, expected = list(value.values()), [before[name] for name in value]
        partial = len(value) < len(ordered[1])
    elif type(value) in (list, tuple) and len(value) in {len(one) for one in ordered}:
        found, expected = list(value), next(one for one in ordered if len(one) == len(value))
        partial = False
    else:
        return False
    alike = all(is_a(one, torch.Tensor) for one in found) and [one.shape for one in found] == expected
    return alike and not partial
