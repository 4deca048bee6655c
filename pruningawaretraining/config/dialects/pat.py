"""Configs of the proximal optimizer: a mapping from parameters to how they are pruned, as param groups.

A key is

* a parameter's name: ``blocks.0.attn.qkv.weight``;
* a colon and a regular expression that a name matches in full: ``:.*attn\\.qkv\\.weight``;
* a module's class and the rest of the name: ``(torch.nn.Linear, "weight")``, in files ``torch.nn.Linear::weight``.
  Subclasses count, and the rest may have dots (``Block::attn.qkv.weight``).

A name goes before a regular expression, that before a class, and within each kind the first key before the later ones.
A value holds the keys of a param group, such as ``group_type``, ``prox_type`` and ``reg_lambda``.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from pruningawaretraining.config.computed_weights import why_normalised
from pruningawaretraining.config.load import find_file, read_mapping
from pruningawaretraining.errors import ConfigError, nearest
from pruningawaretraining.registry import canonical, lookup

REGEX = ":"
CLASS = "::"
COUPLED = "CoupledChannelGrouper"
Source = str | os.PathLike[str] | Mapping[Any, Mapping[str, Any]]


@dataclass(frozen=True)
class Named:
    """A parameter by its name."""

    name: str
    order = 0

    def matches(self, model: nn.Module, names: Sequence[str]) -> bool:
        """Whether it is one of the parameter's names."""
        return self.name in names


@dataclass(frozen=True)
class Matching:
    """Parameters whose name a regular expression matches in full."""

    pattern: str
    order = 1

    @cached_property
    def regex(self) -> re.Pattern[str]:
        try:
            return re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"{REGEX + self.pattern!r}: no regular expression: {error}") from error

    def matches(self, model: nn.Module, names: Sequence[str]) -> bool:
        """Whether one of the parameter's names matches."""
        return any(self.regex.fullmatch(name) for name in names)


@dataclass(frozen=True)
class OfClass:
    """Parameters of modules of a class, or of their children, by the rest of the name."""

    module: type
    suffix: str
    order = 2

    def matches(self, model: nn.Module, names: Sequence[str]) -> bool:
        """Whether one of the parameter's names is the suffix, seen from a module of the class."""
        ends = [name.removesuffix(self.suffix) for name in names if f".{name}".endswith(f".{self.suffix}")]
        return any(isinstance(model.get_submodule(owner.rstrip(".")), self.module) for owner in ends)


Key = Named | Matching | OfClass


def parse_key(key: Any) -> Key:
    """The key that a config spells as text or as a pair.

    Raises:
        ConfigError: neither form, an invalid regular expression, or a class that is not loaded.
    """
    if isinstance(key, str) and key.startswith(REGEX) and not key.startswith(CLASS):
        found = Matching(key[len(REGEX) :])
        _ = found.regex
        return found
    if isinstance(key, str) and CLASS in key:
        key = tuple(key.split(CLASS, 1))
    elif isinstance(key, str):
        return Named(key)
    if isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], str) and key[1]:
        return OfClass(_loaded_class(key[0]), key[1])
    raise ConfigError(
        f"{key!r} is not a key. Allowed: a parameter's name, ':' and a regular expression, (class, suffix)"
    )


def _loaded_class(spec: Any) -> type:
    """A class, or the one that a dotted name stands for; nothing is imported for it: a model that has a module of the
    class has imported it already."""
    if isinstance(spec, type):
        return spec
    module, _, name = str(spec).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if not isinstance(found, type):
        here = [key for key, value in vars(sys.modules.get(module, nn)).items() if isinstance(value, type)]
        close = nearest(name, here)
        hint = f"; did you mean '{module if module in sys.modules else 'torch.nn'}.{close}'?" if close else ""
        raise ConfigError(f"{spec!r}: no class of this name is loaded{hint}")
    return found


def read_config(source: Source) -> dict[Key, dict[str, Any]]:
    """The keys of a config with a copy of their options.

    Args:
        source: a mapping, or the path of a .json, .yaml or .yml file. Neither is changed.

    Raises:
        ConfigError: it cannot be read, or a key or value cannot be used.
    """
    mapping: Mapping[Any, Any]
    mapping = source if isinstance(source, Mapping) else read_mapping(find_file(Path(os.path.expanduser(source))))
    found: dict[Key, dict[str, Any]] = {}
    for key, options in mapping.items():
        if key == "$schema":
            continue
        parsed = parse_key(key)
        if not isinstance(options, Mapping):
            raise ConfigError(f"{key!r}: {options!r} is not a mapping of keys to values")
        if "params" in options:
            raise ConfigError(f"{key!r}.params: not allowed: the key says which parameters")
        if parsed in found:
            raise ConfigError(f"{key!r}: given twice")
        found[parsed] = dict(options)
    return found


def prune_param_groups(
    model: nn.Module, config: Source, *, example_inputs: Any = None, no_weight_decay: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The param groups of a model, for a base optimizer that is then wrapped in ``PruneOptimizer``.

    Args:
        model: the model.
        config: see the module's docstring; a mapping, or the path of a .json, .yaml or .yml file.
        example_inputs: for ``CoupledChannelGrouper``, which traces the model.
        no_weight_decay: last parts of parameter names ("bias") that get ``weight_decay`` 0 if no key matches them.

    Returns:
        A group for each key that got parameters, in the order of the config, then those of all the other parameters.
        Every parameter is in one group, with its name in ``param_names``.

    Raises:
        ConfigError: a key or value cannot be used, a key matches no parameter, or one that is pruned is normalised by
            its layer.
    """
    keys = read_config(config)
    names = _names(model)
    claimed = _claim(model, keys, names)
    _check_weights(model, keys, claimed, names)
    groups = [_group(options, claimed[key], names) for key, options in keys.items() if claimed[key]]
    taken = {id(parameter) for group in groups for parameter in group["params"]}
    for group in groups:
        if _is_coupled(group.get("group_type")):
            _couple(model, group, names, taken, example_inputs)
    taken = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    bare = {id(parameter) for parameter in rest if names[id(parameter)][0].rpartition(".")[2] in no_weight_decay}
    groups.append(_group({}, [parameter for parameter in rest if id(parameter) not in bare], names))
    groups.append(_group({"weight_decay": 0.0}, [parameter for parameter in rest if id(parameter) in bare], names))
    return [group for group in groups if group["params"]]


def _names(model: nn.Module) -> dict[int, list[str]]:
    """All the names of every parameter; shared ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _claim(model: nn.Module, keys: Mapping[Key, Any], names: Mapping[int, list[str]]) -> dict[Key, list[nn.Parameter]]:
    """The parameters that each key gets."""
    ordered = sorted(keys, key=lambda key: key.order)
    claimed: dict[Key, list[nn.Parameter]] = {key: [] for key in keys}
    unmatched = set(keys)
    for parameter in model.parameters():
        matching = [key for key in ordered if key.matches(model, names[id(parameter)])]
        unmatched -= set(matching)
        if matching:
            claimed[matching[0]].append(parameter)
    for key in keys:
        if key in unmatched:
            raise ConfigError(_no_match(key, [name for several in names.values() for name in several]))
    return claimed


def _check_weights(
    model: nn.Module,
    keys: Mapping[Key, Mapping[str, Any]],
    claimed: Mapping[Key, Sequence[nn.Parameter]],
    names: Mapping[int, list[str]],
) -> None:
    """Refuse to make zeros where a layer divides by their norm.

    Raises:
        ConfigError: it names the parameter.
    """
    pruned = [one for key, options in keys.items() if "prox_type" in options for one in claimed[key]]
    for name in (names[id(one)][0] for one in pruned):
        if problem := why_normalised(model, name):
            raise ConfigError(f"{name}: zeros in it would become NaN: {problem}")


def _no_match(key: Key, names: Sequence[str]) -> str:
    wanted = key.name if isinstance(key, Named) else key.suffix if isinstance(key, OfClass) else key.pattern
    close = nearest(wanted.replace("\\", ""), names)
    shown = f"{key.module.__name__}{CLASS}{key.suffix}" if isinstance(key, OfClass) else wanted
    hint = f"; did you mean {close!r}?" if close else ""
    return f"{shown!r}: no parameter matches{hint} There are {len(names)}, such as {', '.join(names[:3])}"


def _group(options: Mapping[str, Any], found: list[nn.Parameter], names: Mapping[int, list[str]]) -> dict[str, Any]:
    return {**options, **_named(found, names)}


def _named(found: list[nn.Parameter], names: Mapping[int, list[str]]) -> dict[str, Any]:
    return {"params": found, "param_names": [names[id(parameter)][0] for parameter in found]}


def _is_coupled(spec: Any) -> bool:
    if not isinstance(spec, (str, type)):
        return False
    name = spec.rpartition(".")[2] if isinstance(spec, str) else spec.__name__
    return name == COUPLED or (isinstance(spec, str) and name.lower() == COUPLED.lower())


def _couple(
    model: nn.Module, group: dict[str, Any], names: Mapping[int, list[str]], taken: set[int], example_inputs: Any
) -> None:
    """Trace the model, and put all the parameters of the coupled channels of a group's layers into the group."""
    if example_inputs is None:
        raise ConfigError(f"group_type: {COUPLED} traces the model: prune_param_groups needs example_inputs")
    mine = {id(parameter) for parameter in group["params"]}
    layers = [name.rpartition(".")[0] for parameter in group["params"] for name in names[id(parameter)]]
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    producers = [layer for layer in layers if isinstance(model.get_submodule(layer), kinds)]
    options = {key: group.pop(key) for key in ("max_sparsity", "relative") if key in group}
    layers = list(dict.fromkeys(producers))
    grouper = lookup("grouper", canonical("grouper", COUPLED))(model, example_inputs, layers, **options)
    coupled = grouper.parameters()
    for parameter in coupled:
        if id(parameter) in taken and id(parameter) not in mine:
            raise ConfigError(f"{names[id(parameter)][0]}: coupled to the channels of another key, yet it has its own")
    group.update(_named(coupled, names), group_type=grouper)
