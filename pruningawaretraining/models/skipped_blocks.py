"""Replacements for removed blocks, and bypass hooks for masked ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.distributed.collectives import world_size
from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.surgery import Surgery


@dataclass(frozen=True)
class Block:
    """A block that is a group.

    Args:
        group: its number (the number of groups for none).
        outputs: how many things it hands on in a tuple, of which the first is the tensor; 0 for the tensor alone.
    """

    group: int
    outputs: int = 0


def input_of(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor that a block is given.

    Raises:
        ModelError: the block is given no tensor.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise ModelError("block: it is given no tensor to hand on. Allowed: a call with a tensor among its arguments")


def handed_on(x: Tensor, outputs: int) -> Any:
    """A block's input in the form of its output."""
    return (x, *([None] * (outputs - 1))) if outputs else x


class PassThrough(nn.Module):
    """Replacement of a removed block: returns its input, and accepts the block's arguments.

    Args:
        outputs: see :class:`Block`.
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
        """See :class:`Block`."""
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
        outputs: see :class:`Block`.
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
    """The blocks that hand on their input, removed or masked, each with its ``outputs``; see :class:`Block`."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, PassThrough):
            found[name] = module.outputs
        for hook in module._forward_hooks.values():
            if isinstance(hook, Bypass):
                found[name] = hook.outputs
    return found


def remove_blocks(model: nn.Module, gone: Mapping[str, Block], surgery: Surgery) -> list[nn.Parameter]:
    """Put a :class:`PassThrough` wherever the model has one of these blocks.

    Args:
        model: the model.
        gone: the blocks by name.
        surgery: remembers the changes.

    Returns:
        The parameters that the model no longer has.
    """
    modules, lost = dict(model.named_modules()), []
    for name, block in gone.items():
        lost += list(modules[name].parameters())
        pass_through(model, modules[name], block.outputs, surgery)
    return lost


def pass_through(model: nn.Module, module: nn.Module, outputs: int, surgery: Surgery) -> None:
    """Put a :class:`PassThrough` wherever the model has this block."""
    made = PassThrough.of(module, outputs)
    for owner in list(model.modules()):
        for attribute, child in list(owner._modules.items()):
            if child is module:
                surgery.set_attribute(owner, attribute, made)
