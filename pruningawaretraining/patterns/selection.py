"""Which layers a rule speaks of: exact names, containers, and regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from pruningawaretraining.errors import ConfigError, unknown

PREFIXES = ("module.", "_orig_mod.")


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
        entries: exact module names, names of containers (everything in them), or ``re:`` and a regular expression that
            the whole name matches; None selects every candidate.
        candidates: names of the layers that can be selected.
        key: the key of the config, for messages.

    Raises:
        ConfigError: an entry that is no module of the model (the nearest is suggested), or a regular expression that
            matches no module.
    """
    names = set(candidates)
    if entries is None:
        return names
    modules = [name for name, _ in model.named_modules() if name]
    selected: set[str] = set()
    for entry in entries:
        selected |= _matches(entry, modules, names, key)
    return selected


def _matches(entry: str, modules: list[str], candidates: set[str], key: str) -> set[str]:
    if entry.startswith("re:"):
        try:
            expression = re.compile(entry[3:])
        except re.error as error:
            raise ConfigError(f"{key}: {entry!r} is no regular expression: {error}") from error
        if not any(expression.fullmatch(name) for name in modules):
            raise ConfigError(f"{key}: {entry!r} matches no module. Modules are: {', '.join(modules[:12])}, ...")
        return {name for name in candidates if expression.fullmatch(name)}
    wanted = plain_name(entry)
    plain = {plain_name(name): name for name in modules}
    if wanted not in plain:
        raise ConfigError(unknown(key, entry, plain))
    found = plain[wanted]
    return {name for name in candidates if name == found or name.startswith(f"{found}.")}
