"""Hooks that let modules know what is masked: norms over channels, and residual blocks.

Shape suffixes: ``_G`` groups, ``_G1`` groups and one more for "outside", ``_C`` channels of a norm layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.models.compiling import forget_compiled
from pruningawaretraining.models.masked_norms import KeptNorm, kept_norm_of
from pruningawaretraining.models.skipped_blocks import Block, Bypass


class NormHooks:
    """Norms that mix channels (LayerNorm, GroupNorm) compute their statistics over the kept channels.

    A hook that is there is only told of new masks, so that nothing has to be compiled again.

    Args:
        model: the model.
        norms: norm layer -> group of each channel (the number of groups for none).
    """

    def __init__(self, model: nn.Module, norms: Mapping[str, Tensor]) -> None:
        self.model, self.norms = model, dict(norms)
        self._handles: list[RemovableHandle] = []
        self._hooks: dict[str, KeptNorm] = {}

    def mask(self, keep_G: Tensor, device: torch.device) -> None:
        """See :class:`~pruningawaretraining.masks.masks.Attachment`; all norms get a hook once one needs it."""
        keep_G1 = torch.cat([keep_G, torch.ones(1, dtype=torch.bool)])
        modules = dict(self.model.named_modules())
        keep_of = {name: keep_G1[groups_C] for name, groups_C in self.norms.items() if kept_norm_of(modules[name])}
        if not self._hooks and not all(bool(keep_C.all()) for keep_C in keep_of.values()):
            for name in keep_of:
                make = kept_norm_of(modules[name])
                assert make is not None
                self._hooks[name] = hook = make(modules[name], device)
                self._handles.append(modules[name].register_forward_hook(hook))
            forget_compiled(self.model)
        for name, hook in self._hooks.items():
            hook.keep_C.copy_(keep_of[name])

    def release(self) -> None:
        """Take every hook out."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooks = [], {}


class BlockHooks:
    """A residual block that is masked hands on its input.

    Args:
        model: the model.
        blocks: residual block -> its group.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, Block]) -> None:
        self.model, self.blocks = model, dict(blocks)
        self._handles: dict[str, RemovableHandle] = {}

    def mask(self, keep_G: Tensor, device: torch.device) -> None:
        """See :class:`~pruningawaretraining.masks.masks.Attachment`."""
        masked = {name for name, one in self.blocks.items() if not bool(keep_G[one.group])}
        if masked == self._handles.keys():
            return
        for name in self._handles.keys() - masked:
            self._handles.pop(name).remove()
        modules = dict(self.model.named_modules())
        for name in masked - self._handles.keys():
            hook = Bypass(self.blocks[name].outputs)
            self._handles[name] = modules[name].register_forward_hook(hook, with_kwargs=True)
        forget_compiled(self.model)

    def release(self) -> None:
        """Take every hook out; none is left once nothing is masked."""


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
