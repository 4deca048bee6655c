"""The DistributedDataParallel wrappers around a model, noticed when they are made."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.distributed.collectives import world_size
from pruningawaretraining.models.private import keep_private, private_of

ATTRIBUTE = "_pruning_wrappers"
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
    if world_size() == 1:
        return []
    return [one for ref in private_of(model, ATTRIBUTE) or () if (one := ref()) is not None]
