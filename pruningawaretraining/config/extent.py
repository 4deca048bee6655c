"""Limits on the size of a config: with aliases and nesting, a few bytes can expand beyond any memory."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from pruningawaretraining.errors import ConfigError, described, on_one_line

MOST_BYTES = 2**20
"""Of a file."""
MOST_VALUES, MOST_CHARACTERS, DEEPEST = 20_000, 2_000_000, 40
"""Values, characters in all texts together, and levels of nesting, with every alias expanded."""
MOST_BITS = 63
"""Of a whole number."""


def check_extent(values: Any) -> None:
    """Refuse nested plain data with too many values or characters, counted as a reader would meet them.

    Args:
        values: mappings, lists and plain values; what is shared counts wherever it is.

    Raises:
        ConfigError: beyond a limit, a text that is not valid Unicode, a whole number of more than 63 bits, a key that
            is not text, or a tensor, array or module.
    """
    _Meter().take(values, ())


def too_large() -> str:
    """The message for a config beyond the limits."""
    return (
        f"it is too large, with aliases expanded. Allowed: {MOST_VALUES:,} values of {MOST_CHARACTERS:,} characters "
        "in all"
    )


class _Meter:
    """The remainder of the limits."""

    def __init__(self) -> None:
        self.values, self.characters = MOST_VALUES, MOST_CHARACTERS

    def take(self, value: Any, loc: tuple[int | str, ...]) -> None:
        self.values -= 1
        if isinstance(value, str):
            self.characters -= len(value)
            if not value.isprintable():
                _check_text(value, loc)
        elif isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise ConfigError(
                f"{dotted(loc) or 'config'}: a whole number of {value.bit_length()} bits. Allowed: at most {MOST_BITS}"
            )
        if self.values < 0 or self.characters < 0:
            raise ConfigError(f"config: {too_large()}")
        if isinstance(value, (Mapping, list, tuple)):
            self._take_nested(value, loc)
        elif _is_data(value):
            raise ConfigError(
                f"{dotted(loc) or 'config'}: {described(value)}. Allowed: plain numbers, texts, lists and mappings"
            )

    def _take_nested(self, value: Any, loc: tuple[int | str, ...]) -> None:
        if len(loc) >= DEEPEST:
            raise ConfigError(f"{dotted(loc[:3])}: it is nested too deeply. Allowed: {DEEPEST} levels")
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(value, Mapping):
                _check_key(key, loc)
                self.take(key, loc)
            self.take(inner, (*loc, key if isinstance(key, (int, str)) else repr(key)[:40]))


def _is_data(value: Any) -> bool:
    """Whether a value is a tensor, an array or a module: of any size, with a text of many lines."""
    array = hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, numbers.Number)
    return array or hasattr(value, "named_parameters")


def _check_key(key: Any, loc: tuple[int | str, ...]) -> None:
    """Refuse keys that are not text; a number that is not whole names something in recipes."""
    if not isinstance(key, (str, float)):
        where = dotted(loc) or "config"
        raise ConfigError(f"{where}: the key {on_one_line(f'{key!r:.80}')} is not text ({type(key).__name__})")


def _check_text(text: str, loc: tuple[int | str, ...]) -> None:
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"{dotted(loc) or 'config'}: {text!r} is not valid text. Allowed: Unicode without NUL")


def dotted(loc: tuple[int | str, ...]) -> str:
    """``("rules", 0, "start")`` as ``rules[0].start``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{on_one_line(part)}" for part in loc)
    return text.removeprefix(".")
