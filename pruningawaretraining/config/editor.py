"""Fills a config's JSON schema with what is registered, so that editors complete names and options."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from typing import Any

from pydantic import TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, PydanticUserError

from pruningawaretraining.registry import lookup, names, spellings

NAMED = ("pattern", "criterion", "regularizer", "dynamic", "schedule", "scope")
"""Fields of a rule that hold something registered, each under the kind of its own name."""


def complete_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A new schema in which the fields in :data:`NAMED` list the registered names and, for dataclasses, their options.

    Args:
        schema: what pydantic says about PruningConfig.
    """
    schema = json.loads(json.dumps(schema))
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"] = {
        "$schema": {"type": "string", "description": "Where an editor finds this schema; not read."},
        **schema["properties"],
    }
    fields = schema["$defs"]["Rule"]["properties"]
    for kind in NAMED:
        if names(kind):
            fields[kind] = {**_kept(fields[kind]), **_alternatives(kind)}
    return schema


def _kept(field: dict[str, Any]) -> dict[str, Any]:
    return {key: field[key] for key in ("description", "default", "title") if key in field}


def _alternatives(kind: str) -> dict[str, Any]:
    plain: dict[str, Any] = {"enum": names(kind)}
    if kind in ("schedule", "scope"):
        return plain
    none = [{"type": "null"}] if kind == "regularizer" else []
    spelled = [{"type": "string", "pattern": f"^(?:{expression})$"} for expression in spellings(kind)]
    return {"anyOf": [plain, *spelled, *(_object_form(kind, name) for name in names(kind)), *none]}


def _object_form(kind: str, name: str) -> dict[str, Any]:
    """The schema of ``{"type": name, **options}``."""
    entry = lookup(kind, name)
    form: dict[str, Any] = {
        "title": name,
        "type": "object",
        "properties": {"type": {"const": name}},
        "required": ["type"],
        "additionalProperties": False,
    }
    documentation = _plain(inspect.getdoc(entry) or "")
    summary = documentation.split("\n\n")[0].replace("\n", " ")
    if summary and not summary.startswith(f"{entry.__name__}("):  # else dataclass() wrote it, for want of one
        form["description"] = summary
    if dataclasses.is_dataclass(entry):
        hints, meanings = typing.get_type_hints(entry), _options(documentation)
        for field in dataclasses.fields(entry):
            if field.init:
                form["properties"][field.name] = {
                    **_json_type(hints[field.name]),
                    **_default(field),
                    **({"description": meanings[field.name]} if field.name in meanings else {}),
                }
                if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                    form["required"].append(field.name)
    return form


def _plain(documentation: str) -> str:
    """Strip the markup of cross-references and literals."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", documentation).replace("``", "")


def _options(documentation: str) -> dict[str, str]:
    """Description of each option, from the "Args:" section of a docstring."""
    _, _, section = documentation.partition("\nArgs:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _json_type(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type; {} (anything) if the type has no plain JSON form."""
    try:
        found = TypeAdapter(hint).json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError, PydanticUndefinedAnnotation):
        return {}
    return {} if "$defs" in found or "$ref" in found else found


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    value: object = field.default
    return {"default": value} if isinstance(value, (str, int, float, bool, type(None))) else {}
