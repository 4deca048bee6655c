"""Configs of transformers models follow a removal, so that ``from_pretrained`` alone loads the pruned model.

Nothing of transformers is imported: a model is one of its kind if it has ``save_pretrained`` and a ``config`` with
``to_dict``.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

MOST = 256
"""Combinations of config values that are tried."""
Shapes = Mapping[str, tuple[int, ...]]
Path = tuple[str, ...]
CANNOT = (
    "%s: its config cannot say the new sizes (%s): save_pretrained would write files that from_pretrained cannot load. "
    "Use save_pruned(model, path)%s"
)
GONE = "layers are gone"


def follow_configs(model: nn.Module) -> None:
    """Let the config of every transformers model in a model say its sizes as they are now, or warn that it cannot."""
    for module in _outermost(model):
        reason = follow_config(module)
        if reason:
            hint = "" if reason == GONE else ", or a rule with widths: uniform"  # widths say nothing of layers
            logger.warning(CANNOT, type(module).__name__, reason, hint)


def follow_config(model: nn.Module) -> str:
    """Let a model's config say its sizes as they are now.

    Values are tried on copies of the config, and a model of the same class is built from each without memory (on the
    meta device), until all its tensors have the shapes of the given model.

    Args:
        model: has ``config``, which is changed in place if a fitting one is found.

    Returns:
        "", or why no config was found.
    """
    config: Any = model.config
    wanted = _shapes(model)
    dense = _built(type(model), config)
    if dense is None or dense == wanted:
        return ""
    if dense.keys() != wanted.keys():
        return GONE
    pairs = {
        (before, after)
        for name, shape in wanted.items()
        for before, after in zip(dense[name], shape, strict=True)
        if before != after
    }
    options = [(path, value, _options(path[-1], value, pairs)) for path, value in _numbers(config)]
    open_paths = [(path, value, found) for path, value, found in options if len(found) > 1]
    for values in itertools.islice(itertools.product(*(found for _, _, found in open_paths)), MOST):
        changes = {path: now for (path, before, _), now in zip(open_paths, values, strict=True) if now != before}
        if changes and _built(type(model), _changed(config, changes)) == wanted:
            _set(config, changes)
            shown = ", ".join(f"{'.'.join(path)} = {value}" for path, value in changes.items())
            logger.info("%s: its config says the new sizes: %s", type(model).__name__, shown)
            return ""
    return ", ".join(f"{before} became {_several(before, pairs)}" for before in sorted({one for one, _ in pairs}))


def _several(before: int, pairs: set[tuple[int, int]]) -> str:
    return " and ".join(str(after) for one, after in sorted(pairs) if one == before)


def _outermost(model: nn.Module) -> Iterator[nn.Module]:
    """The models of transformers in a model, those inside another of them left out."""
    found: list[str] = []
    for name, module in model.named_modules():
        known = hasattr(module, "save_pretrained") and hasattr(getattr(module, "config", None), "to_dict")
        if known and not any(name.startswith(f"{other}." if other else "") for other in found):
            found.append(name)
            yield module


def _shapes(model: nn.Module) -> Shapes:
    """Name -> shape of parameters and buffers; a pruner's state that travels in the state dict is none of them."""
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    own = {name for name, _ in itertools.chain(*named)}
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name in own}


def _built(kind: type[nn.Module], config: Any) -> Shapes | None:
    """The shapes of a model of this kind with this config; None where it cannot be built."""
    try:
        with torch.device("meta"):
            return _shapes(kind(config))
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, ZeroDivisionError):
        return None  # sizes that do not go together, in whatever way the class says so


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


def _changed(config: Any, changes: Mapping[Path, int | None]) -> Any:
    copied = copy.deepcopy(config)
    _set(copied, changes)
    return copied


def _set(config: Any, changes: Mapping[Path, int | None]) -> None:
    for path, value in changes.items():
        owner = config
        for key in path[:-1]:
            owner = getattr(owner, key)
        setattr(owner, path[-1], value)
