"""Replacements for removed blocks, and bypass hooks for masked ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.distributed.collectives import world_size
from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.compiling import forget_compiled
from pruningawaretraining.models.surgery import Surgery


def input_of(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor that a block is given.

    Raises:
        ModelError: the block is given no tensor.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise ModelError(
        "block: it has no tensor argument to pass through. Allowed: a call with a tensor among its arguments"
    )


def handed_on(x: Tensor, outputs: int) -> Any:
    """A block's input in the form of its output."""
    return (x, *([None] * (outputs - 1))) if outputs else x


class PassThrough(nn.Module):
    """Replacement of a removed block: returns its input, and accepts the block's arguments.

    Args:
        outputs: how many things the block hands on in a tuple, of which the first is the tensor; 0 for a tensor alone.
    """

    def __init__(self, outputs: int = 0) -> None:
        super().__init__()
        self._outputs = outputs

    @classmethod
    def of(cls, module: nn.Module, outputs: int = 0) -> PassThrough:
        """In the place of a block; it keeps the block's plain attributes, which outer code may read."""
        made = cls(outputs)
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, (str, int, float, bool)):
                setattr(made, name, value)
        return made

    @property
    def outputs(self) -> int:
        """How many things it hands on in a tuple; 0 for a tensor alone."""
        return self._outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor among the arguments, in the form of the block's output."""
        return handed_on(input_of(args, kwargs), self._outputs)

    def extra_repr(self) -> str:
        return f"outputs={self._outputs}" if self._outputs else ""


class Bypass:
    """Forward hook of a masked block: returns its input, as the model without it does.

    Zero weights alone would not do: a norm behind the residual sum still works on what it is given.

    Args:
        outputs: see :class:`PassThrough`.
    """

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output in place of the module's own."""
        x = input_of(args, kwargs)
        made = output[0] if self.outputs else output
        if torch.is_grad_enabled() and made.requires_grad and world_size() > 1:
            x = x + (0.0 * made).to(x.dtype)  # DistributedDataParallel waits for a gradient of every parameter
        return handed_on(x, self.outputs)


def passed_blocks(model: nn.Module) -> dict[str, int]:
    """The blocks that hand on their input, removed or masked, each with its ``outputs``; see :class:`PassThrough`."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, PassThrough):
            found[name] = module.outputs
        for hook in module._forward_hooks.values():
            if isinstance(hook, Bypass):
                found[name] = hook.outputs
    return found


class BlockHooks:
    """A residual block that is masked hands on its input.

    Args:
        model: the model.
        masked: masks -> the blocks that are masked, each with its ``outputs``.
    """

    def __init__(self, model: nn.Module, masked: Callable[[Tensor], Mapping[str, int]]) -> None:
        self.model, self.masked = model, masked
        self._handles: dict[str, RemovableHandle] = {}

    def mask(self, keep_G: Tensor, device: torch.device) -> None:
        """Take new masks (on the CPU)."""
        masked = self.masked(keep_G)
        if masked.keys() == self._handles.keys():
            return
        for name in self._handles.keys() - masked.keys():
            self._handles.pop(name).remove()
        modules = dict(self.model.named_modules())
        for name in masked.keys() - self._handles.keys():
            self._handles[name] = modules[name].register_forward_hook(Bypass(masked[name]), with_kwargs=True)
        forget_compiled(self.model)

    def release(self) -> None:
        """Take every hook out; none is left once nothing is masked."""


def remove_blocks(model: nn.Module, gone: Mapping[str, int], surgery: Surgery) -> list[nn.Parameter]:
    """Put a :class:`PassThrough` wherever the model has one of these blocks.

    Args:
        model: the model.
        gone: the blocks by name, each with its ``outputs``.
        surgery: remembers the changes.

    Returns:
        The parameters that the model no longer has.
    """
    modules, lost = dict(model.named_modules()), []
    for name, outputs in gone.items():
        lost += list(modules[name].parameters())
        pass_through(model, modules[name], outputs, surgery)
    return lost


def pass_through(model: nn.Module, module: nn.Module, outputs: int, surgery: Surgery) -> None:
    """Put a :class:`PassThrough` wherever the model has this block."""
    made = PassThrough.of(module, outputs)
    for owner in list(model.modules()):
        for attribute, child in list(owner._modules.items()):
            if child is module:
                surgery.set_attribute(owner, attribute, made)
