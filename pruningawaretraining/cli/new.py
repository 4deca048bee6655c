"""``pat new``: a commented config for a model by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pruningawaretraining.cli.common import check_out, reported, say_written, shape_of


def new(
    model: Annotated[
        str,
        typer.Argument(
            help="A torchvision or timm model by name, a class of transformers (transformers:BertModel), or "
            "package.module:callable."
        ),
    ],
    epochs: Annotated[int, typer.Option(help="Epochs of the training, from which start and end are chosen.")] = 30,
    data: Annotated[str, typer.Option(help="Data set by name, as in a config's data.name.")] = "digits",
    pruning: Annotated[
        bool, typer.Option("--pruning", help="Only the pruning config, for a loop of your own.")
    ] = False,
    input_shape: Annotated[str | None, typer.Option(help="Shape of the example input, e.g. 1,3,224,224.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; experiment.yaml or pruning.yaml without it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the library's log.")] = False,
) -> None:
    """Write a commented experiment for a model: its layers, and when to start and end pruning."""
    with reported(debug, shaped=True, lists_rest=True):
        from pruningawaretraining.errors import ConfigError
        from pruningawaretraining.experiment.inspection import load_inspected
        from pruningawaretraining.experiment.new_config import NewConfig, new_config
        from pruningawaretraining.files import write_text

        path = check_out(out or Path("pruning.yaml" if pruning else "experiment.yaml"), ".yaml")
        if path.exists() and not overwrite:
            raise ConfigError(f"--out: {str(path)!r} exists. Allowed: another file, or --overwrite")
        if epochs < 1:
            raise ConfigError(f"--epochs: {epochs} is not allowed. Allowed: 1 or more")
        inspected = load_inspected(model, None if input_shape is None else shape_of(input_shape))
        write_text(path, new_config(inspected, NewConfig(model, epochs, data, str(path), pruning)))
        say_written(path)


def add_to(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(new)
