"""``pat sweep``: one experiment at several strengths of its regulariser, compared on one page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pruningawaretraining.analysis.compare import write_comparison
from pruningawaretraining.analysis.compare_figures import Compared, compared, with_dense_of
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment import record
from pruningawaretraining.experiment.run import run_experiment
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.report.run import load_run

STRENGTHS = (5e-2, 5e-3, 5e-4)
PAGE = "sweep.html"


@dataclass(frozen=True)
class SweepOptions:
    """Options of ``pat sweep``.

    Args:
        strengths: of the regulariser, one run each.
        folder: of the runs, which lie below it, and of the page.
        resume: keep finished runs and go on with interrupted ones.
        overwrite: replace them.
    """

    strengths: tuple[float, ...]
    folder: Path
    resume: bool = False
    overwrite: bool = False


def run_sweep(
    config: ExperimentConfig, options: SweepOptions, console: Console | None = None
) -> tuple[list[Compared], Path]:
    """Run the experiment at every strength. Only the first run trains the dense baseline: it is the same for all.

    Returns:
        The runs, and the page that compares them.

    Raises:
        ConfigError: no rule has a regulariser, a strength is negative or there twice, or as in ``run_experiment``.
    """
    if len(set(options.strengths)) < len(options.strengths):
        raise ConfigError(f"--reg: {list(options.strengths)} names a strength twice")
    configs = [_at(config, strength, number, options.folder) for number, strength in enumerate(options.strengths)]
    runs: list[Compared] = []
    for number, one in enumerate(configs, 1):
        if console is not None:
            text = f"run {number} of {len(configs)}, strength {options.strengths[number - 1]:g}: {one.folder()}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        run_experiment(one, resume=options.resume, overwrite=options.overwrite, console=console)
        runs.append(_read(one.folder(), options.folder, runs[0] if runs else None))
    page = options.folder / PAGE
    write_comparison(runs, page, f"{config.name}: {len(runs)} strengths")
    return runs, page


def _at(config: ExperimentConfig, strength: float, number: int, folder: Path) -> ExperimentConfig:
    """The experiment with one strength."""
    rules = [with_strength(rule, strength) for rule in config.pruning.rules]
    if not any(rule.regularizer for rule in rules):
        raise ConfigError("pruning.rules: none has a regularizer. Allowed: one with a 'strength', such as growing_l2")
    pruning = config.pruning.model_copy(update={"rules": rules})
    name = f"{strength:g}"
    changes = {"pruning": pruning, "name": f"{config.name} {name}", "out": str(folder / name)}
    return config.model_copy(update={**changes, "dense_baseline": config.dense_baseline and number == 0})


def with_strength(rule: Rule, strength: float) -> Rule:
    """The rule with another strength of its regulariser; without one, the rule as it is.

    Raises:
        ConfigError: the regulariser has no strength, or not this one.
    """
    if rule.regularizer is None:
        return rule
    given: Mapping[str, Any] = {"type": rule.regularizer} if isinstance(rule.regularizer, str) else rule.regularizer
    values = {**rule.model_dump(exclude_unset=True), "regularizer": {**given, "strength": strength}}
    return Rule.model_validate(values)


def _read(folder: Path, below: Path, first: Compared | None) -> Compared:
    """A finished run; one without a baseline is compared with the baseline of the first."""
    run = load_run(folder)
    if first is not None:
        run = with_dense_of(run, first.run)
    return compared(folder.name, run, f"{folder.relative_to(below)}/{record.REPORT}")
