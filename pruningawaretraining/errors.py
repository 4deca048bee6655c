"""Errors that a user can act on: each names the key or layer, the value, what is allowed and the nearest match."""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 500
"""Most characters of a message: what it echoes may come from a stranger."""
NUMBER = re.compile(r"[-+]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][-+]?[0-9]{1,3})?")
"""A text that is a number; not "nan", "inf" or "1_000"."""
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class PruningError(ValueError):
    """Base of everything this library raises on bad input.

    A message has at most :data:`LONGEST` characters and no control characters, which a terminal would act on.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(capped(str(message)))


class ConfigError(PruningError):
    """A configuration key or value that cannot be used."""


class ModelError(PruningError):
    """A model, layer or example input that cannot be pruned as asked."""


class TargetError(PruningError):
    """A target that the constraints (caps, multiples, listed layers) make unreachable."""


class ExtensionError(PruningError):
    """A registered criterion, schedule, cost ... of the user's own that raised, or returned what cannot be used."""


class CheckpointError(PruningError):
    """A file that is not a checkpoint of this library, is truncated, or does not fit the model."""


def capped(message: str, most: int = LONGEST) -> str:
    """A message without control characters, shortened to ``most`` characters.

    A long line loses its middle, so that it still ends with what is allowed; of many lines the first ones stay.
    """
    lines = [_escaped(_without_middle(line, most)) for line in message.split("\n")]
    if sum(len(line) + 1 for line in lines) - 1 <= most:
        return "\n".join(lines)
    if len(lines) == 1:
        return _without_middle(lines[0], most)
    kept: list[str] = []
    room = most - len(f"\n... and {len(lines)} more")
    for line in lines:
        short = _without_middle(line, most // 2)
        room -= len(short) + 1
        if room < 0:
            break
        kept.append(short)
    return "\n".join([*kept, f"... and {len(lines) - len(kept)} more"])


def _escaped(line: str) -> str:
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), line)


def _without_middle(line: str, most: int) -> str:
    if len(line) <= most:
        return line
    allowed = line.rfind("Allowed:")
    tail = line[allowed if len(line) - most // 2 <= allowed else len(line) - most // 3 :]
    return f"{line[: most - len(tail) - 5]} ... {tail}"


def on_one_line(text: str) -> str:
    r"""A text with its line breaks written as ``\n``: a key or name of the user's inside a message."""
    return text.replace("\n", "\\n")


def nearest(value: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that is closest to ``value``, or None when nothing is close."""
    matches = difflib.get_close_matches(str(value)[:LONGEST], [str(name) for name in allowed], n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(key: str, value: object, allowed: Iterable[str], most: int = 12) -> str:
    """The one-line message for an unknown name: key, value, nearest match and what is allowed."""
    names = sorted(str(name) for name in allowed)
    close = nearest(str(value), names)
    hint = f"; did you mean {close!r}?" if close else ""
    shown = ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
    return f"{on_one_line(key)}: {value!r} is not known{hint or '.'} Allowed: {shown}"


def described(value: Any) -> str:
    """A value as a message shows it: a tensor by its shape, anything else by what it looks like."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}, {getattr(value, 'device', '')}"
    if hasattr(value, "named_parameters"):
        return f"a module ({type(value).__name__})"
    return on_one_line(f"{value!r:.80} ({type(value).__name__})") if value is not None else "None"


def wrong_type(hint: Any, value: Any) -> str:
    """Expected kind of a value, if its type hint is simple; "" if the value is fine."""
    if hint in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, float))):
        return "a number"
    if hint in (int, float) and not math.isfinite(value):
        return "a finite number"
    if hint is bool and not isinstance(value, bool):
        return "true or false"
    if hint is str and not isinstance(value, str):
        return "a text"
    of_texts = typing.get_origin(hint) in (list, tuple, Sequence) and str in typing.get_args(hint)
    listed = isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)
    return "a list of texts" if of_texts and not listed else ""


def as_number(value: Any) -> Any:
    """The number that a text is, such as "1e-7", which YAML reads as text; any other value as it is."""
    if not isinstance(value, str) or not NUMBER.fullmatch(value.strip()):
        return value
    return int(value) if value.strip().lstrip("+-").isdigit() else float(value)


def check_declared(good: bool, kind: str, name: str, what: str, value: Any, allowed: str) -> None:
    """Refuse what an entry declares.

    Args:
        good: whether it can be used.
        kind, name: of the entry.
        what: the attribute.
        value: what it is.
        allowed: what it may be.

    Raises:
        ConfigError: it cannot.
    """
    if not good:
        raise ConfigError(f"{kind} {name!r}: its {what} is {value!r:.80}. Allowed: {allowed}")
