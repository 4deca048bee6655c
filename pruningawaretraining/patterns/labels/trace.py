"""Follows the channels of a model through one forward pass; see :mod:`pruningawaretraining.patterns.labels`."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.models.calling import ForwardFn, beside, checked_call, spelled_out, tensors_of
from pruningawaretraining.models.kept_hooks import without_saved
from pruningawaretraining.models.kept_reductions import plain_reductions
from pruningawaretraining.patterns.attention import attention_blocks
from pruningawaretraining.patterns.coupling import TRACE_LIMIT, Deadline, DependencyMap
from pruningawaretraining.patterns.labels import arithmetic, pieces, products, views  # noqa: F401  (rules)
from pruningawaretraining.patterns.labels.build import Builder, is_layer
from pruningawaretraining.patterns.labels.flow import Flow
from pruningawaretraining.patterns.labels.follower import Follower, followed
from pruningawaretraining.patterns.labels.idle import follow_idle
from pruningawaretraining.patterns.labels.slots import Slots
from pruningawaretraining.patterns.labels.stated import tie_stated
from pruningawaretraining.patterns.training_parts import mode_to_trace

OUTPUT = "an output of the model"
HEADS = "multi-head attention (prune it by heads)"


def trace(
    model: nn.Module, inputs: Any, forward_fn: ForwardFn | None = None, limit: float = TRACE_LIMIT, stated: bool = False
) -> DependencyMap:
    """Run a model once and find its coupled channels.

    The model's parameters, modes, gradients and hooks are left as they were.

    Args:
        model: the model, on any device.
        inputs: example inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        forward_fn: see :func:`pruningawaretraining.models.calling.call`.
        limit: seconds that it may take; channels that are not followed to their end by then are blocked.
        stated: let attributes follow that views state widths with; see :mod:`~.stated`.

    Raises:
        ModelError: the model rejects the inputs.
    """
    slots = Slots()
    layers = {name for name, one in model.named_modules() if is_layer(one)}
    follower = Follower(slots, tensors_by_name(model), Deadline(limit), layers, stated)
    _follow(model, inputs, forward_fn, follower)
    follow_idle(model, inputs, follower, lambda other: _follow(model, other, forward_fn, follower))
    _lock_attention(model, slots)
    _tie_recurrent(model, slots)
    if stated:
        tie_stated(model, follower)
    return Builder(model, follower).result()


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that may have channels, each once."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: one for name, one in named if one.dim() and (one.is_floating_point() or one.is_complex())}


def _follow(model: nn.Module, inputs: Any, forward_fn: ForwardFn | None, follower: Follower) -> None:
    mode = mode_to_trace(model, inputs, forward_fn)
    inputs = beside(model, inputs)
    follower.flow = Flow()
    for tensor in tensors_of(inputs):
        follower.put(tensor, ())
    written = spelled_out(model), without_saved(model), plain_reductions(model)
    with written[0], written[1], written[2], torch.no_grad(), mode(model), followed(follower, model):
        outputs = list(tensors_of(checked_call(model, inputs, forward_fn)))
    follower.returned |= follower.flow.sources(outputs, follower.tensors)
    if not any(tensor.is_floating_point() or tensor.is_complex() for tensor in outputs):
        follower.read.clear()  # nothing that could be compared
    for tensor in outputs:
        for array in follower.get(tensor):
            follower.slots.lock(array, f"reaches {OUTPUT}")


def _tie_recurrent(model: nn.Module, slots: Slots) -> None:
    """All layers and directions of a recurrent module have one width."""
    owners = {(one.name, one.dim): one for one in slots.owners}
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            prefix = f"{name}." if name else ""
            keys = [f"{prefix}{key}" for key in module._parameters if key.startswith("weight_hh")]
            states = [owners[key, 1] for key in keys if (key, 1) in owners]
            for one in states[1:]:
                slots.join(states[0].slots, one.slots)
            if getattr(module, "proj_size", 0) and states:
                slots.lock(states[0].slots, f"reaches a projection of the states of {name}")


def _lock_attention(model: nn.Module, slots: Slots) -> None:
    """Heads are groups of their own; channels within them stay."""
    held = {part.name: part for block in attention_blocks(model)[0] for part in block.parts}
    for owner in slots.owners:
        part = held.get(owner.name)
        if part is not None and part.dim % owner.tensor.dim() == owner.dim:
            slots.lock(owner.slots, f"reaches {HEADS} at {owner.name.rpartition('.')[0]}")
    multi = {name for name, one in model.named_modules() if isinstance(one, nn.MultiheadAttention)}
    for owner in slots.owners:
        layer = owner.name.rpartition(".")[0].removesuffix(".out_proj")
        if layer in multi:
            slots.lock(owner.slots, f"reaches {HEADS} at {layer}")
