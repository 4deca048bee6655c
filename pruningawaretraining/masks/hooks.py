"""Hooks on the gradients of masked weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.hooks import RemovableHandle


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
