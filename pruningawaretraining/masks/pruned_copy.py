"""Copies of a model without its masked channels, for measurements; the user's model is unchanged."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.masks.removal import remove
from pruningawaretraining.patterns.channel_groups import ChannelGroups

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def bare_copy(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """A deep copy without hooks: what they belong to is not copied with them.

    Args:
        model: on any device; neither its gradients nor its history are copied.
        device: of the copy; None for where the model is.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in _HOOKS:
            memo[id(getattr(module, name))] = OrderedDict()
    for parameter in model.parameters():
        twin = nn.Parameter(parameter.detach().to(device or parameter.device, copy=True), parameter.requires_grad)
        memo[id(parameter)] = twin
    copied = copy.deepcopy(model, memo)
    return copied if device is None else copied.to(device)


def pruned_copy(
    model: nn.Module, found: ChannelGroups, keep_G: Tensor, device: torch.device | str | None = None
) -> nn.Module:
    """A copy with only the kept groups.

    Args:
        model: the model, masked or not.
        found: its channels.
        keep_G: True for groups that stay.
        device: of the copy; None for where the model is.

    Raises:
        ModelError: nothing would be left of a layer.
    """
    copied = bare_copy(model, device)
    if not bool(keep_G.all()):
        with torch.no_grad():
            remove(copied, found.on(copied), keep_G)
    return copied
