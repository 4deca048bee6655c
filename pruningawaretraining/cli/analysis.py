"""``pat analyze``, ``pat sweep`` and ``pat sensitivity``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text

from pruningawaretraining.cli.common import check_out, experiment_of, reported, say_written, shape_of

if TYPE_CHECKING:
    from pruningawaretraining.analysis.compare_figures import Compared

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the library's log.")]
DataRoot = Annotated[
    Path | None, typer.Option("--data", help="Folder (or .npz file) of the data, instead of the config's data.root.")
]


def analyze(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_CHECKPOINTS...",
            help="Folders of runs, folders of the checkpoints (state dicts: .pt, .safetensors ...) of one training, or "
            "single checkpoints, each shown by itself.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="For checkpoints: the dense model by name, package.module:factory, or an experiment config."),
    ] = None,
    input_shape: Annotated[str | None, typer.Option(help="Shape of the example input, e.g. 1,3,224,224.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page: a file that ends in .html, in a folder that is there; a .json and a .csv lie beside it. "
            "analysis.html without it, in the run's folder if one run is given, otherwise in the current one."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw the norms of groups through training; say from which epoch to prune, and below which norm."""
    with reported(debug, shaped=True):
        from pruningawaretraining.analysis.compare import write_comparison
        from pruningawaretraining.analysis.sources import load_sources
        from pruningawaretraining.experiment.shipped import named
        from pruningawaretraining.report.run import NORMS

        console = Console()
        of_one_run = len(sources) == 1 and (sources[0] / NORMS).is_file()
        out = check_out(out or (sources[0] if of_one_run else Path()) / "analysis.html", ".html")
        shape = None if input_shape is None else shape_of(input_shape)

        def shown(paths: Sequence[Path]) -> Any:
            return track(paths, "reading checkpoints", console=console, disable=not console.is_terminal)

        runs = load_sources(sources, None if model is None else named(model), shape, out, shown)
        paths = write_comparison(runs, out, " / ".join(one.name for one in runs))
        _print_choices(runs, console)
        say_written(*paths)


def _print_choices(runs: Sequence[Compared], console: Console) -> None:
    from pruningawaretraining.analysis.compare import advice, reached, start_of, told

    headings = ("strength", "start after epoch", "threshold", "near zero", "accuracy")
    table = Table(Column("run", overflow="fold"), *headings, box=box.SIMPLE)
    for one in runs:
        choice, accuracy = one.choice, reached(one.run)["accuracy"]
        strength = "–" if one.strength is None else f"{one.strength:g}"
        shown = "–" if accuracy is None else f"{accuracy:.2%}"
        table.add_row(
            Text(one.name), strength, start_of(choice), f"{choice.threshold:.2g}", f"{choice.share:.1%}", shown
        )
    console.print(table)
    together = advice(runs)
    for one in runs:
        console.print(f"{one.name}: {told(one, not together)}", highlight=False, markup=False, soft_wrap=True)
    if together:
        console.print(f"Of these: {together}", highlight=False, markup=False, soft_wrap=True)


def sweep(
    config: Annotated[str, typer.Argument(help="An experiment config, or the name of a shipped one.")],
    reg: Annotated[
        list[float] | None, typer.Option(help="Strengths of the regulariser; 5e-2 5e-3 5e-4 without it.")
    ] = None,
    data: DataRoot = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; runs/<name>-sweep without it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished runs, go on with interrupted ones.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the runs that are there.")] = False,
    debug: Debug = False,
) -> None:
    """Run an experiment at several strengths of its regulariser, and compare: `--reg 5e-2 5e-3 5e-4`."""
    with reported(debug):
        from pruningawaretraining.analysis.sweep import STRENGTHS, SweepOptions, run_sweep

        experiment = experiment_of(config, data, None)
        folder = out or Path("runs") / f"{experiment.name}-sweep"
        strengths = tuple(reg or STRENGTHS)
        console = Console()
        runs, page = run_sweep(experiment, SweepOptions(strengths, folder, resume, overwrite), console)
        _print_choices(runs, console)
        say_written(page)


def sensitivity(
    config: Annotated[str, typer.Argument(help="An experiment config whose model has weights; nothing is trained.")],
    sparsities: Annotated[
        list[float] | None, typer.Option(help="Fractions to mask in each set; 0.1 0.25 0.5 0.75 0.9 without it.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="How much accuracy a set alone may cost.")] = 0.01,
    images: Annotated[int, typer.Option(help="Test images to measure on; 0 for all.")] = 1000,
    weights: Annotated[Path | None, typer.Option(help="Dense weights, such as a run's dense.safetensors.")] = None,
    data: DataRoot = None,
    out: Annotated[
        Path,
        typer.Option(
            help="The result: a file that ends in .json, in a folder that is there; a .html page lies beside it."
        ),
    ] = Path("sensitivity.json"),
    debug: Debug = False,
) -> None:
    """Accuracy as each set of layers alone is pruned; the result can cap a rule: `max_sparsity_from`."""
    with reported(debug):
        from pruningawaretraining.analysis.sensitivity import GRID, SensitivityOptions, measure, write_sensitivity

        check_out(out, ".json")
        experiment = experiment_of(config, data, None)
        levels = tuple(sorted(set(sparsities or GRID)))
        console = Console()

        def shown(names: Sequence[str]) -> Any:
            return track(names, "pruning each set alone", console=console, disable=not console.is_terminal)

        found = measure(experiment, SensitivityOptions(levels, tolerance, images, weights), shown)
        paths = write_sensitivity(found, out)
        headings = ("groups", *(f"{level:g}" for level in levels), "cap")
        table = Table(Column("set", overflow="fold"), *headings, box=box.SIMPLE)
        for name, one in found["sets"].items():
            row = [f"{100 * (at['accuracy'] - found['accuracy']):+.1f}" for at in one["rows"]]
            table.add_row(Text(name), str(one["groups"]), *row, f"{one['max_sparsity']:g}")
        console.print(
            f"{found['accuracy']:.2%} on {found['images']} images; change in points at each sparsity; cap: max_sparsity"
        )
        console.print(table)
        say_written(*paths)


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    for command in (analyze, sweep, sensitivity):
        app.command()(command)
