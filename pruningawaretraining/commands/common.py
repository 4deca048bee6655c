"""What the commands of ``pat`` share: experiments by name, shapes, and errors as lines on stderr."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from pruningawaretraining.experiment.schema import ExperimentConfig

BAD_INPUT, INTERRUPTED = 2, 130


def experiment_of(config: str, data: Path | None, out: Path | None) -> ExperimentConfig:
    """The experiment, with what the command line says instead."""
    from pruningawaretraining.experiment.schema import load_experiment
    from pruningawaretraining.experiment.shipped import find_config

    experiment = load_experiment(find_config(config))
    changes: dict[str, Any] = {}
    if data is not None:
        changes["data"] = experiment.data.model_copy(update={"root": str(data)})
    if out is not None:
        changes["out"] = str(out)
    return experiment.model_copy(update=changes)


def shape_of(text: str) -> list[int]:
    """``1,3,224,224`` as sizes.

    Raises:
        ConfigError: it is no shape.
    """
    from pruningawaretraining.errors import ConfigError

    parts = text.replace("x", ",").strip("[]() ").split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"--input-shape: {text!r} is no shape. Allowed: whole numbers such as 1,3,224,224")
    return [int(part) for part in parts]


@contextlib.contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn what the user can mend into lines on stderr and an exit code."""
    from pruningawaretraining.errors import PruningError

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("pruningawaretraining").setLevel(logging.DEBUG if debug else logging.WARNING)
    errors = Console(stderr=True)
    try:
        yield
    except KeyboardInterrupt as stop:
        errors.print("interrupted; --resume goes on from the last whole epoch")
        raise typer.Exit(INTERRUPTED) from stop
    except (PruningError, OSError) as error:
        if debug:
            errors.print_exception()
        for line in str(error).splitlines() or [type(error).__name__]:
            errors.print(f"error: {line}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None
