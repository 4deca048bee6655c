"""The DistributedDataParallel wrappers around a model, noticed when they are made."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.distributed.collectives import world_size
from pruningawaretraining.distributed.ddp import outdated
from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.private import keep_private, private_of

ATTRIBUTE = "_pruning_wrappers"
REMINDER = "_pruning_reminder"
"""Where an outdated wrapper has the handle of the hook that refuses to train with it."""
_HOOKS: list[RemovableHandle] = []


def watch_wrappers(*known: nn.Module) -> None:
    """Notice every DistributedDataParallel that is made from here on, and those among ``known``.

    PyTorch calls one hook when a module becomes part of another; it changes nothing, serves all models, and stays.
    """
    if not _HOOKS:
        _HOOKS.append(register_module_module_registration_hook(_note))
    for one in known:
        wrapper = getattr(one, "_orig_mod", one)
        if isinstance(wrapper, DistributedDataParallel):
            _note(wrapper, "module", wrapper.module)


def _note(wrapper: nn.Module, name: str, child: Any) -> None:
    if name != "module" or not isinstance(wrapper, DistributedDataParallel) or not isinstance(child, nn.Module):
        return
    model = getattr(child, "_orig_mod", child)
    others = [one for one in private_of(model, ATTRIBUTE) or () if one() not in (None, wrapper)]
    keep_private(model, ATTRIBUTE, [*others, weakref.ref(wrapper)])


def wrappers_of(model: nn.Module) -> list[nn.Module]:
    """Every DistributedDataParallel around a model that was noticed, for trainers that hand none over."""
    return [] if world_size() == 1 else _noticed(model)


def _noticed(model: nn.Module) -> list[nn.Module]:
    return [one for ref in private_of(model, ATTRIBUTE) or () if (one := ref()) is not None]


def remind_of_rewrap(model: nn.Module) -> None:
    """Let the wrappers that a removal has outdated refuse to train until they are made anew.

    A hook before their forward does it, and takes itself out at the first forward of a wrapper that is up to date.

    Args:
        model: without wrappers.
    """
    for wrapper in _noticed(model):
        if outdated(wrapper) and private_of(wrapper, REMINDER) is None:
            keep_private(wrapper, REMINDER, wrapper.register_forward_pre_hook(_refuse_outdated))


def _refuse_outdated(wrapper: nn.Module, inputs: Any) -> None:
    """Hook before the forward of a wrapper."""
    handle: RemovableHandle | None = private_of(wrapper, REMINDER)
    if not outdated(wrapper):
        if handle is not None:
            handle.remove()
            keep_private(wrapper, REMINDER, None)
    elif wrapper.training and torch.is_grad_enabled():
        raise ModelError(
            "model: channels were removed, and this DistributedDataParallel still averages the gradients of the old "
            "parameters. Allowed: model = pruner.rewrap(model) after every pruner.prune(model, epoch), on every process"
        )
