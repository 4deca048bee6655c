"""Select the layers of a rule: exact names, containers, and regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from pruningawaretraining.errors import ConfigError, unknown

PREFIXES = ("module.", "_orig_mod.")
OPTIONAL = "?"
"""In front of an entry that may match nothing."""


def plain_name(name: str) -> str:
    """A module name without the prefixes that DataParallel and torch.compile put in front."""
    stripped = name
    for _ in PREFIXES:
        for prefix in PREFIXES:
            stripped = stripped.removeprefix(prefix)
    return stripped


def select(model: nn.Module, entries: Sequence[str] | None, candidates: Iterable[str], key: str) -> set[str]:
    """The candidate layers that a list of entries names.

    Args:
        model: the model; an entry may be any of its modules.
        entries: exact module names; names of containers (everything in them); ``re:`` and a regular expression that the
            whole name matches; ``in:`` and one that the name of a module begins with (everything in it); ``param:`` and
            one that the name of the layer's weight ("conv1.weight") begins with. A ``?`` in front: the entry may match
            nothing, which a pruner says. None selects every candidate.
        candidates: names of the layers that can be selected.
        key: the key of the config, for messages.

    Raises:
        ConfigError: an entry that is not a module of the model (the nearest is suggested), or a regular expression that
            matches no module.
    """
    names = set(candidates)
    if entries is None:
        return names
    modules = [name for name, _ in model.named_modules() if name]
    selected: set[str] = set()
    for entry in entries:
        try:
            selected |= _matches(model, entry.removeprefix(OPTIONAL), modules, names, key)
        except ConfigError:
            if not entry.startswith(OPTIONAL):
                raise
    return selected


def selected(
    model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str], candidates: Iterable[str], key: str
) -> tuple[set[str], set[str]]:
    """The candidates that a rule's ``layers`` name, and those that its ``exclude`` does; ``key`` is the rule's.

    Raises:
        ConfigError: see :func:`select`.
    """
    names, prefix = set(candidates), f"{key}." if key else ""
    return select(model, layers, names, f"{prefix}layers"), select(model, list(exclude), names, f"{prefix}exclude")


def _matches(model: nn.Module, entry: str, modules: list[str], candidates: set[str], key: str) -> set[str]:
    for form, found in FORMS.items():
        if not entry.startswith(form):
            continue
        try:
            expression = re.compile(entry[len(form) :])
        except re.error as error:
            raise ConfigError(f"{key}: {entry!r} is not a regular expression: {error}") from error
        return found(model, expression, modules, candidates, f"{key}: {entry!r}")
    wanted = plain_name(entry)
    plain = {plain_name(name): name for name in modules}
    if wanted not in plain:
        raise ConfigError(unknown(key, entry, plain))
    return _inside({plain[wanted]}, candidates)


def _inside(containers: Iterable[str], candidates: set[str]) -> set[str]:
    """The candidates that are one of some modules, or in one."""
    known = set(containers)
    parts = {name: name.split(".") for name in candidates}
    return {
        name for name in candidates if any(".".join(parts[name][:n]) in known for n in range(1, len(parts[name]) + 1))
    }


def _whole(
    model: nn.Module, expression: re.Pattern[str], modules: list[str], candidates: set[str], key: str
) -> set[str]:
    if not any(expression.fullmatch(name) for name in modules):
        raise ConfigError(f"{key} matches no module. Modules are: {', '.join(modules[:12])}, ...")
    return {name for name in candidates if expression.fullmatch(name)}


def _within(
    model: nn.Module, expression: re.Pattern[str], modules: list[str], candidates: set[str], key: str
) -> set[str]:
    found = [name for name in modules if expression.match(name)]
    if not found:
        raise ConfigError(f"{key} matches no module. Modules are: {', '.join(modules[:12])}, ...")
    return _inside(found, candidates)


def _by_weight(
    model: nn.Module, expression: re.Pattern[str], modules: list[str], candidates: set[str], key: str
) -> set[str]:
    names = [plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False)]
    if not any(expression.match(name) for name in names):
        raise ConfigError(f"{key} matches no parameter. Parameters are: {', '.join(names[:12])}, ...")
    return {name for name in candidates if expression.match(f"{plain_name(name)}.weight".removeprefix("."))}


FORMS: dict[str, Callable[..., set[str]]] = {"re:": _whole, "in:": _within, "param:": _by_weight}
"""How an entry begins -> which layers its regular expression chooses."""


def none_chosen(
    model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str], key: str, what: str, there: Iterable[str]
) -> ConfigError:
    """The error of a rule that selects nothing.

    Args:
        model, layers, exclude, key: of the rule.
        what: is selected, in the singular.
        there: names of what the model has of it.
    """
    prefix, names = f"{key}." if key else "", sorted(there)
    if not names:
        return ConfigError(f"{prefix}pattern: the {type(model).__name__} has no {what} that is known")
    shown = f"Allowed: {', '.join(names[:8])}"
    if layers is None:
        return ConfigError(f"{prefix}exclude: {list(exclude)!r} leaves no {what}. {shown}")
    without = f" without {list(exclude)!r}" if exclude else ""
    return ConfigError(f"{prefix}layers: {list(layers)!r}{without} selects no {what}. {shown}")


def spared(model: nn.Module, entries: Sequence[str] | None, layers: Iterable[str]) -> list[str]:
    """Parameters that ``param:`` entries match beside the weights of some layers: of norms, embeddings, and biases."""
    forms = [entry.removeprefix(OPTIONAL) for entry in entries or ()]
    expressions = [re.compile(form.removeprefix("param:")) for form in forms if form.startswith("param:")]
    weights = {f"{layer}.weight" for layer in layers}
    names = [name for name, _ in model.named_parameters() if name not in weights]
    return [name for name in names if any(one.match(plain_name(name)) for one in expressions)]
