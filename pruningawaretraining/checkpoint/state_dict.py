"""Load a plain state dict of a pruned model into the original, dense class, by the shapes of its tensors alone."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.checkpoint.records import own_state
from pruningawaretraining.checkpoint.widths_from_shapes import Layer, read_widths
from pruningawaretraining.errors import CheckpointError, nearest
from pruningawaretraining.files import BROKEN
from pruningawaretraining.models.surgery import Surgery, successor
from pruningawaretraining.models.trial import Trial

logger = logging.getLogger(__name__)

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names that DataParallel, torch.compile, FSDP and activation checkpointing put into the names of tensors."""

Slots = dict[str, tuple[nn.Module, str]]  # name of a tensor -> the module and attribute that hold it


def load_state_dict_pruned(
    model: nn.Module, weights: Mapping[str, Any], *, example_inputs: Any = None
) -> tuple[nn.Module, list[str], list[str]]:
    """Load the state dict of a pruned model into a freshly built dense one.

    Layers whose tensors have other shapes are given those shapes, in place: the model keeps its dtypes, devices, memory
    formats, train or eval modes, ``requires_grad``, hooks and tied weights. Make the optimizer after this call: a
    parameter of another shape is a new object.

    Args:
        model: a model of the class that was pruned, as it was built before pruning; wrapped or not.
        weights: tensors by name, as ``state_dict()`` gave them. Prefixes by DataParallel, torch.compile and FSDP
            (``module.``, ``_orig_mod.``) are ignored, here and in the model.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs, on which the model is run
            before and after. Without it shapes alone are tried, on inputs that are guessed from the model; what takes
            none of them is loaded with a warning.

    Returns:
        The same model, the model's tensors that the weights do not have, and names that the model does not have.

    Raises:
        CheckpointError: not a state dict, another architecture, shapes that can be read in more than one way (then
            ``load_pruned`` knows the answer), or a model that ran and no longer does; the model is untouched.
        ModelError: the dense model does not run with the example inputs.
    """
    _check_weights(weights)
    slots, trial = dict(_slots(model)), Trial(model, example_inputs)
    renamed, unexpected = _match(model, slots, weights)
    _share_with_aliases(slots, renamed)
    changed = _changed_shapes(slots, renamed)
    missing, unknown = _load(model, slots, renamed, changed, trial)
    if changed and not trial.runs:
        logger.warning(
            "weights: whether %s runs with its new shapes was not tried, since its inputs cannot be guessed. To try: "
            "load_state_dict_pruned(model, weights, example_inputs=...)",
            type(model).__name__,
        )
    return model, sorted(missing), sorted({*unexpected, *unknown})


def _load(
    model: nn.Module, slots: Slots, renamed: Mapping[str, Any], changed: Mapping[str, torch.Size], trial: Trial
) -> tuple[list[str], list[str]]:
    """Load weights under the model's names; returns what is missing and what is unknown.

    Raises:
        CheckpointError: they do not fit; the model is untouched.
    """
    backup = [(tensor, tensor.detach().clone()) for tensor in _kept_tensors(slots, renamed, changed)]
    surgery = Surgery()
    try:
        _exchange(slots, renamed, changed, surgery)
        _adapt_layers(model, changed, surgery)
        missing, unknown = model.load_state_dict(renamed, strict=False)
        _check_runs(model, missing, trial)
    except BROKEN as error:
        surgery.undo()
        with torch.no_grad():
            for tensor, values in backup:
                tensor.copy_(values)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"weights: they do not fit {type(model).__name__}: {' '.join(str(error).split())}"
        ) from error
    return missing, unknown


def _check_runs(model: nn.Module, missing: Sequence[str], trial: Trial) -> None:
    """Refuse weights with which the model does not run any more.

    Raises:
        CheckpointError: says why, and what is missing in the weights.
    """
    failure = trial.failure()
    if failure is not None:
        lack = f"; they lack {sorted(missing)[0]!r} ({len(missing)} in all)" if missing else ""
        raise CheckpointError(f"weights: {type(model).__name__} does not run with them: {failure}{lack}")


def _check_weights(weights: Mapping[str, Any]) -> None:
    if not isinstance(weights, Mapping):
        raise CheckpointError(
            f"weights: a {type(weights).__name__} is not a state dict. Allowed: a mapping from names to tensors"
        )
    for name, value in weights.items():
        if not isinstance(name, str):
            raise CheckpointError(f"weights: {name!r:.60} is not a name. Allowed: a mapping from names to tensors")
        if isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values()):
            raise CheckpointError(f"weights: {name!r} holds a mapping of tensors itself; pass weights[{name!r}]")
    if not any(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError("weights: no tensor is in it. Allowed: a mapping from names to tensors")


def _slots(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Every parameter and buffer by all of its names (a shared one has several)."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and attribute not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{attribute}" if prefix else attribute), (module, attribute)


def _canonical(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _match(model: nn.Module, slots: Slots, weights: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The weights under the model's names, and names of weights that the model does not have."""
    own = {*slots, *own_state(model)}
    times = Counter(_canonical(name) for name in own)
    by_canonical = {_canonical(name): name for name in own if times[_canonical(name)] == 1}
    renamed = {name: value for name, value in weights.items() if name in own}
    unexpected = []
    for name, value in weights.items():
        target = by_canonical.get(_canonical(name))
        if name in own:
            continue
        if target is None or target in renamed:
            unexpected.append(name)
        else:
            renamed[target] = value
    if not renamed:
        name = next(iter(weights))
        close = nearest(_canonical(name), by_canonical)
        hint = f"; did you mean {close!r}?" if close else ""
        raise CheckpointError(f"weights: none of their names is in {type(model).__name__}, {name!r} for one{hint}")
    return renamed, unexpected


def _tensor(slot: tuple[nn.Module, str]) -> Tensor:
    tensor: Tensor = getattr(slot[0], slot[1])
    return tensor


def _share_with_aliases(slots: Slots, renamed: dict[str, Any]) -> None:
    """Give every name of a shared tensor the value that came under one of them.

    Raises:
        CheckpointError: two names of one tensor have weights of different shapes.
    """
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, slot in slots.items():
        names_of[id(_tensor(slot))].append(name)
    for names in names_of.values():
        given = [name for name in names if name in renamed]
        for name in given[1:]:
            if renamed[name].shape != renamed[given[0]].shape:
                raise CheckpointError(
                    f"weights: {name!r} of shape {tuple(renamed[name].shape)} shares its tensor in the model with "
                    f"{given[0]!r}, which is of shape {tuple(renamed[given[0]].shape)}"
                )
        if given:
            renamed.update({name: renamed[given[0]] for name in names if name not in renamed})


def _changed_shapes(slots: Slots, renamed: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Names of tensors that take another shape, with the shape that they have in the dense model.

    Raises:
        CheckpointError: another number of dimensions.
    """
    changed = {}
    for name, slot in slots.items():
        old, new = _tensor(slot), renamed.get(name)
        if not isinstance(new, Tensor) or new.shape == old.shape:
            continue
        if new.dim() != old.dim() or 0 in new.shape:
            raise CheckpointError(
                f"weights: {name!r} is of shape {tuple(new.shape)} where {tuple(old.shape)} is in the model: "
                "another architecture"
            )
        changed[name] = old.shape
    return changed


def _kept_tensors(slots: Slots, renamed: Mapping[str, Any], changed: Mapping[str, Any]) -> list[Tensor]:
    found = {
        id(_tensor(slots[name])): _tensor(slots[name]) for name in renamed if name in slots and name not in changed
    }
    return list(found.values())


def _exchange(slots: Slots, renamed: Mapping[str, Any], changed: Mapping[str, Any], surgery: Surgery) -> None:
    """Allocate tensors of the new shapes, without values; shared tensors stay shared."""
    made: dict[int, Tensor] = {}
    shared = {name: _tensor(slots[name]) for name in changed}
    for name, old in shared.items():
        module, attribute = slots[name]
        if id(old) not in made:
            made[id(old)] = _empty_like(old, renamed[name].shape)
        surgery.set_attribute(module, attribute, made[id(old)])


def _empty_like(old: Tensor, shape: torch.Size) -> Tensor:
    channels_last = old.dim() == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    new = torch.empty(shape, dtype=old.dtype, device=old.device, memory_format=layout)
    return successor(old, new) if isinstance(old, nn.Parameter) else new


def _adapt_layers(model: nn.Module, changed: Mapping[str, torch.Size], surgery: Surgery) -> None:
    """Make the widths of layers agree with their tensors.

    Raises:
        CheckpointError: they can be read in more than one way, or in none.
    """
    old_shapes: dict[str, dict[str, torch.Size]] = defaultdict(dict)
    for name, shape in changed.items():
        owner, _, attribute = name.rpartition(".")
        owner, marker, parametrized = owner.partition(".parametrizations.")
        old_shapes[owner][parametrized if marker else attribute] = shape
    layers = [Layer(name, module, old_shapes.get(name, {})) for name, module in model.named_modules()]
    for layer, attributes in read_widths(layers):
        for attribute, value in attributes.items():
            if getattr(layer.module, attribute) != value:
                surgery.set_attribute(layer.module, attribute, value)
