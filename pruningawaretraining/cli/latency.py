"""``pat latency``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pruningawaretraining.cli.common import check_out, reported, say_written, shape_of

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL_OR_CHECKPOINT...",
        help="Folders of runs, pruned checkpoints (.safetensors), ONNX files, models or experiments by name.",
    ),
]
DenseModel = Annotated[
    str | None,
    typer.Option(help="Of checkpoints and folders of runs: the dense model by name, or an experiment config."),
]
Trust = Annotated[bool, typer.Option("--trust", help="Let folders of runs import the models that their configs name.")]
Data = Annotated[
    Path | None, typer.Option(help="Folder (or .npz file) of the data of experiments, instead of their data.root.")
]
Rows = Annotated[Path | None, typer.Option(help="Write the rows to this JSON file; its folder must be there.")]
Plot = Annotated[Path | None, typer.Option(help="Draw accuracy against latency into this file (.svg).")]


def latency(
    sources: Sources,
    model: DenseModel = None,
    trust: Trust = False,
    data: Data = None,
    input_shape: Annotated[str | None, typer.Option(help="Shape of the example input, e.g. 1,3,224,224.")] = None,
    runtime: Annotated[str, typer.Option(help="onnxruntime, torch, torch_compile, cuda or tensorrt.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
    batch: Annotated[int, typer.Option(help="Rows of the example inputs.")] = 1,
    repeats: Annotated[int, typer.Option(help="Turns of each model, a few runs each; the median counts.")] = 50,
    out: Rows = None,
    plot: Plot = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the library's log.")] = False,
) -> None:
    """Time dense and pruned models side by side, in turns, with MACs, parameters, memory and size on disk."""
    with reported(debug, shaped=True):
        from pruningawaretraining.experiment.timing import (
            candidates,
            timed,
            write_timing,
        )
        from pruningawaretraining.experiment.timing_plot import draw_timing
        from pruningawaretraining.experiment.timing_tables import noise_text, timing_tables

        for path, suffix, key in ((out, None, "--out"), (plot, ".svg", "--plot")):
            if path is not None:
                check_out(path, suffix, key)
        shape = None if input_shape is None else shape_of(input_shape)
        rows = timed(candidates(sources, model, shape, trusted=trust, data=data), runtime, threads, batch, repeats)
        title = f"{runtime}, batch {batch}, {threads} thread{'s' if threads > 1 else ''}"
        console = Console()
        for table in timing_tables(rows, title, console.width, batch):
            console.print(table)
        if noise_text(rows):
            console.print(noise_text(rows), style="yellow", highlight=False, markup=False, soft_wrap=True)
        if out is not None:
            write_timing(rows, out)
            say_written(out)
        if plot is not None:
            draw_timing(rows, plot, title)
            say_written(plot)


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(latency)
