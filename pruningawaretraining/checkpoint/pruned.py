"""Save a pruned model, and load it into a freshly built dense one.

The file is safetensors: plain tensors and a JSON description (widths, groups, attributes of every layer), so nothing in
it is executed, and shapes alone never have to be guessed from.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pruningawaretraining.distributed.fsdp import any_sharded
from pruningawaretraining.errors import CheckpointError, nearest
from pruningawaretraining.models.calling import unwrap
from pruningawaretraining.models.fake_quant import is_converted
from pruningawaretraining.models.pruned_attention import with_fewer_heads
from pruningawaretraining.models.skipped_blocks import PassThrough, pass_through, passed_blocks
from pruningawaretraining.models.surgery import Surgery, successor
from pruningawaretraining.patterns.attention import HEADS, KEY_VALUE_HEADS, REPETITIONS, WIDTHS
from pruningawaretraining.version import __version__

log = logging.getLogger(__name__)

KEY = "pruningawaretraining"
ATTRIBUTES = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels",
    "normalized_shape", "num_parameters", "embedding_dim", "embed_dim", "head_dim", "hidden_dim", "attention_head_size",
    "hidden_size", "intermediate_size", "kdim", "vdim", "nf", "nx", *HEADS, *KEY_VALUE_HEADS, *REPETITIONS, *WIDTHS,
)  # fmt: skip
"""Attributes of layers that follow a removal."""

PYTORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")

_DESCRIBERS: WeakKeyDictionary[nn.Module, Callable[[], dict[str, Any]]] = WeakKeyDictionary()
_RECORDS: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def describe_with(model: nn.Module, describe: Callable[[], dict[str, Any]]) -> None:
    """Let a pruner say what ``save_pruned`` writes beside the tensors: plain data."""
    _DESCRIBERS[model] = describe


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """What was written beside the tensors of the file that this model was loaded from; None for any other model."""
    return _RECORDS.get(model)


def summary_of(model: nn.Module) -> dict[str, Any]:
    """What a pruner says of its model: sparsity, MACs, parameters, groups kept; or what its file said; or nothing."""
    describe = _DESCRIBERS.get(model)
    return describe() if describe is not None else dict(record_of(model) or {})


def write_atomically(path: str | Path, write: Callable[[str], None]) -> Path:
    """Write a file so that at any moment either the old one or the whole new one is there.

    Args:
        path: where to; its folder is made.
        write: writes to the temporary path that it is given.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _widths(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ATTRIBUTES:
        value = module.__dict__.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            found[name] = value
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
            found[name] = list(value)
    return found


def save_pruned(model: nn.Module, path: str | Path) -> Path:
    """Save a pruned (or masked, or dense) model as safetensors with a JSON description.

    Args:
        model: the model; wrappers (DataParallel, torch.compile) are looked through.
        path: the file; it appears whole or not at all.

    Returns:
        The path.

    Raises:
        CheckpointError: it is no model, its weights are integers already, or the path is that of a folder.
    """
    model = unwrap(_module(model))
    if any_sharded(model):
        raise CheckpointError(
            "model: fully_shard has spread its parameters. Allowed: pruner.gathered(build_model()), or save_sharded"
        )
    if Path(path).is_dir():
        raise CheckpointError(f"path: {str(path)!r} is a folder. Allowed: the path of a file")
    passed = passed_blocks(model)
    gone = tuple(f"{name}." for name in passed)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(gone)}
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
    description = {
        "version": __version__,
        "class": type(model).__qualname__,
        "modules": {
            name: _widths(one) for name, one in model.named_modules() if not name.startswith(gone) and _widths(one)
        },
        "aliases": aliases,
        "passed": passed,
        "record": summary_of(model),
    }
    metadata = {KEY: json.dumps(description), "format": "pt"}
    return write_atomically(path, lambda temporary: _save(tensors, temporary, metadata))


def _save(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
    """safetensors' own writer, but equal contents give equal bytes: it leaves the order of the metadata to chance."""
    save_file(tensors, path, metadata)
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(written) <= size:
            file.seek(8)
            file.write(written.ljust(size))


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"model: {type(model).__name__} is no model. Allowed: an nn.Module")
    return model


def read_description(path: str | Path) -> dict[str, Any]:
    """The JSON description in a file of :func:`save_pruned`.

    Raises:
        CheckpointError: there is no such file, it is truncated, or it is not one of ours.
    """
    return _read(Path(path))[1]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"path: there is no file {str(path)!r}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        if path.suffix in PYTORCH_SUFFIXES:
            raise CheckpointError(
                f"path: {str(path)!r} was not written by save_pruned; for a state dict of torch.save use "
                "load_state_dict_pruned(model, torch.load(path, weights_only=True))"
            ) from error
        raise CheckpointError(f"path: {str(path)!r} is truncated or no safetensors file: {error}") from error
    if KEY not in metadata:
        raise CheckpointError(f"path: {str(path)!r} was not written by save_pruned; use load_state_dict_pruned for it")
    try:
        description = json.loads(metadata[KEY])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"path: the description in {str(path)!r} is damaged: {error}") from error
    try:
        tensors.update({alias: tensors[name] for alias, name in description["aliases"].items()})
        for attributes in description["modules"].values():
            if not attributes.keys() <= set(ATTRIBUTES) or not all(map(_is_width, attributes.values())):
                raise ValueError(f"{attributes} are no widths")
        if not all(isinstance(one, int) for one in description.setdefault("passed", {}).values()):
            raise ValueError(f"{description['passed']} are no blocks")
        description["record"].keys()
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"path: the description in {str(path)!r} is damaged: {reason}") from error
    return tensors, description


def _is_width(value: Any) -> bool:
    """Whether a value of a description is one number, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, int) and not isinstance(one, bool) for one in values)


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
    tensors, description = _read(Path(path))
    surgery = Surgery()
    try:
        _take_out_blocks(model, description["passed"], surgery)
        _check_names(model, tensors)
        _put_tensors(model, tensors, surgery)
        _put_widths(model, description["modules"], surgery)
    except CheckpointError:
        surgery.undo()
        raise
    except (AttributeError, TypeError, KeyError, RuntimeError) as error:
        surgery.undo()
        raise CheckpointError(f"path: {str(path)!r} does not fit {type(model).__name__}: {error}") from error
    _RECORDS[model] = description["record"]
    return wrapped


def _take_out_blocks(model: nn.Module, passed: dict[str, int], surgery: Surgery) -> None:
    """Let blocks that are gone in the file hand on their input; those of a model that lacks them already stay so."""
    modules = dict(model.named_modules())
    for name, outputs in passed.items():
        if name not in modules:
            raise CheckpointError(f"model: {type(model).__name__} has no block {name!r}; the file says it was removed")
        if not isinstance(modules[name], PassThrough):
            pass_through(model, modules[name], outputs, surgery)


def _check_names(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
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


def _laid_out_like(old: Tensor, new: Tensor) -> Tensor:
    """A copy in the memory format of the tensor that it takes the place of."""
    channels_last = old.dim() == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last)
    return new.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _put_widths(model: nn.Module, widths: dict[str, dict[str, Any]], surgery: Surgery) -> None:
    modules = dict(model.named_modules())
    for name, attributes in widths.items():
        module = modules[name]
        if attributes.get("num_heads", 0) != getattr(module, "num_heads", 0):
            modules[name] = with_fewer_heads(model, module, surgery)
        for attribute, value in attributes.items():
            old = getattr(modules[name], attribute)
            new = type(old)(value) if isinstance(old, (list, tuple)) else value
            if new != old:
                surgery.set_attribute(modules[name], attribute, new)


def same_outputs(first: list[Tensor], second: list[Tensor]) -> float:
    """Largest absolute difference between two lists of outputs, infinite when shapes differ."""
    if len(first) != len(second) or any(a.shape != b.shape for a, b in zip(first, second, strict=True)):
        return float("inf")
    with torch.no_grad():
        return max((float((a - b).abs().max()) for a, b in zip(first, second, strict=True) if a.numel()), default=0.0)
