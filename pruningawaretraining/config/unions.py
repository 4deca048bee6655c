"""Problems of values that may be of several kinds, as one each: pydantic has one for every kind."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

SEVERAL = "several"
"""Type of the problem of a value that is of none of the kinds that it may be of."""
EXPECTED = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
}
"""Type of a problem -> what is expected."""
KIND = re.compile(r"(?:function-\w+|dict|list|tuple|set|literal)\[.*|constrained-\w+|str|int|float|bool")
"""What pydantic calls a kind in the place of a problem."""


def plain_problems(problems: Sequence[Any]) -> list[dict[str, Any]]:
    """Problems without the names of kinds in their places, one for each value.

    Args:
        problems: as pydantic lists them.
    """
    named = [(_without_kinds(one["loc"]), one) for one in problems]
    found: list[dict[str, Any]] = []
    for _, group in groupby(named, key=lambda pair: _value_at(pair[1]["loc"])):
        members = list(group)
        if all(loc == one["loc"] for loc, one in members):
            found += [dict(one) for _, one in members]
            continue
        within = [pair for pair in members if len(pair[0]) > len(_value_at(pair[1]["loc"]))]
        if within:  # the value is of the kind that these are about
            found += [{**one, "loc": loc} for loc, one in within]
            continue
        loc, first = members[0]
        allowed = [text for _, one in members if (text := _allowed(one))]
        several = {"type": SEVERAL, "loc": loc, "ctx": {"allowed": list(dict.fromkeys(allowed))}}
        found.append({**first, **several} if len(allowed) > 1 else {**first, "loc": loc})
    return found


def _without_kinds(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    return (*loc[:1], *(part for part in loc[1:] if not _is_kind(part)))


def _value_at(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The place of the outermost value that may be of several kinds, or the whole place without one."""
    return next((loc[:number] for number in range(1, len(loc)) if _is_kind(loc[number])), loc)


def _is_kind(part: int | str) -> bool:
    return isinstance(part, str) and KIND.fullmatch(part) is not None


def _allowed(problem: Mapping[str, Any]) -> str | None:
    """What one kind allows."""
    if problem["type"] == "value_error":
        text: str = str(problem["ctx"]["error"]).rpartition("Allowed: ")[2]
        return text
    if problem["type"] == "literal_error":
        return str(problem["ctx"]["expected"])
    return EXPECTED.get(problem["type"])
