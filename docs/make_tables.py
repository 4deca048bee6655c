"""Writes the tables of docs/config.md and docs/reference.md from the schemas and the registry.

    python docs/make_tables.py

What lies between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->`` is replaced; a test compares the two.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pruningawaretraining.config.dialects.sparseml_keys import (
    Pruning,
    RateFunction,
    RateSchedule,
    SecondOrderPruning,
    SetRate,
)
from pruningawaretraining.config.recovery import Recovery, RecoveryAverage, RecoveryRate
from pruningawaretraining.config.schema import Distillation, Phase, PruningConfig, Rule
from pruningawaretraining.config.targets import ExampleInputs, Target
from pruningawaretraining.experiment import schema as experiment
from pruningawaretraining.registry import _ALIASES, lookup, names, spellings

DOCS = Path(__file__).parent
MARK = re.compile(r"(<!-- begin: ([\w.]+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)


SECTIONS = {
    "Rule": "a-rule",
    "Target": "target",
    "ExampleInputs": "example_inputs",
    "Distillation": "distillation",
    "Recovery": "recovery",
    "RecoveryRate": "recovery-rate",
    "RecoveryAverage": "recovery-average",
    "Phase": "a-phase",
    "RateFunction": "rates",
    "SetRate": "rates",
    "RateSchedule": "rates",
}
"""Heading of the table of a model that another one holds; the others have the key's own name."""


def cell(text: str) -> str:
    """Text for a cell of a Markdown table: on one line, without column marks, and no HTML but line breaks."""
    pieces = " ".join(text.split()).replace("|", "\\|").split("`")
    for index in range(0, len(pieces), 2):  # every other piece is code
        pieces[index] = pieces[index].replace("<", "&lt;").replace("&lt;br>", "<br>")
    return "`".join(pieces)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(header)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell(text) for text in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# --- configs ----------------------------------------------------------------------------------------------------


def allowed(schema: Mapping[str, Any]) -> str:
    """What a property of a JSON schema allows, in words."""
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        words = list(dict.fromkeys(allowed(one) for one in schema["anyOf"]))
        return " or ".join(word for word in words if not (word.startswith("whole number") and word[6:] in words))
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        heading = SECTIONS.get(name, name.removesuffix("Config").lower())
        return f"[{heading.replace('-', ' ')}](#{heading})"
    kind = schema.get("type")
    if kind == "array":
        return f"list of {_plural(allowed(schema.get('items', {})))}"
    if kind in ("number", "integer"):
        return ("whole number" if kind == "integer" else "number") + _bounds(schema)
    return {"string": "text", "boolean": "true, false", "object": "mapping", "null": "none"}.get(str(kind), "anything")


def _plural(text: str) -> str:
    known = {"text": "texts", "whole number": "whole numbers", "number": "numbers"}
    return known.get(text, text.replace("list of", "lists of") if text.startswith("list") else text)


def _bounds(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is None and above is None:
        return ""
    left = f"({above:g}" if above is not None else f"[{low:g}"
    if high is None and below is None:
        return f", {low:g} or more" if low is not None else f" above {above:g}"
    return f" in {left}, {high:g}]" if high is not None else f" in {left}, {below:g})"


def keys_of(model: type[BaseModel], beside: type[BaseModel] | None = None) -> str:
    """The keys of a config model (beside those of another): what each allows, its default and what it means."""
    properties = model.model_json_schema()["properties"]
    rows = []
    for name, field in model.model_fields.items():
        if beside is not None and name in beside.model_fields:
            continue
        if name in NAMED and model is Rule:
            kind = "name" if name in ("schedule", "scope", "allocation") else "name or `{type: name, ...options}`"
            what = kind + (" or none" if name in ("regularizer", "allocation") else "")
        else:
            what = "any form of pruning config" if name == "pruning" else allowed(properties[name])
        rows.append((f"`{name}`", what, _default(field), str(field.description)))
    return table(("key", "allowed", "default", "meaning"), rows)


NAMED = ("pattern", "criterion", "regularizer", "dynamic", "schedule", "scope", "allocation")


def _default(field: Any) -> str:
    if field.is_required():
        return "needed"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    return {"None": "none", "True": "true", "False": "false"}.get(str(field.default), f"`{field.default}`")


def forms() -> str:
    """The other forms of config that are understood."""
    rows = []
    for name, entry in known("dialect"):
        rows.append((name, ", ".join(f"`{key}`" for key in entry.keys), described(entry)))
    return table(("form", "recognised by", "what it holds"), rows)


def known(kind: str) -> list[tuple[str, Any]]:
    """Name and entry of everything of a kind that the package itself registers."""
    entries = ((name, lookup(kind, name)) for name in names(kind))
    return [(name, entry) for name, entry in entries if entry.__module__.startswith("pruningawaretraining.")]


# --- the registry -----------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """A docstring's reStructuredText as Markdown."""
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?([^`]*)`", r"`\1`", text).replace("``", "`")


def described(entry: Any) -> str:
    """What a docstring says before its sections."""
    text = inspect.getdoc(entry) or ""
    return plain(re.split(r"\n(?:Args|Attributes|Raises|Returns):\n", text)[0])


def options_of(entry: Any) -> str:
    """The options of a registered dataclass with their defaults and meanings."""
    if not dataclasses.is_dataclass(entry) or not isinstance(entry, type):
        return ""
    meanings: dict[str, str] = {}
    for base in reversed(entry.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")
        for key, text in re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", section, flags=re.MULTILINE):
            meanings[key] = plain(" ".join(text.split()))
    lines = []
    for field in dataclasses.fields(entry):
        if field.init:
            default = "" if field.default is dataclasses.MISSING else f" = {_shown(field.default)}"
            meaning = f": {meanings[field.name]}" if field.name in meanings else ""
            lines.append(f"`{field.name}{default}`{meaning}")
    return "<br>".join(lines)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def registered(kind: str) -> Callable[[], str]:
    """The table of everything that is registered under a kind."""

    def make() -> str:
        entries = known(kind)  # first: it loads what registers the aliases
        aliases: dict[str, list[str]] = {}
        for alias, name in _ALIASES.get(kind, {}).items():
            aliases.setdefault(name, []).append(alias)
        rows = []
        for name, entry in entries:
            also = f" ({', '.join(f'`{alias}`' for alias in aliases[name])})" if name in aliases else ""
            rows.append((f"`{name}`{also}", described(entry), options_of(entry)))
        with_options = any(row[2] for row in rows)
        header = ("name", "what it does", "options") if with_options else ("name", "what it does")
        text = table(header, (row[: len(header)] for row in rows))
        spelled = ", ".join(f"`{expression}`" for expression in spellings(kind))
        return text + (f"\nShort spellings: names that match {spelled}.\n" if spelled else "")

    return make


TABLES: dict[str, Callable[[], str]] = {
    "PruningConfig": lambda: keys_of(PruningConfig),
    "Rule": lambda: keys_of(Rule),
    "Target": lambda: keys_of(Target),
    "ExampleInputs": lambda: keys_of(ExampleInputs),
    "Distillation": lambda: keys_of(Distillation),
    "Recovery": lambda: keys_of(Recovery),
    "RecoveryRate": lambda: keys_of(RecoveryRate),
    "RecoveryAverage": lambda: keys_of(RecoveryAverage),
    "Phase": lambda: keys_of(Phase),
    "ExperimentConfig": lambda: keys_of(experiment.ExperimentConfig),
    "ModelConfig": lambda: keys_of(experiment.ModelConfig),
    "DataConfig": lambda: keys_of(experiment.DataConfig),
    "OptimizerConfig": lambda: keys_of(experiment.OptimizerConfig),
    "SchedulerConfig": lambda: keys_of(experiment.SchedulerConfig),
    "RateFunction": lambda: keys_of(RateFunction),
    "SetRate": lambda: keys_of(SetRate),
    "RateSchedule": lambda: keys_of(RateSchedule),
    "RecipePruning": lambda: keys_of(Pruning),
    "RecipeSecondOrder": lambda: keys_of(SecondOrderPruning, Pruning),
    "LatencyConfig": lambda: keys_of(experiment.LatencyConfig),
    "OnnxConfig": lambda: keys_of(experiment.OnnxConfig),
    "forms": forms,
    **{
        kind: registered(kind)
        for kind in (
            *("pattern", "criterion", "normalizer", "mac_weighting", "schedule", "scope", "regularizer", "allocation"),
            *("dynamic", "runtime", "precision"),
        )
    },
}


def updated(text: str) -> str:
    """A document with its tables made again; those of measured counts (``make reliability``) stay.

    Raises:
        KeyError: a table that nothing makes.
    """
    if "<!-- begin: fuzzers -->" in text:
        return text
    return MARK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main() -> None:
    """Rewrite the documents that have tables."""
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if updated(text) != text:
            path.write_text(updated(text), encoding="utf-8")
            sys.stdout.write(f"{path.name} rewritten\n")


if __name__ == "__main__":
    main()
