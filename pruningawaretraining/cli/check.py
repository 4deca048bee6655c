"""``pat check`` and ``pat convert``: what a config of any form will do, and the same in the native form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pruningawaretraining.cli.common import BAD_INPUT, check_out, reported, say_written

if TYPE_CHECKING:
    from torch import nn

    from pruningawaretraining.config import PruningConfig
    from pruningawaretraining.config.plan import Plan
    from pruningawaretraining.experiment.inspection import Inspected

Variables = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Variable that a recipe leaves open.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the library's log.")]


def check(
    configs: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG...", help="Configs in any form that is understood, or experiments."),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="A model by name, or an experiment config: shows layers. Of an experiment its own."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of an epoch, for fractions of epochs.")] = None,
    variables: Variables = None,
    debug: Debug = False,
) -> None:
    """Print what configs will do: form, rules, layers, sparsities, learning rates, and keys without effect."""
    failed = False
    for number, config in enumerate(configs):
        if number:
            typer.echo("")
        try:
            with reported(debug):
                _check(config, model, steps, _values(variables))
        except typer.Exit as stop:
            failed = failed or bool(stop.exit_code)
    if failed:
        raise typer.Exit(BAD_INPUT)


def convert(
    config: Annotated[str, typer.Argument(help="A config in any form that is understood.")],
    out: Annotated[Path | None, typer.Option(help="Write to this file (.yaml or .json) instead of the screen.")] = None,
    variables: Variables = None,
    debug: Debug = False,
) -> None:
    """Write a config in the native form, with what was read and has no effect as comments."""
    with reported(debug):
        from pruningawaretraining.config.plan import read_plan
        from pruningawaretraining.errors import ConfigError
        from pruningawaretraining.files import write_text

        if out is not None and check_out(out).suffix.lower() not in (".yaml", ".yml", ".json"):
            raise ConfigError(f"--out: {str(out)!r} has another ending. Allowed: .yaml, .yml, .json")
        plan = read_plan(config, _values(variables))
        text = _native(plan, is_json=out is not None and out.suffix.lower() == ".json")
        if out is None:
            typer.echo(text, nl=False)
        else:
            write_text(out, text)
            say_written(out)


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command()(check)
    app.command()(convert)


def _values(given: Sequence[str] | None) -> dict[str, Any]:
    """``NAME=VALUE`` pairs; numbers where they are numbers."""
    from pruningawaretraining.errors import ConfigError

    values: dict[str, Any] = {}
    for pair in given or ():
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set: {pair!r} is not an assignment. Allowed: name=value")
        try:
            values[name] = int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError:
            values[name] = text
    return values


def _check(config: str, model: str | None, steps: int | None, variables: dict[str, Any]) -> None:
    from pruningawaretraining.config.load import placed
    from pruningawaretraining.config.origin import in_users_words
    from pruningawaretraining.config.plan import note_lines, rate_lines, read_plan, rule_lines
    from pruningawaretraining.config.recovery import recovery_lines
    from pruningawaretraining.experiment.shipped import find_config
    from pruningawaretraining.session.build import built_rules

    plan = _of_experiment(find_config(config)) if _is_experiment(config) else None
    if plan is None:
        plan = read_plan(config, variables)
    elif model is None:
        model = config
    with placed(Path(plan.path)), in_users_words(plan.config.origin):
        built_rules(plan.config)
    found = None if model is None else _checked(model, plan)
    network = None if found is None else found.model
    reached = {} if found is None else _reached(found, plan.config, steps)
    epochs = "" if plan.epochs is None else f", {plan.epochs} epochs"
    typer.echo(f"{plan.path}: {plan.form}{epochs}")
    for number, rule in enumerate(plan.config.rules):
        layers = None if network is None or not rule.enabled else _chosen(network, rule, number)
        typer.echo("\n".join(rule_lines(rule, number, layers, steps, reached.get(number))))
    if plan.config.distillation is not None:
        options = plan.config.distillation
        typer.echo(f"distillation: weight {options.weight:g}, temperature {options.temperature:g}")
    for lines in (recovery_lines(plan.config.recovery), rate_lines(plan, steps), note_lines(plan)):
        if lines:
            typer.echo("\n".join(lines))


def _is_experiment(config: str) -> bool:
    """Whether it is an experiment: a shipped one by name, or a file with a model and none of the pruning forms."""
    from pruningawaretraining.config.load import find_file, form_of, read_mapping, training_settings
    from pruningawaretraining.experiment.shipped import shipped_configs

    if config in shipped_configs() and not Path(config).exists():
        return True
    values = read_mapping(find_file(config))
    return "model" in values and form_of(values) is None and not training_settings(values)


def _of_experiment(path: Path) -> Plan:
    """The plan of an experiment."""
    from pruningawaretraining.config.plan import Plan, noted
    from pruningawaretraining.config.rates import LearningRates
    from pruningawaretraining.experiment.schema import load_experiment

    with noted() as notes:
        experiment = load_experiment(path)
    rates = LearningRates(tuple(experiment.rates))
    return Plan(str(path), "experiment", experiment.pruning, rates, experiment.epochs, tuple(dict.fromkeys(notes)))


def _checked(name: str, plan: Plan) -> Inspected:
    """The model, once ``Pruning`` has taken the config for a copy of it.

    Raises:
        PruningError: what ``Pruning`` would say.
    """
    from copy import deepcopy
    from dataclasses import replace

    from pruningawaretraining.config.load import placed
    from pruningawaretraining.config.recovery import for_pruner
    from pruningawaretraining.experiment.inspection import load_inspected
    from pruningawaretraining.experiment.shipped import named
    from pruningawaretraining.session.build import inputs_of
    from pruningawaretraining.session.pruning import Pruning

    found, config = load_inspected(named(name)), plan.config
    own = inputs_of(config, found.model)
    found = found if own is None else replace(found, inputs=own)
    with placed(Path(plan.path)):
        Pruning(deepcopy(found.model), for_pruner(config), example_inputs=found.inputs)
    return found


def _reached(found: Inspected, config: PruningConfig, steps: int | None) -> dict[int, dict[int, float]]:
    """The sparsities that the shown events reach in the model; empty if they depend on the training."""
    from pruningawaretraining.config.plan import noted, shown_parts, shown_ticks
    from pruningawaretraining.errors import PruningError
    from pruningawaretraining.session.reached import reached_sparsities

    rules = dict(enumerate(config.rules))
    ticks = {number: shown for number, rule in rules.items() if (shown := shown_ticks(rule, steps))}
    parts = {number: shown_parts(rule, steps) or steps for number, rule in rules.items() if number in ticks}
    try:
        with noted("pruningawaretraining"):  # the config's own pruner has said it
            return reached_sparsities(found.model, config, found.inputs, ticks, parts)
    except PruningError:
        return {}


def _chosen(model: nn.Module, rule: Any, number: int) -> list[str]:
    """The layers that a rule chooses in a model."""
    from pruningawaretraining.patterns.channel_labels import producer_names
    from pruningawaretraining.registry import build

    key = rule.name or f"rules[{number}]"
    pattern = build("pattern", rule.pattern, f"{key}.pattern")
    if hasattr(pattern, "chosen"):
        chosen = pattern.chosen(model, rule.layers, rule.exclude, key)
        return [name for name in producer_names(model) if name in chosen] or sorted(chosen)
    return [one.name for one in pattern.build(model, rule.layers, rule.exclude).sets]


def _native(plan: Plan, is_json: bool) -> str:
    """The native form as text."""
    import json

    import yaml

    values = plan.config.model_dump(mode="json", exclude_defaults=True)
    if is_json:
        return json.dumps(values, indent=2) + "\n"
    comments = [f"# From {Path(plan.path).name} ({plan.form})."]
    if plan.rates.modifiers:
        comments.append("# Its learning rates are the loop's: load_recipe(file).rates, or 'rates' of an experiment.")
    comments += [f"# {note}" for note in plan.notes]
    return "\n".join(comments) + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
