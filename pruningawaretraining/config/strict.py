"""Pydantic models that answer bad input with a :class:`ConfigError` of one line per problem."""

from __future__ import annotations

import typing
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from typing_extensions import Self  # noqa: UP035  (in typing from 3.11 on)

from pruningawaretraining.errors import ConfigError, unknown

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

_EXPECTED = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
}


def within(allowed: str, accepts: Callable[[float], bool]) -> BeforeValidator:
    """A check that refuses what is not a number (text and true/false too) or what ``accepts`` turns down."""

    def check(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, Real) or not accepts(float(value)):
            raise ValueError(f"{value!r} is not allowed. Allowed: {allowed}")
        return value

    return BeforeValidator(check)


Fraction = Annotated[float, Field(gt=0, le=1), within("a number in (0, 1]", lambda value: 0 < value <= 1)]
UnitInterval = Annotated[float, Field(ge=0, le=1), within("a number in [0, 1]", lambda value: 0 <= value <= 1)]
Amount = Annotated[float, Field(ge=0), within("a number of 0 or more", lambda value: 0 <= value < float("inf"))]
Positive = Annotated[float, Field(gt=0), within("a number above 0", lambda value: 0 < value < float("inf"))]
Whole = Annotated[int, within("a whole number", float.is_integer)]
Count = Annotated[int, Field(ge=1), within("a whole number of 1 or more", lambda n: n >= 1 and n.is_integer())]


class _OneLiners(ModelMetaclass):
    """Makes ``Model(...)`` raise a ConfigError; models nested in it are still validated as part of the whole."""

    if not TYPE_CHECKING:

        def __call__(cls, *args: Any, **values: Any) -> Any:
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise config_error(error, cls) from error


class Strict(BaseModel, metaclass=_OneLiners):
    """Base of every config model: frozen, no unknown keys, and a ConfigError where pydantic has a ValidationError.

    A validator that raises a ConfigError names the key relative to its model ("end: ..."); one that raises another
    ValueError leaves the key to be added.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Validate a mapping; see :meth:`pydantic.BaseModel.model_validate`.

        Raises:
            ConfigError: one line for each problem.
        """
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise config_error(error, cls) from error


def config_error(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """The ConfigError for a pydantic error of ``model``: a line per problem, each with dotted key, value and what is
    allowed; an unknown key comes with the nearest one."""
    return ConfigError("\n".join(_line(problem, model) for problem in error.errors(include_url=False)))


def _line(problem: Any, model: type[BaseModel]) -> str:
    loc, kind, value, context = problem["loc"], problem["type"], problem["input"], problem.get("ctx", {})
    key = dotted(loc)
    if kind == "extra_forbidden":
        owner = _model_at(model, loc[:-1])
        return unknown(key, str(loc[-1]), owner.model_fields) if owner else f"{key}: not known"
    if kind == "missing":
        return f"{key}: missing, but needed"
    if kind == "literal_error":
        return unknown(key, value, _choices(model, loc) or [context["expected"]])
    if kind == "value_error":
        return _own_message(loc, context["error"])
    if kind in _EXPECTED:
        return f"{key}: {value!r} is not {_EXPECTED[kind]}"
    return f"{key or 'config'}: {value!r} cannot be used: {problem['msg']}"


def _own_message(loc: tuple[int | str, ...], error: Exception) -> str:
    """The message of one of our validators, its key completed to the full dotted one."""
    message = str(error)
    if not isinstance(error, ConfigError):
        return f"{dotted(loc) or 'config'}: {message}"
    relative = loc[:-1] if loc and isinstance(loc[-1], str) and _starts_with_key(message, loc[-1]) else loc
    return f"{dotted(relative)}.{message}" if relative else message


def _starts_with_key(message: str, key: str) -> bool:
    return message.startswith(key) and message[len(key) :][:1] in (":", ".", "[")


def dotted(loc: tuple[int | str, ...]) -> str:
    """``("rules", 0, "start")`` as ``rules[0].start``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".")


def _model_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model that the location ``loc`` inside ``model`` is validated with."""
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = _inner_model(field.annotation) if field else None
        if inner is None:
            return None
        model = inner
    return model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_inner_model(argument) for argument in typing.get_args(annotation))
    return next((model for model in found if model), None)


def _choices(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """What the Literal field at ``loc`` allows."""
    owner = _model_at(model, loc[:-1])
    field = owner.model_fields.get(str(loc[-1])) if owner else None
    return _literals(field.annotation) if field else []


def _literals(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    return [value for argument in typing.get_args(annotation) for value in _literals(argument)]
