"""Pydantic models that answer bad input with a :class:`ConfigError` of one line per problem."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from numbers import Real
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from typing_extensions import Self  # noqa: UP035  (in typing from 3.11 on)

from pruningawaretraining.config.extent import check_extent, dotted
from pruningawaretraining.config.unions import EXPECTED, SEVERAL, plain_problems
from pruningawaretraining.errors import ConfigError, as_number, unknown

SHOWN = 30
"""How many problems are worded: a message has no room for more."""


def within(allowed: str, accepts: Callable[[float], bool]) -> BeforeValidator:
    """A check that refuses what is not a number (true/false too) or what ``accepts`` turns down.

    A text that is a number is read as one, in every form.
    """

    def check(value: Any) -> Any:
        value = as_number(value)
        if isinstance(value, bool) or not isinstance(value, Real) or not accepts(_as_float(value)):
            shown = value if not isinstance(value, int) or value.bit_length() <= 64 else float("inf")
            raise ValueError(f"{shown!r} is not allowed. Allowed: {allowed}")
        return value

    return BeforeValidator(check)


def _as_float(value: Real) -> float:
    """A number, infinite where it has hundreds of digits."""
    try:
        return float(value)
    except OverflowError:
        return float("inf")


Fraction = Annotated[float, Field(gt=0, le=1), within("a number in (0, 1]", lambda value: 0 < value <= 1)]
UnitInterval = Annotated[float, Field(ge=0, le=1), within("a number in [0, 1]", lambda value: 0 <= value <= 1)]
Amount = Annotated[float, Field(ge=0), within("a number of 0 or more", lambda value: 0 <= value < float("inf"))]
Positive = Annotated[float, Field(gt=0), within("a number above 0", lambda value: 0 < value < float("inf"))]
Whole = Annotated[int, within("a whole number", float.is_integer)]
Moment = Annotated[
    int | float,
    within("a number", math.isfinite),
    BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value),
]
Pace = Annotated[Moment, within("a number above 0", lambda value: 0 < value < math.inf)]
Count = Annotated[int, Field(ge=1), within("a whole number of 1 or more", lambda n: n >= 1 and n.is_integer())]


class Strict(BaseModel):
    """Base of every config model: frozen, no unknown keys, and a ConfigError where pydantic has a ValidationError.

    A validator that raises a ConfigError names the key relative to its model ("end: ..."); one that raises another
    ValueError leaves the key to be added.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(error, type(self)) from error

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Validate a mapping; see :meth:`pydantic.BaseModel.model_validate`.

        Raises:
            ConfigError: one line for each problem.
        """
        check_extent(obj)
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise config_error(error, cls) from error


def config_error(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """The ConfigError for a pydantic error of ``model``: a line per problem, each with dotted key, value and what is
    allowed; an unknown key comes with the nearest one."""
    problems = plain_problems(error.errors(include_url=False))
    lines = [_line(problem, model) for problem in problems[:SHOWN]]
    return ConfigError("\n".join([*lines, *[""] * (len(problems) - len(lines))]))  # the rest is only counted


def _line(problem: Any, model: type[BaseModel]) -> str:
    loc, kind, value, context = problem["loc"], problem["type"], problem["input"], problem.get("ctx", {})
    key = dotted(loc)
    if kind == "extra_forbidden":
        return unknown(key, str(loc[-1]), model.model_fields)
    if kind == "missing":
        return f"{key}: missing, but needed"
    if kind == "literal_error":
        return unknown(key, value, _literals(model.model_fields[loc[0]].annotation) or [context["expected"]])
    if kind == "value_error":
        return _own_message(loc, context["error"])
    if kind == SEVERAL:
        return f"{key}: {value!r} is not allowed. Allowed: {', or '.join(context['allowed'])}"
    if kind in EXPECTED:
        return f"{key}: {value!r} is not {EXPECTED[kind]}"
    return f"{key or 'config'}: {value!r} cannot be used: {problem['msg']}"


def _own_message(loc: tuple[int | str, ...], error: Exception) -> str:
    """The message of a validator or a nested model, the key of each line completed to the full dotted one."""
    if not isinstance(error, ConfigError):
        return f"{dotted(loc) or 'config'}: {error}"
    return "\n".join(_completed(loc, line) for line in str(error).splitlines())


def _completed(loc: tuple[int | str, ...], line: str) -> str:
    if line.startswith("... and "):  # of a message that was capped
        return line
    own = bool(loc) and isinstance(loc[-1], str) and line.startswith(tuple(f"{loc[-1]}{mark}" for mark in ":.["))
    before = dotted(loc[:-1] if own else loc)
    return f"{before}.{line}" if before else line


def _literals(annotation: Any) -> list[str]:
    """The values that the Literals of an annotation allow."""
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    return [value for argument in typing.get_args(annotation) for value in _literals(argument)]
