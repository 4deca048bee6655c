"""Hooks of masks: on the gradients of masked weights, and of modules that know what is masked.

Shape suffixes: ``_G`` groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.groups.attachment import MaskHooks

WATCHED = 8
"""Most parameters of which it is noticed that something writes them between steps."""


def hook_all(
    parameters: Sequence[Tensor], hook: Callable[[Tensor], None], handles: list[RemovableHandle]
) -> list[Tensor]:
    """Hook parameters; a few of them are returned.

    Args:
        parameters: with masked entries.
        hook: is called whenever a gradient has been accumulated.
        handles: get those of the hooks one by one, so that an interrupt leaves no hook that nobody knows of.
    """
    for parameter in parameters:
        handles.append(hooked(parameter, hook))
    return [one for one in parameters[:WATCHED] if not one.is_inference()]


def hooked(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call a hook whenever a gradient has been accumulated; a frozen parameter keeps it until it trains again."""
    frozen = not parameter.requires_grad
    if frozen:  # autograd takes hooks of tensors that need gradients only
        parameter.requires_grad_(True)
    try:
        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        if frozen:
            parameter.requires_grad_(False)
    return handle


def tell(hooks: Sequence[MaskHooks], before_G: Tensor, keep_G: Tensor, masked: Sequence[Tensor]) -> None:
    """Give new masks to the hooks of modules: to all of them, or to none where one fails.

    Args:
        hooks: of one model.
        before_G, keep_G: the masks that they have, and the new ones (on the CPU).
        masked: parameters with masked entries.
    """
    device = masked[0].device if masked else torch.device("cpu")
    told: list[MaskHooks] = []
    try:
        for one in hooks:
            one.mask(keep_G, device)
            told.append(one)
    except BaseException:
        for one in told:
            one.mask(before_G.cpu(), device)
        raise
