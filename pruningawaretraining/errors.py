"""Errors that a user can act on: each names the key or layer, the value, what is allowed and the nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PruningError(ValueError):
    """Base of everything this library raises on bad input."""


class ConfigError(PruningError):
    """A configuration key or value that cannot be used."""


class ModelError(PruningError):
    """A model, layer or example input that cannot be pruned as asked."""


class TargetError(PruningError):
    """A target that the constraints (caps, multiples, listed layers) make unreachable."""


class CheckpointError(PruningError):
    """A file that is not a checkpoint of ours, is truncated, or does not fit the model."""


def nearest(value: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that is closest to ``value``, or None when nothing is close."""
    matches = difflib.get_close_matches(str(value), [str(name) for name in allowed], n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(key: str, value: object, allowed: Iterable[str], most: int = 12) -> str:
    """The one-line message for an unknown name: key, value, nearest match and what is allowed."""
    names = sorted(str(name) for name in allowed)
    close = nearest(str(value), names)
    hint = f"; did you mean {close!r}?" if close else ""
    shown = ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
    return f"{key}: {value!r} is not known{hint or '.'} Allowed: {shown}"
