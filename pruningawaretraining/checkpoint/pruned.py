"""Save a pruned model, and load it into a freshly built dense one.

The file is safetensors: plain tensors and a JSON description (widths, groups, attributes of every layer), so nothing in
it is executed, and shapes alone never have to be guessed from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.checkpoint.consistency import check_smaller, disagreements
from pruningawaretraining.checkpoint.files import ATTRIBUTES, KEY, read_file, write_file
from pruningawaretraining.checkpoint.records import own_state, remember, summary_of
from pruningawaretraining.checkpoint.standalone import write_standalone
from pruningawaretraining.distributed.fsdp import any_sharded
from pruningawaretraining.errors import CheckpointError, nearest
from pruningawaretraining.files import BROKEN, place_of, reason, write_atomically
from pruningawaretraining.models.calling import unwrap
from pruningawaretraining.models.fake_quant import is_converted
from pruningawaretraining.models.hugging_face import follow_configs
from pruningawaretraining.models.module_widths import counted_widths, set_count
from pruningawaretraining.models.pruned_attention import reads_fewer, with_fewer_heads
from pruningawaretraining.models.saved_masks import masked_modules, put_masks
from pruningawaretraining.models.skipped_blocks import PassThrough, pass_through, passed_blocks
from pruningawaretraining.models.sliced_buffers import note_sliced, sliced_buffers
from pruningawaretraining.models.surgery import Surgery, successor
from pruningawaretraining.models.trial import Trial
from pruningawaretraining.version import __version__

logger = logging.getLogger(__name__)


def _widths(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ATTRIBUTES:
        value = module.__dict__.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            found[name] = value
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
            found[name] = list(value)
    return found


def save_pruned(model: nn.Module, path: str | Path, *, standalone: bool | Callable[..., nn.Module] = False) -> Path:
    """Save a pruned (or masked, or dense) model as safetensors with a JSON description.

    Args:
        model: the model; wrappers (DataParallel, torch.compile) are looked through.
        path: the file; it appears whole or not at all.
        standalone: write a Python file of the same name beside it, whose ``build()`` makes the pruned model of its
            original class with torch alone. What made the dense model is found out (models of timm and torchvision,
            classes whose arguments are attributes), or given: a function or class that can be imported, or a
            ``functools.partial`` of one.

    Returns:
        The path.

    Raises:
        CheckpointError: not a module, quantized weights, the path of a folder, or no such Python file can be written;
            then nothing is.
    """
    model = _savable(model)
    place_of(path, kind=CheckpointError)
    record = summary_of(model)  # before its tensors are read: a pruner makes sure that it says what is there
    passed = passed_blocks(model)
    gone = tuple(f"{name}." for name in passed)
    state = {name: value for name, value in own_state(model).items() if not name.startswith(gone)}
    buffers = {name: one for name, one in sliced_buffers(model).items() if not name.startswith(gone)}
    tensors, aliases = _without_copies({**state, **buffers})
    widths = {name: _widths(one) for name, one in model.named_modules() if not name.startswith(gone)}
    description = {
        "version": __version__,
        "class": type(model).__qualname__,
        "modules": {name: found for name, found in widths.items() if found},
        "counted": {name: found for name, one in model.named_modules() if (found := counted_widths(one))},
        "aliases": aliases,
        "passed": passed,
        "masked": {name: one for name, one in masked_modules(model).items() if not f"{name}.".startswith(gone)},
        "buffers": sorted(buffers),
        "record": record,
    }
    metadata = {KEY: json.dumps(description), "format": "pt"}
    if standalone is not False:
        builder = None if standalone is True else standalone
        write_standalone(model, builder, path, aliases, lambda temporary: write_file(tensors, temporary, metadata))
    return write_atomically(path, lambda temporary: write_file(tensors, temporary, metadata))


def _savable(model: Any) -> nn.Module:
    """The model without its wrappers, if its tensors are all here."""
    inner = unwrap(_module(model))
    if any_sharded(inner):
        raise CheckpointError(
            "model: fully_shard has spread its parameters. Allowed: pruner.gathered(build_model()), or save_sharded"
        )
    return inner


def _without_copies(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state_dict, each once and on the CPU, and alias -> name of those that share memory."""
    seen: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        if is_converted(tensor):
            raise CheckpointError(
                f"model: {name!r} is quantized already ({type(tensor).__name__}). Allowed: save_pruned before it is "
                "converted, or torch.save and torch.export after"
            )
        identity = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in seen:
            aliases[name] = seen[identity]
            continue
        seen[identity] = name
        tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()  # a GPU may have no room for a second one
    return tensors, aliases


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"model: {type(model).__name__} is not a model. Allowed: an nn.Module")
    return model


def load_pruned(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a file of :func:`save_pruned` into the original, dense class.

    Args:
        model: a model of the class that was pruned, as it was built before pruning; changed in place. Its device,
            train or eval mode, ``requires_grad`` and hooks are kept.
        path: the file.

    Returns:
        The same model, with the widths and weights of the file.

    Raises:
        CheckpointError: the file is missing, truncated or foreign, or does not fit the model; the model is untouched.
    """
    wrapped, model = model, unwrap(_module(model))
    tensors, description = read_file(Path(path))
    surgery, trial, before = Surgery(), Trial(model), disagreements(model)
    try:
        _take_out_blocks(model, description["passed"], surgery)
        _check_names(model, tensors, description["buffers"])
        _put_tensors(model, tensors, surgery)
        _put_widths(model, description["modules"], surgery)
        _put_counts(model, description["counted"], surgery)
        _check_whole(model, before, trial)
        put_masks(model, description["masked"], surgery)
    except CheckpointError:
        surgery.undo()
        raise
    except BROKEN as error:
        surgery.undo()
        raise CheckpointError(f"path: {str(path)!r} does not fit {type(model).__name__}: {reason(error)}") from error
    remember(model, description["record"])
    follow_configs(model)
    return wrapped


def _check_whole(model: nn.Module, before: Collection[str], trial: Trial) -> None:
    """Refuse layers whose widths are not those of their tensors (unless they never were), and a model that stops.

    Raises:
        CheckpointError: there is one; it is named.
    """
    wrong = {name: text for name, text in disagreements(model).items() if name not in before}
    if wrong:
        name, text = next(iter(wrong.items()))
        raise CheckpointError(f"path: its widths and tensors of {name or 'the model'} do not agree: {text}")
    failure = trial.failure()
    if failure is not None:
        raise CheckpointError(f"path: {type(model).__name__} does not run with the tensors of the file: {failure}")


def _take_out_blocks(model: nn.Module, passed: dict[str, int], surgery: Surgery) -> None:
    """Replace blocks that the file lacks by identities; those that the model lacks already stay so."""
    modules = dict(model.named_modules())
    for name, outputs in passed.items():
        if name not in modules:
            raise CheckpointError(f"model: {type(model).__name__} has no block {name!r}; the file says it was removed")
        if not isinstance(modules[name], PassThrough):
            pass_through(model, modules[name], outputs, surgery)


def _check_names(model: nn.Module, tensors: dict[str, Tensor], buffers: Collection[str]) -> None:
    wanted = {name: value for name, value in own_state(model).items() if isinstance(value, Tensor)}
    wanted |= {name: value for name, value in model.named_buffers(remove_duplicate=False) if name in buffers}
    missing, unexpected = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        name = (missing or unexpected)[0]
        close = nearest(name, unexpected if missing else wanted)
        hint = f"; did you mean {close!r}?" if close else ""
        side = "the file does not have" if missing else "the model does not have"
        raise CheckpointError(
            f"model: {side} {name!r}{hint} ({len(missing)} missing, {len(unexpected)} unexpected). "
            f"Build the {type(model).__name__} as it was before pruning"
        )
    for name, value in wanted.items():
        if value.dim() != tensors[name].dim():
            raise CheckpointError(
                f"model: {name!r} has {value.dim()} dimensions, in the file {tensors[name].dim()}: another architecture"
            )
        if value.is_floating_point() != tensors[name].is_floating_point():
            raise CheckpointError(f"path: {name!r} is {tensors[name].dtype} in the file and {value.dtype} in the model")
        if 0 in tensors[name].shape and 0 not in value.shape:
            raise CheckpointError(f"path: {name!r} is of shape {tuple(tensors[name].shape)} in the file: it is empty")


def _put_tensors(model: nn.Module, tensors: dict[str, Tensor], surgery: Surgery) -> None:
    made: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        slots = {**module._parameters, **module._buffers}
        for attribute, old in slots.items():
            name = f"{prefix}.{attribute}" if prefix else attribute
            if old is None or name not in tensors:
                continue
            new = _laid_out_like(old, tensors[name].to(old.device))
            if isinstance(old, nn.Parameter):
                if id(old) not in made:
                    made[id(old)] = successor(old, new)
                surgery.set_attribute(module, attribute, made[id(old)])
            else:
                surgery.set_attribute(module, attribute, new)
                note_sliced(module, attribute, surgery)


def _laid_out_like(old: Tensor, new: Tensor) -> Tensor:
    """A copy in the memory format of the tensor that it replaces."""
    channels_last = old.dim() == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last)
    return new.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _put_counts(model: nn.Module, counted: dict[str, dict[str, Any]], surgery: Surgery) -> None:
    """Attributes of users' own modules that counted channels, where the model has them and they count still."""
    modules = dict(model.named_modules())
    for name, attributes in counted.items():
        for attribute, value in attributes.items():
            old = vars(modules[name])[attribute]
            known = isinstance(old, int) or (isinstance(old, (list, tuple)) and len(old) == 1)
            if isinstance(old, bool) or not known:
                raise CheckpointError(f"model: {attribute!r} of {name!r} counts nothing; the file says it does")
            set_count(modules[name], attribute, int(value[0] if isinstance(value, list) else value), surgery)


def _put_widths(model: nn.Module, widths: dict[str, dict[str, Any]], surgery: Surgery) -> None:
    modules = dict(model.named_modules())
    for name, attributes in widths.items():
        module = modules[name]
        for attribute, value in attributes.items():
            check_smaller(name, attribute, getattr(module, attribute), value)
        if attributes.get("num_heads", 0) != getattr(module, "num_heads", 0) or reads_fewer(module):
            modules[name] = with_fewer_heads(model, module, surgery)
        for attribute, value in attributes.items():
            old = getattr(modules[name], attribute)
            new = type(old)(value) if isinstance(old, (list, tuple)) else value
            if new != old:
                surgery.set_attribute(modules[name], attribute, new)
