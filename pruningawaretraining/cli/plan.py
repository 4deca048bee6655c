"""``pat plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pruningawaretraining.cli.common import check_out, measuring, reported, say_written, shape_of

Fractions = Annotated[list[float] | None, typer.Option(help="Fractions of the dense latency to keep: 0.5 0.33.")]
Macs = Annotated[list[float] | None, typer.Option(help="Fractions of the MACs to keep.")]
Params = Annotated[list[float] | None, typer.Option(help="Fractions of the parameters to keep.")]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Calibration data: of an experiment, instead of its data.root; of a model by name, an .npz file or a "
        "folder of images, and the criterion is then reconstruction."
    ),
]


def plan(
    source: Annotated[str, typer.Argument(metavar="MODEL_OR_CONFIG", help="A model by name, or an experiment config.")],
    latency: Fractions = None,
    macs: Macs = None,
    params: Params = None,
    criterion: Annotated[
        str | None, typer.Option(help="Instead of the config's; magnitude for a model by name.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Dense weights, such as a run's dense.safetensors.")] = None,
    data: Data = None,
    input_shape: Annotated[str | None, typer.Option(help="Shape of the example input, e.g. 1,3,224,224.")] = None,
    runtime: Annotated[str, typer.Option(help="onnxruntime, torch, torch_compile, cuda or tensorrt.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
    batch: Annotated[int, typer.Option(help="Rows of the example inputs for latency.")] = 1,
    predict: Annotated[bool, typer.Option("--predict", help="Measure no pruned copy: predict all latencies.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the plan to this JSON file; its folder must be there.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the library's log.")] = False,
) -> None:
    """Show which layers would go and what that would cost, without training: `--latency 0.5 0.33`."""
    with reported(debug, shaped=True):
        from pruningawaretraining.experiment.planning import Planning, plan_view, planned
        from pruningawaretraining.experiment.record import write_json
        from pruningawaretraining.session.plan import PlanOptions

        if out is not None:
            check_out(out, ".json")
        wanted = _wanted({"latency": latency, "macs": macs, "parameters": params})
        options = PlanOptions(runtime, threads, batch, measured=not predict)
        shape = None if input_shape is None else shape_of(input_shape)
        console = Console()
        with measuring(console):
            of = Planning(source, shape, weights, data, criterion)
            found = planned(of, wanted, options)
        console.print(plan_view(found, console.width))
        if out is not None:
            write_json(out, found.to_dict(), indent=2)
            say_written(out)


def _wanted(given: dict[str, list[float] | None]) -> list[tuple[str, float]]:
    """Every target, in the order of the options."""
    from pruningawaretraining.errors import ConfigError

    found = [(cost, value) for cost, values in given.items() for value in values or ()]
    names = {"latency": "--latency", "macs": "--macs", "parameters": "--params"}
    for cost, value in found:
        if not 0 < value <= 1:
            raise ConfigError(f"{names[cost]}: {value:g} is not allowed. Allowed: a number in (0, 1]")
    return list(dict.fromkeys(found))


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(plan)
