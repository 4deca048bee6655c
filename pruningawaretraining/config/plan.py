"""Preview a config of any form before training: events, sparsities, learning rates, keys without effect."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pruningawaretraining.config.load import find_file, form_of, load_config, read_mapping
from pruningawaretraining.config.options import type_of
from pruningawaretraining.config.rates import LearningRates
from pruningawaretraining.config.recipe import load_recipe
from pruningawaretraining.config.schema import PruningConfig, Rule
from pruningawaretraining.config.structures import listed
from pruningawaretraining.registry import lookup
from pruningawaretraining.schedules import ROUNDING

BARS = "▁▂▃▄▅▆▇█"
MOST_COLUMNS = 12
"""Events in a table; more are thinned out."""
LEAST_PARTS, MOST_PARTS = 2, 100
"""Into how many parts an epoch is divided for events at fractions of one, where its steps are not known."""
WIDTH = 60
"""Characters of a drawing."""


@dataclass(frozen=True)
class Plan:
    """A config, and the messages about it.

    Args:
        path: of the file.
        form: "native", or the name of the dialect.
        config: in the native form.
        rates: learning rates of a recipe.
        epochs: how long a recipe trains; None for other forms.
        notes: keys that have no effect here, or another one than where they come from, with the reason.
    """

    path: str
    form: str
    config: PruningConfig
    rates: LearningRates
    epochs: int | None
    notes: tuple[str, ...]


class _Notes(logging.Handler):
    """Keeps messages."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.messages.append(record.getMessage())


@contextmanager
def noted(where: str = "pruningawaretraining.config") -> Iterator[list[str]]:
    """Collect the warnings of a logger (that of reading configs) inside the block in a list instead of the log."""
    logger, handler = logging.getLogger(where), _Notes()
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def read_plan(source: str | os.PathLike[str], variables: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a config file.

    Args:
        source: the file, or a folder with one.
        variables: see :func:`~pruningawaretraining.config.load.load_config`.

    Raises:
        ConfigError: it cannot be read.
    """
    path = find_file(source)
    form = form_of(read_mapping(path)) or "none"
    with noted() as notes:
        if form == "sparseml":
            recipe = load_recipe(path, variables)
            return Plan(str(path), form, recipe.pruning, recipe.rates, recipe.epochs, tuple(dict.fromkeys(notes)))
        config = load_config(path, variables)
    return Plan(str(path), form, config, LearningRates(), None, tuple(dict.fromkeys(notes)))


def events_of(rule: Rule, steps: int | None = None) -> list[tuple[int, float]]:
    """(tick, sparsity) of every event of a rule; nothing for one that only locks, lifts or regularises."""
    if not rule.enabled or rule.mode != "prune" or not rule.target.given:
        return []
    times = rule.timeline(steps)
    ticks = times.events()
    lifted = ticks[1:-1:2] if getattr(lookup("dynamic", type_of("dynamic", rule.dynamic)), "alternates", False) else ()
    return [(now, 0.0 if now in lifted else times.sparsity(now)) for now in ticks]


def shown_parts(rule: Rule, steps: int | None) -> int | None:
    """Parts of an epoch in which events at fractions of epochs are shown, where its steps are not known."""
    times = rule.timeline(steps)
    if times.counts != "epoch" or not times.fractional:
        return None
    moments = [m for one in times.stretches for m in (one.start, one.end, one.every) if m >= 1 / MOST_PARTS]
    whole = (parts for parts in range(LEAST_PARTS, MOST_PARTS) if all(_is_whole(m * parts) for m in moments))
    return next(whole, MOST_PARTS)


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) < ROUNDING


def table(columns: Sequence[tuple[str, ...]], head: tuple[str, ...]) -> list[str]:
    """Lines of a table, with a column for each tuple; thinned out in the middle where there are many."""
    shown = thinned(list(columns), ("...",) * len(head))
    widths = [max(map(len, column)) for column in shown]
    first = max(map(len, head))
    rows = [
        [head[row].ljust(first), *(column[row].rjust(w) for column, w in zip(shown, widths, strict=True))]
        for row in range(len(head))
    ]
    return ["  " + "  ".join(row) for row in rows]


def thinned(columns: list[Any], gap: Any = None) -> list[Any]:
    """The columns that a table shows: the first and last ones where there are many, with a gap if one is given."""
    half = MOST_COLUMNS // 2
    if len(columns) <= MOST_COLUMNS:
        return columns
    return [*columns[:half], *([] if gap is None else [gap]), *columns[-half:]]


def shown_ticks(rule: Rule, steps: int | None) -> list[int]:
    """Ticks of the events that a table shows; none where a target of MACs and the like decides how far each goes."""
    if rule.target.lists or rule.target.about_costs:
        return []
    return [now for now, _ in thinned(events_of(rule, shown_parts(rule, steps) or steps))]


def drawing(values: Sequence[float], most: float | None = None) -> str:
    """Values as a line of bars, one for each, thinned out to :data:`WIDTH`."""
    if len(values) > WIDTH:
        values = [values[round(place * (len(values) - 1) / (WIDTH - 1))] for place in range(WIDTH)]
    top = max(values) if most is None else most
    return "".join(BARS[min(int(value / top * len(BARS)), len(BARS) - 1)] if top > 0 else BARS[0] for value in values)


def curve(events: Sequence[tuple[int, float]], until: int) -> list[float]:
    """The sparsity that holds at each tick from 0 on."""
    values, reached, known = [], 0.0, dict(events)
    for now in range(min(0, *known, 0), until + 1):
        reached = known.get(now, reached)
        if now >= 0:
            values.append(reached)
    return values


def rule_lines(
    rule: Rule,
    number: int,
    layers: Sequence[str] | None,
    steps: int | None,
    reached: Mapping[int, float] | None = None,
) -> list[str]:
    """Describe the effect of one rule, line by line.

    Args:
        rule: the rule.
        number: of it, where it has no name.
        layers: those that it chooses in a model; None where there is no model.
        steps: optimizer steps of an epoch, where they are known.
        reached: tick of an event -> sparsity that it leaves in whole groups of a model; None where that is not known.
    """
    what = f"{_spec(listed(rule.pattern))} by {_spec(rule.criterion)}, {rule.scope}"
    lines = [f"rule {rule.name or f'rules[{number}]'}: {what}"]
    if not rule.enabled:
        return [f"{lines[0]}: off"]
    entries = "all" if rule.layers is None else ", ".join(rule.layers)
    without = f"; without {', '.join(rule.exclude)}" if rule.exclude else ""
    lines.append(f"  layers  {entries}{without}")
    if layers is not None:
        lines.append(f"  chosen  {len(layers)}: {', '.join(layers[:6])}{', ...' if len(layers) > 6 else ''}")
    lines += _target_lines(rule, steps, reached)
    if rule.regularizer is not None:
        lines.append(f"  penalty {_spec(rule.regularizer)}")
    return lines


def _target_lines(rule: Rule, steps: int | None, reached: Mapping[int, float] | None) -> list[str]:
    if rule.mode != "prune":
        what = {"lock": "keep the zeros that are there", "unprune": "lift the masks"}[rule.mode]
        return [f"  {rule.unit} {rule.timeline(steps).first}: {what}"]
    parts = shown_parts(rule, steps)
    events, unit = events_of(rule, parts or steps), rule.timeline(steps).counts
    costs = rule.target.model_dump(
        exclude_none=True, include={"macs", "parameters", "peak_memory", "latency", "latency_ms"}
    )
    if rule.target.lists:
        return _member_lines(rule, steps)
    lines = [f"  until   {key} <= {value:g}" for key, value in costs.items()]
    if events:
        if parts and any(one.every < 1 / MOST_PARTS for one in rule.timeline().stretches):
            lines.append(f"  events  at every step; --steps shows them, here {parts} of an epoch")
        head, rows = _rows(rule, events, reached or {})
        lines += table([(f"{now / (parts or 1):g}", *rows[now]) for now, _ in events], (unit, *head))
        lines.append(f"  {drawing(curve(events, events[-1][0] + max(1, events[-1][0] // 10)), 1.0)}")
    if rule.stable is not None:
        lines.append(f"  begins  when masks agree by {rule.stable:g} with those before; drawn as if at {rule.start:g}")
    if rule.at_init and rule.start <= 0:
        lines.append("  at once, when the pruner is made")
    return lines


def _limit(key: str, value: float) -> str:
    return f"{key} {value:g}" if key == "sparsity" else f"{key} <= {value:g}"


def _rows(
    rule: Rule, events: Sequence[tuple[int, float]], reached: Mapping[int, float]
) -> tuple[tuple[str, ...], dict[int, tuple[str, ...]]]:
    """Heads of a table's rows, and its columns by tick: what is asked, and what is reached where that differs."""
    asked = {now: f"{value:.4g}" for now, value in events}
    if rule.target.about_costs:
        return ("at most",), {now: (value,) for now, value in asked.items()}
    there = {now: f"{value:.4g}" for now, value in reached.items() if now in asked}
    if not there:
        exact = type_of("pattern", rule.pattern) == "unstructured"
        return ("sparsity" if exact else "about",), {now: (value,) for now, value in asked.items()}
    if all(asked[now] == value for now, value in there.items()):
        return ("sparsity",), {now: (value,) for now, value in asked.items()}
    return ("sparsity", "reached"), {now: (value, there.get(now, "")) for now, value in asked.items()}


def _member_lines(rule: Rule, steps: int | None) -> list[str]:
    """A line for each member of a family: its target, when its events are, and how long it is fine-tuned."""
    lines, unit = [], rule.timeline(steps).counts
    members = rule.members()
    for number, (name, one) in enumerate(zip(rule.target.names, members, strict=True)):
        costs = ", ".join(_limit(key, value) for key, value in one.target.numbers.items())
        times = one.timeline(steps)
        after = members[number + 1].timeline(steps).first if number + 1 < len(members) else None
        rest = "then until the end" if after is None else f"held until {unit} {after}"
        lines.append(f"  member  {name}: {costs} in {unit} {times.last}, events from {times.first}; {rest}")
    return lines


def _spec(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    if not isinstance(value, Mapping):
        return str(value)
    options = ", ".join(f"{key} {inner}" for key, inner in value.items() if key != "type" and inner is not None)
    return f"{value['type']} ({options})" if options else str(value["type"])


def rate_lines(plan: Plan, steps: int | None) -> list[str]:
    """The learning rates of a recipe, as a table and a drawing."""
    if not plan.rates.modifiers or plan.epochs is None:
        return []
    parts = 4
    moments = [number / parts for number in range(plan.epochs * parts)]
    values = [plan.rates.at(moment, steps) for moment in moments]
    known = [(moment, value) for moment, value in zip(moments, values, strict=True) if value is not None]
    whole = [(f"{moment:g}", f"{value:.3g}") for moment, value in known if moment == int(moment)]
    return ["learning rate", *table(whole, ("epoch", "rate")), f"  {drawing([value for _, value in known])}"]


def note_lines(plan: Plan) -> list[str]:
    """Keys that have no effect, or another one."""
    return ["without effect, or different here", *(f"  {note}" for note in plan.notes)] if plan.notes else []
