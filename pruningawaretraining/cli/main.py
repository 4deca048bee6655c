"""The command line: ``pat run``, ``pat demo``, ``pat oneshot``, ``pat inspect``, ``pat check``, ``pat convert`` ...

Bad input ends with one line on stderr for each problem and exit code 2; ``--debug`` adds the traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from pruningawaretraining.cli import analysis, check, latency, new, plan
from pruningawaretraining.cli.common import App, check_out, experiment_of, measuring, reported, say_written, shape_of
from pruningawaretraining.version import __version__

app = App(
    name="pat",
    help="Prune neural networks while they train: mask on a schedule, remove at the MAC target, export, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[
    Path | None, typer.Option(help="Folder (or .npz file) of the data, instead of the config's data.root.")
]
Out = Annotated[Path | None, typer.Option(help="Folder of the run; runs/<name> without it.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")]
Board = Annotated[bool, typer.Option("--tensorboard", help="Log to the run's folder tensorboard/ too.")]
Wandb = Annotated[str | None, typer.Option(help="Project of Weights & Biases to log to.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the library's log.")]


@dataclass(frozen=True)
class Loggers:
    """Where epochs are logged beside ``metrics.jsonl``: a project of Weights & Biases, and TensorBoard."""

    wandb: str | None = None
    tensorboard: bool = False


SCHEMAS = ("experiment", "pruning")
"""Kinds of configs that have a JSON schema."""


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"pat {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="An experiment config (.yaml or .json), or the name of a shipped one.")],
    data: Data = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    wandb: Wandb = None,
    tensorboard: Board = False,
    debug: Debug = False,
) -> None:
    """Run an experiment: train, prune, fine-tune, save, export, measure, report."""
    with reported(debug):
        _run(config, data, out, resume, overwrite, Loggers(wandb, tensorboard))


@app.command()
def demo(out: Out = None, resume: Resume = False, debug: Debug = False) -> None:
    """Run the shipped demo: a small residual network on real handwritten digits. Replaces the demo that ran before."""
    with reported(debug):
        _run("demo", None, out, resume, overwrite=not resume)


@app.command()
def oneshot(
    config: Annotated[str, typer.Argument(help="An experiment config whose model has weights; nothing is trained.")],
    sparsities: Annotated[
        list[float] | None, typer.Option(help="Fractions to remove, all from one calibration; the rule's own if none.")
    ] = None,
    data: Data = None,
    out: Out = None,
    save: Annotated[bool, typer.Option("--save", help="Save every pruned model.")] = False,
    compensation: Annotated[
        str, typer.Option(help="Of removed channels: none, bias, bias_variance or least_squares.")
    ] = "none",
    norms: Annotated[int, typer.Option(help="Batches over which batch norms are measured again.")] = 0,
    overwrite: Overwrite = False,
    wandb: Wandb = None,
    debug: Debug = False,
) -> None:
    """Prune a trained model at once, to several sparsities, and compare: `--sparsities 0.5 0.6 0.75 0.9`."""
    with reported(debug):
        from pruningawaretraining.experiment.one_shot_run import OneShotOptions, results_table, run_one_shot, written_in
        from pruningawaretraining.session.one_shot import AfterPruning

        experiment = experiment_of(config, data, out)
        levels = tuple(sparsities) if sparsities else None
        options = OneShotOptions(levels, experiment.folder(), save, AfterPruning(compensation, norms), wandb, overwrite)
        console = Console()
        with measuring(console):
            rows = run_one_shot(experiment, options)
        console.print(results_table(rows))
        say_written(*written_in(experiment.folder()))


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="MODEL_OR_CONFIG", help="A model by name, or an experiment config.")],
    input_shape: Annotated[str | None, typer.Option(help="Shape of the example input, e.g. 1,3,224,224.")] = None,
    data: Data = None,
    groups: Annotated[bool, typer.Option("--groups", help="Print every set with its layers, and their costs.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw which layers are coupled, as an SVG file.")] = None,
    debug: Debug = False,
) -> None:
    """Print a model's layers as a tree: widths, which are coupled, MACs, and which stay and why."""
    with reported(debug, shaped=True, lists_rest=True):
        from pruningawaretraining.experiment.inspection import groups_picture, groups_text, layers_table, load_inspected
        from pruningawaretraining.experiment.model_tree import tree_view
        from pruningawaretraining.experiment.shipped import named
        from pruningawaretraining.files import write_text

        if picture is not None:
            check_out(picture, key="--picture")
        shape = None if input_shape is None else shape_of(input_shape)
        inspected = load_inspected(named(source), shape, data=data)
        if groups:
            typer.echo(groups_text(inspected))
        console = Console()
        console.print(layers_table(inspected) if groups else tree_view(inspected, console.width))
        if picture is not None:
            write_text(picture, groups_picture(inspected))
            say_written(picture)


@app.command()
def schema(
    of: Annotated[str, typer.Argument(help="Of which kind of config: experiment or pruning.")] = "experiment",
) -> None:
    """Print the JSON schema of a config, for editors to complete and check."""
    with reported(debug=False):
        from pruningawaretraining.errors import ConfigError, unknown

        if of not in SCHEMAS:
            raise ConfigError(unknown("schema", of, SCHEMAS))
        from pruningawaretraining.config import json_schema
        from pruningawaretraining.experiment.schema import experiment_schema

        printed = json_schema() if of == "pruning" else experiment_schema()
        typer.echo(json.dumps(printed, indent=2))


analysis.add_to(app)
check.add_to(app)
latency.add_to(app)
new.add_to(app)
plan.add_to(app)


def main() -> None:
    """The entry point. Models of the user's own are imported from the current folder, as with ``python -m``."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    app()


def _run(
    config: str,
    data: Path | None,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    loggers: Loggers = Loggers(),
) -> None:
    from pruningawaretraining.experiment.run import run_experiment
    from pruningawaretraining.experiment.tracking import each_of, on_board, tracked

    experiment = experiment_of(config, data, out)
    console = Console()
    if os.environ.get("RANK", "0") != "0":  # of several processes, the first logs
        loggers = Loggers()
    board = experiment.folder() / "tensorboard" if loggers.tensorboard else None
    with (
        tracked(loggers.wandb, experiment.name) as first,
        on_board(board, resume=resume) as second,
        measuring(console),
    ):
        watch = each_of(first, second)
        summary = run_experiment(experiment, resume=resume, overwrite=overwrite, console=console, watch=watch)
    if summary:  # of several processes, the first has it
        _show(summary, experiment.folder(), console)


def _show(summary: Mapping[str, Any], folder: Path, console: Console) -> None:
    """The end of a run: dense against pruned, the chain of checks, and what was written where."""
    from pruningawaretraining.report.family import family_table
    from pruningawaretraining.report.html import duration
    from pruningawaretraining.report.run import REPORT
    from pruningawaretraining.report.tables import chain, comparison_table

    console.print(comparison_table(summary))
    if summary.get("family"):
        console.print(family_table(summary))
    text = Text()
    for number, link in enumerate(chain(summary)):
        if number == 0:
            text.append(link.left)
        sign, style = {True: ("=", "green"), False: ("≠", "bold red"), None: ("→", "dim")}[link.holds]
        text.append(f" {sign} ", style)
        text.append(link.right)
        text.append(" (not run)" if link.difference is None else f" ({link.difference:.1e})", "dim")
    if text:
        console.print(text, Text("largest differences of the outputs", "dim"), soft_wrap=True)
    target, pruned, dense = (summary.get(key) or {} for key in ("target", "pruned", "dense"))
    if target.get("macs") is not None and pruned["macs"] > target["macs"] * dense["macs"]:
        kept = f"{pruned['macs'] / dense['macs']:.3f} of the MACs are kept, {target['macs']} was asked for"
        console.print(f"[yellow]The target was not met: {kept}. Let the rule's end lie before the last epoch.[/yellow]")
    say_written(folder / REPORT)
    others = ", ".join(name for name in summary.get("files", ()) if name != REPORT)
    took = duration(summary.get("seconds"))
    console.print(f"beside it {others}; it took {took}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
