"""Dialects: other forms of config, recognised by their keys and translated into the native one.

A dialect is one module here with one registered class, imported in ``dialects/__init__.py``::

    @register("dialect", "mine")
    @dataclass(frozen=True)
    class Mine:
        keys: ClassVar[tuple[str, ...]] = ("my_section",)
        yaml_tags: ClassVar[tuple[str, ...]] = ("!Mine",)

        def recognises(self, mapping): ...
        def translate(self, mapping): ...
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from pruningawaretraining.config.origin import Names, in_users_words, origin_of
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.errors import ConfigError, check_declared
from pruningawaretraining.registry import canonical, checked_by, names

logger = logging.getLogger(__name__)

TAG = "!tag"
"""Key that holds a YAML mapping's own tag: ``!Pruner {a: 1}`` is read as ``{"!tag": "!Pruner", "a": 1}``."""


class Dialect(Protocol):
    """Another form of config. Neither method may change the mapping."""

    keys: ClassVar[tuple[str, ...]]
    """Its keys at the top level, for the message about a config that nothing recognises."""
    yaml_tags: ClassVar[tuple[str, ...]]
    """YAML tags that its files hold, such as "!Pruner"; see :data:`TAG`."""

    def recognises(self, mapping: Mapping[str, Any]) -> bool:
        """Is this config written in the dialect?"""

    def translate(self, mapping: Mapping[str, Any]) -> PruningConfig:
        """The same as a native config.

        Raises:
            ConfigError: an unknown key or a value that is not allowed, under the dialect's own key.
        """


@checked_by("dialect")
def check_dialect(name: str, entry: Any) -> None:
    """Refuse a dialect that lacks a method or a table of names: every config is shown to every dialect.

    Raises:
        ConfigError: it names the dialect.
    """
    for key in ("recognises", "translate"):
        method = getattr(entry, key, None)
        check_declared(callable(method), "dialect", name, key, method, "a method")
    for key in ("keys", "yaml_tags"):
        texts = getattr(entry, key, None)
        good = isinstance(texts, (tuple, list)) and all(isinstance(one, str) for one in texts)
        check_declared(good, "dialect", name, key, texts, "a tuple of texts")


def native(
    rules: Sequence[Mapping[str, Any]], names: Sequence[Names] = (), counts_epochs: bool = False, **others: Any
) -> PruningConfig:
    """A native config from translated rules. The names in them come from a dialect's own table, so what they stand for
    is looked up only when it is built: a rule that is switched off may name what is not there.

    Args:
        rules: fields of each.
        names: what messages call each of them and its fields; fields of rules without names are called as they are.
        counts_epochs: whether the system of the dialect counts epochs itself, from the optimizer's steps or hooks at
            their beginning; then loops need not call ``prune``.
        others: fields of the config.

    Raises:
        ConfigError: values that do not go together, under the keys of the dialect.
    """
    with in_users_words(origin_of([rule.get("name") for rule in rules], names)):
        config = PruningConfig.model_validate({"rules": [dict(rule) for rule in rules], **others})
    config.known_as(names, counts_epochs)
    return config


def check_window(start: int, end: int | None, end_key: str, start_key: str) -> None:
    """Refuse an end before its start."""
    if end is not None and end < start:
        raise ConfigError(f"{end_key}: {end} is before {start_key}. Allowed: {start_key} ({start}) or later")


def schedule_name(name: str, where: str) -> str:
    """Registered schedule of ``name``."""
    return canonical("schedule", name, where) if names("schedule") else name


def note(key: str, meaning: str) -> None:
    """Warn that a value means what nobody may expect."""
    logger.warning("%s: %s", key, meaning)


def note_ignored(key: str, why: str) -> None:
    """Warn that a key was read and has no effect here, or another one than where it comes from."""
    logger.warning("%s is ignored: %s", key, why)
