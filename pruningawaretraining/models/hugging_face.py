"""Configs of transformers models follow a removal, so that ``from_pretrained`` alone loads the pruned model.

Nothing of transformers is imported: a model is one of its kind if it has ``save_pretrained`` and a ``config`` with
``to_dict``.
"""

from __future__ import annotations

import copy
import itertools
import logging
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pruningawaretraining.models.config_sizes import Shapes, is_uneven, several
from pruningawaretraining.models.short_lists import names_without, removed_blocks, shortened_lists

logger = logging.getLogger(__name__)

MOST = 256
"""Combinations of config values that are tried."""
Path = tuple[str, ...]
Changes = dict[Path, Any]
CANNOT = (
    "%s: its config cannot say the new sizes (%s): save_pretrained would write files that from_pretrained cannot load. "
    "Use save_pruned(model, path)"
)
EVEN = ", or a rule with widths: uniform"
GONE = "%s: %s gone, and from_pretrained would fill the removed layers with random weights. Use "
SHORTER = "shortened(model).save_pretrained(folder), or save_pruned(model, path)"
NO_SHORTER = "save_pruned(model, path): the config cannot leave these layers out (%s)"


@dataclass(frozen=True)
class Fit:
    """Changes of a config that give a model of its class the shapes of a pruned one.

    Args:
        widths, layers: path in the config -> new value, of sizes, and of what counts layers or lists them.
        reason: why no config was found; "" if one was.
        uneven: whether one size became several.
        gone: the blocks that are no longer there.
    """

    widths: Changes = field(default_factory=dict)
    layers: Changes = field(default_factory=dict)
    reason: str = ""
    uneven: bool = False
    gone: tuple[str, ...] = ()


def follow_configs(model: nn.Module, uniform: bool = False) -> None:
    """Let the config of every transformers model in a model say its sizes as they are now, or warn that it cannot.

    Args:
        model: may be one of transformers, or hold some.
        uniform: the layers of a kind were to keep equally many channels.
    """
    for _, module in configured(model):
        fit = fit_of(module)
        _set(module.config, fit.widths)
        name = type(module).__name__
        if fit.gone:
            way = NO_SHORTER % fit.reason if fit.reason else SHORTER
            logger.warning(GONE + "%s", name, _are(fit.gone), way)
        elif fit.reason:
            logger.warning(CANNOT + "%s", name, fit.reason, EVEN if fit.uneven and not uniform else "")
        if fit.widths:
            shown = ", ".join(f"{'.'.join(path)} = {value}" for path, value in fit.widths.items())
            logger.info("%s: its config says the new sizes: %s", name, shown)


def _are(gone: tuple[str, ...]) -> str:
    shown = ", ".join(gone[:4]) + (f" and {len(gone) - 4} more" if len(gone) > 4 else "")
    return f"{shown} {'is' if len(gone) == 1 else 'are'}"


def fit_of(model: nn.Module) -> Fit:
    """Find the config that says a model's sizes and layers as they are now.

    Values are tried on copies of the config, which are written and read as files are, and a model of the same class is
    built from each without memory (on the meta device), until all its tensors have the shapes of the given model.

    Args:
        model: has ``config``; nothing is changed.
    """
    config: Any = model.config
    gone = removed_blocks(model)
    now, short = _shapes(model), names_without(model, gone)
    dense = _built(type(model), config)
    if dense is None:
        return Fit(reason="no model of its class can be built from its config alone", gone=gone)
    before = _shapes(dense)
    if before == now:
        return Fit()
    if not before.keys() >= now.keys() or (before.keys() != now.keys() and not gone):
        return Fit(reason="layers are gone", gone=gone)
    pairs = {
        (old, new)
        for name, shape in now.items()
        for old, new in zip(before[name], shape, strict=True)
        if old != new
    }  # fmt: skip
    wanted = {short(name): shape for name, shape in now.items()}
    lists = shortened_lists(model, gone)
    for widths, layers in _candidates(config, pairs, {(size, len(kept)) for size, kept in lists}, _head_dim(dense)):
        layers |= _cut_lists(config, layers, lists)
        made = _built(type(model), changed(config, {**widths, **layers}))
        if made is None or _shapes(made) != wanted:
            continue
        other = _other_layers(dense, _built(type(model), changed(config, layers)), short, gone)
        if other or _has_heads_of(made, model, short):
            return Fit(widths, layers, other, gone=gone)
    uneven = is_uneven(before, now)
    sizes = ", ".join(f"{old} became {several(old, pairs)}" for old in sorted({one for one, _ in pairs}))
    return Fit(reason=sizes or "none that has fewer layers was found", uneven=uneven, gone=gone)


def _candidates(
    config: Any, pairs: set[tuple[int, int]], layer_pairs: set[tuple[int, int]], head_dim: int | None
) -> Iterator[tuple[Changes, Changes]]:
    """Combinations of new values: of sizes, and of numbers of layers."""
    found = []
    for path, value in _numbers(config):
        counts = [new for old, new in sorted(layer_pairs) if old == value and _counts_layers(path[-1])]
        options = [*counts, value] if counts else _options(path[-1], value, pairs)
        if len(options) > 1:
            found.append((path, value, options, bool(counts)))
    if head_dim is not None and getattr(config, "head_dim", None) is None:
        found.append((("head_dim",), None, [None, head_dim], False))
    for values in itertools.islice(itertools.product(*(options for _, _, options, _ in found)), MOST):
        widths: Changes = {}
        layers: Changes = {}
        for (path, before, _, of_layers), value in zip(found, values, strict=True):
            if value != before:
                (layers if of_layers else widths)[path] = value
        if widths or layers:
            yield widths, layers


def _counts_layers(key: str) -> bool:
    return any(word in key for word in ("layer", "block", "depth"))


def _cut_lists(config: Any, layers: Changes, lists: list[tuple[int, tuple[int, ...]]]) -> Changes:
    """Lists with an entry for each layer, beside a number of layers that changes, without those that are gone."""
    found: Changes = {}
    for path, left in layers.items():
        owner = _owner(config, path)
        size = getattr(owner, path[-1])
        kept = next(kept for entries, kept in lists if (entries, len(kept)) == (size, left))
        for key, value in vars(owner).items():
            if isinstance(value, (list, tuple)) and len(value) == size and not key.startswith("_"):
                found[(*path[:-1], key)] = type(value)(value[number] for number in kept)
    return found


def _other_layers(dense: nn.Module, made: nn.Module | None, short: Any, gone: tuple[str, ...]) -> str:
    """Why the layers that are left would not be what they were, if they differ by where they stand; else ""."""
    if made is None:
        return "it cannot have fewer layers of the old sizes"
    modules = dict(made.named_modules())
    for name, module in dense.named_modules():
        if short(name) not in modules or name == short(name) or name.startswith(tuple(f"{one}." for one in gone)):
            continue
        other = vars(modules[short(name)])
        for key, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str)) and not any(word in key for word in UNLIKE)
            if plain and other.get(key) != value:
                return f"{name} has {key} = {value!r}, and as {short(name)} it would have {other.get(key)!r}"
    return ""


UNLIKE = ("idx", "index", "layer_id", "layer_number", "drop")
"""Attributes that may differ with the place of a layer: its number, and drop paths, which only training has."""


def _head_dim(dense: nn.Module) -> int | None:
    """The width of a head where all blocks that have ``head_dim`` agree on it; None otherwise."""
    widths = {vars(one)["head_dim"] for one in dense.modules() if isinstance(vars(one).get("head_dim"), int)}
    return widths.pop() if len(widths) == 1 else None


def _has_heads_of(made: nn.Module, model: nn.Module, short: Any) -> bool:
    """Whether heads are split and scaled as in a model: tensors of the same shapes do not tell 3 of 8 from 6 of 4."""
    modules = dict(made.named_modules())
    for name, module in model.named_modules():
        other = vars(modules.get(short(name), module))
        for key, value in vars(module).items():
            plain = isinstance(value, (int, float)) and ("head" in key or "scal" in key)
            if plain and key in other and other[key] != value:
                return False
    return True


def configured(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The models of transformers in a model, by name, those inside another of them left out."""
    found: list[str] = []
    for name, module in model.named_modules():
        if is_configured(module) and not any(name.startswith(f"{other}." if other else "") for other in found):
            found.append(name)
            yield name, module


def sizes_that_follow(model: nn.Module, sizes: Collection[int]) -> dict[str, set[tuple[str, int]]]:
    """Numbers of a model's config -> the tensors and dimensions whose sizes follow.

    Args:
        model: of transformers.
        sizes: only numbers that are one of them are tried.
    """
    found: dict[str, set[tuple[str, int]]] = {}
    dense = _built(type(model), model.config)
    for path, value in () if dense is None else _numbers(model.config):
        made = _built(type(model), changed(model.config, {path: 2 * value})) if value and value in sizes else None
        if made is None or dense is None:
            continue
        before, after = _shapes(dense), _shapes(made)
        found[".".join(path)] = {
            (name, dim)
            for name in before.keys() & after.keys()
            for dim, size in enumerate(before[name])
            if dim < len(after[name]) and after[name][dim] != size
        }  # fmt: skip
    return found


def is_configured(module: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    return hasattr(module, "save_pretrained") and hasattr(getattr(module, "config", None), "to_dict")


def _shapes(model: nn.Module) -> Shapes:
    """Name -> shape of parameters and buffers, without a pruner's state that travels in the state dict."""
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    own = {name for name, _ in itertools.chain(*named)}
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name in own}


def _built(kind: type[nn.Module], config: Any) -> nn.Module | None:
    """A model of this kind with this config, without memory; None where it cannot be built, or the config not read."""
    try:
        with torch.device("meta"):
            return kind(type(config).from_dict(config.to_dict()))
    except _refusals() as error:  # sizes that do not go together
        logger.debug("%s with another config: %s", kind.__name__, error)
        return None


def _refusals() -> tuple[type[Exception], ...]:
    """Errors that a class raises for a config it cannot build, and a config for values that do not fit together."""
    own = getattr(sys.modules.get("huggingface_hub.errors"), "StrictDataclassError", ValueError)
    return (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, own)


def _numbers(config: Any, above: Path = ()) -> Iterator[tuple[Path, int | None]]:
    """Every whole number above 1 of a config and of the configs in it, and inner sizes that are left to the class."""
    for key, value in vars(config).items():
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield (*above, key), value
        elif value is None and "inner" in key:
            yield (*above, key), None
        elif hasattr(value, "to_dict") and not above:
            yield from _numbers(value, (key,))


def _options(key: str, value: int | None, pairs: set[tuple[int, int]]) -> list[int | None]:
    """The values that a number may have now: a size like the sizes, a number of heads in proportion."""
    if value is None:
        return [None, *sorted({after for _, after in pairs})]
    if "head" in key and "dim" not in key:
        parts = {value * after // before for before, after in pairs if value * after % before == 0}
        return [*sorted({value} | {one for one in parts if one > 0}, reverse=True)]
    return [value, *sorted(after for before, after in pairs if before == value)]


def changed(config: Any, changes: Mapping[Path, Any]) -> Any:
    """A copy of a config with other values."""
    copied = copy.deepcopy(config)
    _set(copied, changes)
    return copied


def _set(config: Any, changes: Mapping[Path, Any]) -> None:
    for path, value in changes.items():
        setattr(_owner(config, path), path[-1], value)


def _owner(config: Any, path: Path) -> Any:
    for key in path[:-1]:
        config = getattr(config, key)
    return config
