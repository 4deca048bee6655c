"""One registry for everything that a config names: kind + name -> a frozen dataclass or a function.

A *kind* is "pattern", "criterion", "schedule", "regularizer", "scope" and so on. A registered dataclass is built from
a name, or from a mapping with a ``type`` key and the fields of the dataclass.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pruningawaretraining import errors
from pruningawaretraining.errors import ConfigError, ExtensionError, PruningError, as_number, on_one_line, unknown

T = TypeVar("T")

Check = Callable[[str, Any], None]
Spelling = Callable[[re.Match[str]], Mapping[str, Any]]
BUILT_IN: dict[str, tuple[str, ...]] = {
    "allocation": ("allocation.policies",),
    "channel_compensation": ("criteria.second_order.channels",),
    "compensation": ("criteria.second_order.methods",),
    "criterion": (
        *("criteria.activation", "criteria.block_change", "criteria.cost_aware", "criteria.expert_output"),
        *("criteria.geometric", "criteria.gradient", "criteria.magnitude", "criteria.retrain_free"),
        *("criteria.second_order", "proximal.coupled"),
    ),
    "dataset": ("experiment.datasets",),
    "dialect": ("config.dialects",),
    "dynamic": ("masks.dynamics", "masks.changing_masks"),
    "exporter": ("runtimes.exporter_choice", "runtimes.exporters"),
    "grouper": ("proximal",),
    "head_unit": ("patterns.head",),
    "layer_timer": ("costs.latency.layer_timers",),
    "mac_weighting": ("criteria.cost_aware",),
    "merge": ("criteria.second_order.methods",),
    "normalizer": ("criteria.magnitude",),
    "pattern": (
        *("patterns.block", "patterns.channel", "patterns.depth"),
        *("patterns.expert", "patterns.head", "patterns.slice"),
    ),
    "precision": ("export.precision", "export.int8"),
    "prox": ("proximal",),
    "rate": ("config.recipe",),
    "reduction": ("groups.reductions",),
    "regularizer": ("masks.penalties", "masks.element_penalties"),
    "runtime": ("runtimes.runtime",),
    "schedule": ("schedules",),
    "scope": ("allocation.ranking",),
    "score": ("proximal.maps",),
    "slice_order": ("patterns.slice",),
}
"""Kind -> the modules of this package that register entries of it; imported when a kind is first looked up."""
KINDS = (*BUILT_IN, "cost")
RESERVED = {
    "cost": (
        "sparsity", "macs", "parameters", "peak_memory", "latency", "latency_ms", "costs", "runtime", "batch", "threads"
    )
}  # fmt: skip
"""Kind -> names that a config gives another meaning."""
_LOADED: set[str] = set()
_ENTRIES: dict[str, dict[str, Any]] = {}
_ALIASES: dict[str, dict[str, str]] = {}
_SPELLINGS: dict[str, list[tuple[re.Pattern[str], Spelling]]] = {}
_CHECKS: dict[str, Check] = {}


def register(kind: str, name: str, *aliases: str) -> Callable[[T], T]:
    """Class or function decorator: make it known to configs as ``name`` (or one of ``aliases``) of this ``kind``.

    In a notebook, a cell that is run again replaces what it registered before.

    Raises:
        ConfigError: there is no such kind, a name is not a text, or it is taken; the entry lacks what its kind needs.
    """
    if kind not in KINDS:
        raise ConfigError(unknown("register", kind, KINDS))
    for one in (name, *aliases):
        if not isinstance(one, str) or not one.strip():
            raise ConfigError(f"{kind}: {one!r:.80} is not a name. Allowed: @register({kind!r}, 'some_name')")

    def add(entry: T) -> T:
        if not str(getattr(entry, "__module__", "")).startswith("pruningawaretraining."):
            _load(kind)  # names of the package are taken before anyone else's
        if not callable(entry):
            raise ConfigError(f"{kind}: {name!r} is registered for {entry!r:.80}. Allowed: a dataclass or a function")
        for one in (name, *aliases):
            _check_free(kind, one, name, entry)
        if kind in _CHECKS:
            _CHECKS[kind](name, entry)
        _ENTRIES.setdefault(kind, {})[name] = entry
        _ALIASES.setdefault(kind, {}).update(dict.fromkeys(aliases, name))
        return entry

    return add


def checked_by(kind: str) -> Callable[[Check], Check]:
    """Function decorator: it looks at name and entry of every registration of a kind, and raises a ConfigError."""

    def add(function: Check) -> Check:
        _CHECKS[kind] = function
        return function

    return add


def _check_free(kind: str, one: str, name: str, entry: Any) -> None:
    """Refuse a name, or an alias of it, that stands for something else already."""
    owner = _ENTRIES.get(kind, {}).get(one)
    if owner is not None and not (one == name and _same(owner, entry)):
        raise ConfigError(f"{kind}: the name {one!r} is already registered for {owner!r}. Allowed: another name")
    if _ALIASES.get(kind, {}).get(one, name) != name or (one == name and one in _ALIASES.get(kind, {})):
        raise ConfigError(f"{kind}: the name {one!r} already stands for {_ALIASES[kind][one]!r}. Allowed: another name")
    if any(expression.fullmatch(one) for expression, _ in _SPELLINGS.get(kind, [])):
        raise ConfigError(f"{kind}: the name {one!r} is a short spelling of another {kind}. Allowed: another name")
    if one in RESERVED.get(kind, ()):
        raise ConfigError(f"{kind}: the name {one!r} is a key of a target already. Allowed: another name")


def _same(owner: Any, entry: Any) -> bool:
    """Whether an entry is the one that has the name, or the same cell of a notebook, run again."""
    places = [(getattr(one, "__module__", ""), getattr(one, "__qualname__", None)) for one in (owner, entry)]
    return owner is entry or (places[0] == places[1] and places[0][0] == "__main__" and "<" not in str(places[0][1]))


def _load(kind: str) -> None:
    """Import the package's own modules that register entries of this kind, once."""
    if kind not in _LOADED:
        _LOADED.add(kind)
        for module in BUILT_IN.get(kind, ()):
            importlib.import_module(f"pruningawaretraining.{module}")


def spelling(kind: str, expression: str) -> Callable[[Spelling], Spelling]:
    """Function decorator: a text that the whole ``expression`` matches, such as "4x1", means the mapping that the
    function makes of the match: ``{"type": name, **fields}``."""

    def add(function: Spelling) -> Spelling:
        _SPELLINGS.setdefault(kind, []).append((re.compile(expression), function))
        return function

    return add


def spellings(kind: str) -> list[str]:
    """The regular expressions of the spellings of a kind."""
    _load(kind)
    return [expression.pattern for expression, _ in _SPELLINGS.get(kind, [])]


def spelled(kind: str, text: str) -> Mapping[str, Any] | None:
    """The mapping that ``text`` is short for, or None if it is not a spelling of this kind."""
    _load(kind)
    for expression, function in _SPELLINGS.get(kind, []):
        if match := expression.fullmatch(text):
            return function(match)
    return None


def names(kind: str) -> list[str]:
    """The registered names of a kind, sorted, without aliases."""
    _load(kind)
    return sorted(_ENTRIES.get(kind, {}))


def canonical(kind: str, name: str, where: str | None = None) -> str:
    """The registered name that ``name`` (or an alias of any case) stands for.

    Raises:
        ConfigError: nothing is registered under it; the nearest name is suggested.
    """
    _load(kind)
    table, aliases = _ENTRIES.get(kind, {}), _ALIASES.get(kind, {})
    for candidate in (name, str(name).lower()):
        if candidate in table:
            return candidate
        if candidate in aliases:
            return aliases[candidate]
    raise ConfigError(unknown(where or kind, name, [*table, *aliases]))


def lookup(kind: str, name: str, where: str | None = None) -> Any:
    """The entry registered under ``name``; see :func:`canonical`."""
    return _ENTRIES[kind][canonical(kind, name, where)]


def build(kind: str, spec: Any, where: str | None = None) -> Any:
    """Build an entry from a config value.

    Args:
        kind: the kind of entry.
        spec: a name or spelling, a mapping ``{"type": name, **fields}``, or an object that is already built.
        where: the key of the config, for messages.

    Raises:
        ConfigError: unknown name or field, or a field with a value that the entry refuses.
    """
    where = where or kind
    if isinstance(spec, str):
        spec = spelled(kind, spec) or {"type": spec}
    if not isinstance(spec, Mapping):
        return spec
    if "type" not in spec:
        raise ConfigError(f"{where}: {dict(spec)!r} has no 'type'. Allowed: {', '.join(names(kind))}")
    entry: Any = lookup(kind, spec["type"], f"{where}.type")
    options = {key: value for key, value in spec.items() if key != "type"}
    if not dataclasses.is_dataclass(entry):
        if isinstance(entry, type) and not entry.__module__.startswith("pruningawaretraining."):
            raise ConfigError(
                f"{where}: {spec['type']!r} is a class without @dataclass. Allowed: @dataclass(frozen=True)"
            )
        if options:
            raise ConfigError(f"{where}: {spec['type']!r} takes no options, but {sorted(options)} were given")
        return entry
    options = _numbers_in(entry, options)
    check_fields(entry, options, where)
    try:
        return typing.cast("Callable[..., Any]", entry)(**options)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{where}: {error}") from error


def _numbers_in(entry: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options with numbers in place of the texts that stand for some."""
    texts = {key: value for key, value in options.items() if isinstance(value, str)}
    hints = typing.get_type_hints(entry)
    numeric = [key for key in texts if any(one in (int, float) for one in _kinds(hints.get(key)))]
    return options | {key: as_number(texts[key]) for key in numeric}


def _kinds(hint: Any) -> tuple[Any, ...]:
    """A type, or those that a union allows; nothing where text is one of them."""
    found = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return () if str in found else found


def check_fields(entry: Any, options: Mapping[str, Any], where: str) -> None:
    """Refuse options that are no field of the dataclass ``entry``, and values of a plainly wrong type."""
    hints = typing.get_type_hints(entry)
    allowed = [field.name for field in dataclasses.fields(entry) if field.init]
    for key, value in options.items():
        if key not in allowed:
            raise ConfigError(unknown(f"{where}.{key}", key, allowed or ["(no options)"]))
        if problem := errors.wrong_type(hints.get(key), value):
            raise ConfigError(f"{where}.{key}: {value!r} is not {problem}")


def name_of(kind: str, piece: Any) -> str:
    """The name that a function, or the class of an object, is registered under; its own name without one."""
    found = (name for name, one in _ENTRIES.get(kind, {}).items() if one is piece or one is type(piece))
    return next(found, getattr(piece, "__name__", type(piece).__name__))


@contextmanager
def calling(kind: str, piece: Any, expected: str) -> Iterator[None]:
    """Inside the block a registered piece is called; if it is not the library's own, what it raises names it.

    Args:
        kind: its kind.
        piece: the function or object.
        expected: what it should return.

    Raises:
        ExtensionError: the user's piece raised anything but a PruningError or an out-of-memory error.
    """
    try:
        yield
    except (PruningError, MemoryError):
        raise
    except Exception as error:
        module = str(getattr(piece, "__module__", ""))
        if module.startswith("pruningawaretraining.") or type(error).__name__ == "OutOfMemoryError":
            raise
        what = f"{type(error).__name__}: {on_one_line(str(error))}"
        raise ExtensionError(f"{kind} {name_of(kind, piece)!r}: it raised {what}. Expected: {expected}") from error


def check_returned(good: bool, kind: str, piece: Any, returned: Any, expected: str, shown: str = "") -> None:
    """Refuse what a registered piece has returned.

    Args:
        good: whether it can be used.
        kind, piece: the piece, and its kind.
        returned: what it returned.
        expected: what it should have returned.
        shown: a text that describes what it returned, for the message.

    Raises:
        ExtensionError: it cannot.
    """
    if not good:
        shown = shown or on_one_line(errors.described(returned))
        raise ExtensionError(f"{kind} {name_of(kind, piece)!r}: it returned {shown}. Expected: {expected}")
