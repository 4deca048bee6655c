"""Moving averages and wrappers that the pruner was not given, found where the training loop keeps them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining.distributed.collectives import world_size
from pruningawaretraining.distributed.fsdp import is_sharded
from pruningawaretraining.masks.averages import HOLDERS, is_alike
from pruningawaretraining.models.calling import unwrap
from pruningawaretraining.models.private import private_of
from pruningawaretraining.session.averages import FOLLOWS

logger = logging.getLogger(__name__)

UPDATES = ("update_parameters", "update")
"""Methods of averages: AveragedModel's, and those of timm, ultralytics and others."""
NEAR = 0.3
"""Least cosine between a weight and its average."""
PACKAGE = __name__.partition(".")[0]


def forgotten_averages(model: nn.Module, known: Sequence[nn.Module]) -> list[Any]:
    """Return the average of a model among the variables of the functions that are being called, and among the
    attributes of their objects (``trainer.ema``). They are only read.

    Averages that follow another pruner's model, and those whose weights are not like the model's, are of other models;
    where several are left, none is taken.

    Args:
        model: the model.
        known: averages that follow it already.
    """
    found: dict[int, Any] = {}
    for one in _variables():
        if id(one) not in found and _is_average(one, model, known):
            found[id(one)] = one
    kinds = ", ".join(type(one).__name__ for one in found.values())
    if len(found) > 1:
        logger.warning("ema: %s look like averages of the model, and none follows it. Give the right one as ema", kinds)
        return []
    if found:
        logger.warning("ema: %s is an average of the model and follows it from here on; give it as ema=", kinds)
    return list(found.values())


def wrappers_around(model: nn.Module) -> list[nn.Module]:
    """Return the DistributedDataParallel wrappers of a model among the same variables: those of a script that wraps the
    model before it makes the pruner were made before anybody noticed.

    Args:
        model: without wrappers.
    """
    if world_size() == 1:
        return []
    wrappers = {id(one): one for one in _variables() if isinstance(one, DistributedDataParallel)}
    return [one for one in wrappers.values() if unwrap(one) is model]


def _is_average(one: Any, model: nn.Module, known: Sequence[nn.Module]) -> bool:
    if not any(callable(getattr(type(one), name, None)) for name in UPDATES):
        return False
    held = _attributes(one)
    inside = [{**held.get("_modules", {}), **held}.get(name) for name in HOLDERS]
    modules = [found for found in inside if isinstance(found, nn.Module)]
    if any(module is other for module in (one, *modules) for other in (model, *known)):
        return False
    if any(private_of(module, FOLLOWS) for module in (one, *modules) if isinstance(module, nn.Module)):
        return False
    return any(is_alike(module, model) and _is_near(module, model) for module in modules)


@torch.no_grad()
def _is_near(module: nn.Module, model: nn.Module) -> bool:
    """Whether the largest weight of a module points the way that the model's does: another model's does not."""
    name, weight_W = max(model.named_parameters(), key=lambda pair: pair[1].numel())
    other_W = module.get_parameter(name)
    if weight_W.is_meta or other_W.is_meta or is_sharded(weight_W) or is_sharded(other_W):
        return True
    one, other = weight_W.detach().flatten().double().cpu(), other_W.detach().flatten().double().cpu()
    return bool(torch.dot(one, other) >= NEAR * one.norm() * other.norm())


def _variables() -> Iterator[Any]:
    """Variables of the calling functions and of their modules, those of this package left out, and attributes of
    objects among them."""
    frame: FrameType | None = inspect.currentframe()
    seen: set[int] = set()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] != PACKAGE:
            for scope in (frame.f_locals, frame.f_globals):
                yield from _reached(scope, seen)
        frame = frame.f_back


def _reached(scope: Mapping[str, Any], seen: set[int]) -> Iterator[Any]:
    for one in list(scope.values()):
        if id(one) not in seen and not issubclass(type(one), (ModuleType, type)):
            seen.add(id(one))
            yield one
            yield from list(_attributes(one).values())


def _attributes(one: Any) -> dict[str, Any]:
    """The attributes in an object's own dictionary: no property, ``__getattr__`` or proxy is called."""
    try:
        held = object.__getattribute__(one, "__dict__")
    except AttributeError:
        return {}
    return held if type(held) is dict else {}
