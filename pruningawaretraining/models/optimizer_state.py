"""State of optimizers: sliced or masked with their parameters, or cleared.

Any state tensor of a parameter's shape is followed (momenta, second moments, their maxima), or of as many numbers in
one row (Prodigy), or of that shape with a dimension summed out (Adafactor), or all parameters in one row (LBFGS). State
of any other shape is dropped with a warning: the optimizer then starts that parameter afresh.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.distributed.fsdp import is_sharded, local_of
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.models.surgery import Keep, Surgery, slice_tensor

logger = logging.getLogger(__name__)

Exchanged = Mapping[Tensor, tuple[nn.Parameter, Keep]]
"""Old parameter -> the one in its place, and what was kept of it."""
_REPLACED = "_pruning_replaced_by"
"""Attribute of a parameter that removal took out of its model: the one in its place (or None), and what was kept."""
_SHAPES = "_pruning_shapes"
"""Attribute of a parameter in whose place there were others: their shapes."""


def follow(
    optimizer: torch.optim.Optimizer, exchanged: Exchanged, surgery: Surgery, lost: Sequence[Tensor] = ()
) -> None:
    """Exchange an optimizer's parameters and slice its state.

    Args:
        optimizer: changed in place.
        exchanged: what has been sliced.
        surgery: remembers the changes.
        lost: parameters that are gone with their block; they leave their groups, and their state goes.
    """
    gone = {id(one) for one in lost}
    if isinstance(optimizer, torch.optim.LBFGS):
        _slice_row(optimizer, exchanged, surgery, gone)
    for group in optimizer.param_groups:
        for index, old in enumerate(group["params"]):
            if old in exchanged:
                surgery.set_item(group["params"], index, exchanged[old][0])
    for old, (new, keep) in exchanged.items():
        if old in optimizer.state:
            surgery.rename_key(optimizer.state, old, new, _sliced(optimizer, old, new, keep))
    if gone:
        _drop(optimizer, lost, gone, surgery)


def mark_replaced(
    optimizers: Iterable[torch.optim.Optimizer], exchanged: Exchanged, lost: Sequence[Tensor], surgery: Surgery
) -> None:
    """Let the parameters that leave a model lead to those in their place, for optimizers met later.

    A gradient is dropped if no known optimizer has its parameter: ``zero_grad`` would not reach it.
    """
    known = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
    for new, _ in exchanged.values():
        if id(new) not in known and new.grad is not None:
            surgery.set_attribute(new, "grad", None)
    for old, (new, keep) in exchanged.items():
        _mark(old, (new, keep), surgery)
    for old in lost:
        _mark(old, (None, {}), surgery)


def _mark(old: Tensor, replaced: tuple[nn.Parameter | None, Keep], surgery: Surgery) -> None:
    surgery.when_undone(lambda: vars(old).pop(_REPLACED, None))
    if replaced[0] is not None:
        setattr(replaced[0], _SHAPES, (*getattr(old, _SHAPES, ()), old.shape))
    setattr(old, _REPLACED, replaced)


def latest(parameter: Tensor) -> Tensor | None:
    """Return the parameter that is in the model after all removals, or None if it went with its block."""
    return left_of(parameter)[0]


def left_of(parameter: Tensor) -> tuple[Tensor | None, Keep]:
    """Return the parameter that is in the model after all removals (see :func:`latest`), and what it has kept."""
    current: Tensor | None = parameter
    kept: Keep = {}
    while current is not None and hasattr(current, _REPLACED):
        current, keep = getattr(current, _REPLACED)
        for dim, indices in keep.items():
            kept[dim] = kept[dim][indices] if dim in kept else indices
    return current, kept


def catch_up(optimizer: torch.optim.Optimizer) -> None:
    """Exchange the parameters, and slice the state, of an optimizer that was not known when channels were removed.

    State that fits the new parameter, from the checkpoint of a pruned model, is kept as it is.
    """
    while True:
        held = [one for group in optimizer.param_groups for one in group["params"] if hasattr(one, _REPLACED)]
        if not held:
            return
        replaced = {old: getattr(old, _REPLACED) for old in held}
        exchanged = {old: (new, keep) for old, (new, keep) in replaced.items() if new is not None}
        follow(optimizer, exchanged, Surgery(), [old for old in held if old not in exchanged])
        _check_once(optimizer)


def _check_once(optimizer: torch.optim.Optimizer) -> None:
    held = [id(one) for group in optimizer.param_groups for one in group["params"]]
    if len(set(held)) < len(held):
        raise ConfigError(
            f"optimizer: {type(optimizer).__name__} has a parameter in two groups: one of them was made from a list of "
            "before channels were removed. Allowed: add_param_group with model.parameters() as they are now"
        )


def check_fits(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse a state to be loaded that was saved before channels were removed; nothing has been loaded yet.

    Args:
        optimizer: of the model.
        state: as ``optimizer.state_dict()`` gave it.
        model: its parameters are named.

    Raises:
        CheckpointError: a tensor of the state has the shape that its parameter had before.
    """
    names = {id(one): name for name, one in model.named_parameters()}
    held = [one for group in optimizer.param_groups for one in group["params"]]
    numbers = [number for group in state.get("param_groups", ()) for number in group.get("params", ())]
    for number, one in zip(numbers, held, strict=False):
        known, before = state.get("state", {}).get(number), getattr(one, _SHAPES, ())
        for key, value in known.items() if id(one) in names and isinstance(known, Mapping) else ():
            if isinstance(value, Tensor) and value.shape in before and value.shape != one.shape:
                raise CheckpointError(
                    f"optimizer: {key} of {names[id(one)]} has the shape {tuple(value.shape)}, the parameter "
                    f"{tuple(one.shape)}: it was saved before channels were removed. Allowed: the optimizer's state "
                    "that was saved with the model as it is now"
                )


def _drop(optimizer: torch.optim.Optimizer, lost: Sequence[Tensor], gone: set[int], surgery: Surgery) -> None:
    """Drop parameters and their state; a group may be empty afterwards."""
    for group in optimizer.param_groups:
        left = [one for one in group["params"] if id(one) not in gone]
        if isinstance(optimizer, torch.optim.LBFGS) and left and group["params"][0] in optimizer.state:
            first = group["params"][0]  # under which the state of all is kept
            if id(first) in gone:
                surgery.rename_key(optimizer.state, first, left[0], optimizer.state[first])
        if len(left) < len(group["params"]):
            surgery.set_item(group["params"], slice(None), left)
    for parameter in lost:
        if parameter in optimizer.state:
            surgery.drop_key(optimizer.state, parameter)


def is_coded(value: Tensor, parameter: Tensor) -> bool:
    """Whether a state holds codes of numbers, of 8 bits or in a form of its own: 0 is a code like any other there."""
    plain = type(value) in (Tensor, nn.Parameter, type(parameter.detach())) or is_sharded(value)
    return not plain or value.dtype in (torch.uint8, torch.int8)


def _sliced(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor, keep: Keep) -> dict[str, Any]:
    state = optimizer.state[old]
    if isinstance(optimizer, torch.optim.LBFGS) or any(
        getattr(one, "shape", None) == new.shape for one in state.values()
    ):
        return dict(state)
    try:
        return {key: _slice_state(key, value, old, keep) for key, value in state.items()}
    except _UnknownShape as error:
        logger.warning(
            "%s: its state %s cannot be sliced with a parameter of shape %s; the parameter starts afresh",
            type(optimizer).__name__, error, tuple(old.shape),
        )  # fmt: skip
        return {}


class _UnknownShape(Exception):
    """A state tensor that cannot be sliced."""


def _slice_state(key: str, value: Any, parameter: Tensor, keep: Keep) -> Any:
    """Slice one entry of a parameter's state: of its shape, or of its shape with one dimension summed out."""
    if isinstance(value, (list, tuple)):
        return type(value)(_slice_state(key, item, parameter, keep) for item in value)
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    if is_coded(value, parameter):
        raise _UnknownShape(f"{key!r} of codes ({value.dtype})")
    shape = list(parameter.shape)
    if list(value.shape) == shape:
        return slice_tensor(value, keep)
    if list(value.shape) == [parameter.numel()]:
        return slice_tensor(value.view(shape), keep).flatten()
    if value.dim() == len(shape) and all(have in (1, want) for have, want in zip(value.shape, shape, strict=True)):
        return slice_tensor(value, {dim: indices for dim, indices in keep.items() if value.shape[dim] > 1})
    dropped = _summed_out(key, value, shape)
    if dropped is None:
        raise _UnknownShape(f"{key!r} of shape {tuple(value.shape)}")
    return slice_tensor(value, {dim - (dim > dropped): indices for dim, indices in keep.items() if dim != dropped})


def _summed_out(key: str, value: Tensor, shape: list[int]) -> int | None:
    """The dimension that a factored second moment lacks; where sizes leave a choice, rows lack the last dimension and
    columns the one before it, as in Shazeer and Stern 2018 and every implementation of it."""
    fits = [dim for dim in range(len(shape)) if list(value.shape) == shape[:dim] + shape[dim + 1 :]]
    usual = len(shape) - (2 if "col" in key else 1)
    return usual if usual in fits else (fits[-1] if fits else None)


def _slice_row(optimizer: torch.optim.LBFGS, exchanged: Exchanged, surgery: Surgery, gone: set[int]) -> None:
    """LBFGS keeps its history as rows of all parameters."""
    parameters: list[Tensor] = optimizer.param_groups[0]["params"]
    total = sum(parameter.numel() for parameter in parameters)
    parts, start = [], 0
    for parameter in parameters:
        places = torch.arange(start, start + parameter.numel()).view(parameter.shape)
        keep = exchanged[parameter][1] if parameter in exchanged else {}
        for dim, indices in keep.items():
            places = places.index_select(dim, indices.to(places.device))
        if id(parameter) not in gone:
            parts.append(places.flatten())
        start += parameter.numel()
    kept = torch.cat(parts)

    def sliced(value: Any) -> Any:
        if isinstance(value, list):
            return [sliced(item) for item in value]
        return value[kept.to(value.device)] if isinstance(value, Tensor) and value.shape == (total,) else value

    for parameter in list(optimizer.state):
        state = {key: sliced(value) for key, value in optimizer.state[parameter].items()}
        surgery.set_item(optimizer.state, parameter, state)
    surgery.set_attribute(optimizer, "_numel_cache", None)


@torch.no_grad()
def mask_state(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Sequence[Tensor], factors: Sequence[Tensor]
) -> None:
    """Set the state of masked weights to 0; factors broadcast to their parameter's shape, or to that of
    this process's part of it."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            _mask_row(optimizer, parameters, factors)
            continue
        for parameter, factor in zip(parameters, factors, strict=True):
            for value in optimizer.state.get(parameter, {}).values():
                if not isinstance(value, Tensor) or is_coded(value, parameter):
                    continue
                if value.shape == parameter.shape:
                    local_of(value).mul_(factor.to(value.device))
                elif list(value.shape) == [parameter.numel()]:
                    value.mul_(factor.to(value.device).expand(parameter.shape).flatten())


def _mask_row(optimizer: torch.optim.LBFGS, parameters: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    factor_of = {id(parameter): factor for parameter, factor in zip(parameters, factors, strict=True)}
    own: list[Tensor] = optimizer.param_groups[0]["params"]
    whole = [factor_of.get(id(one), torch.ones((), device=one.device)).expand(one.shape).flatten() for one in own]
    row = torch.cat(whole)
    for state in optimizer.state.values():
        for value in state.values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Tensor) and item.shape == row.shape:
                    item.mul_(row.to(item.device, item.dtype))


@torch.no_grad()
def clear_state(optimizer: torch.optim.Optimizer) -> None:
    """Reset the state of an optimizer to that of a new one; its parameter groups are unchanged."""
    optimizer.state.clear()
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer._numel_cache = None
    if not isinstance(optimizer, torch.optim.Adagrad):
        return
    for group in optimizer.param_groups:  # its state is made by its constructor, not by its first step
        for parameter in group["params"]:
            device = parameter.device if group["fused"] else None
            optimizer.state[parameter]["step"] = torch.zeros((), device=device)
            initial = torch.full_like(parameter, group["initial_accumulator_value"])
            optimizer.state[parameter]["sum"] = initial.detach()
