"""Helpers of the commands of ``pat``: experiments by name, shapes, and errors as lines on stderr."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from pruningawaretraining.experiment.schema import ExperimentConfig

F = TypeVar("F", bound=Callable[..., Any])


class _PlainFlags:
    """Help of a command that shows flags without a type: ``--resume``, not ``--resume <bool>``."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters; those that take no value show none."""
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for one in found:
            if getattr(one, "is_flag", False) and one.metavar is None:
                one.metavar = ""
        return found


class Command(_PlainFlags, TyperCommand):
    """One command. An option that may be repeated takes several numbers at once: ``--latency 0.5 0.33``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click's command."""
        repeated = {name for one in self.params if getattr(one, "multiple", False) for name in one.opts}
        return super().parse_args(ctx, spread(args, repeated))


class Commands(_PlainFlags, TyperGroup):
    """All commands."""


def spread(args: Sequence[str], repeated: Collection[str]) -> list[str]:
    """``--latency 0.5 0.33`` as ``--latency 0.5 --latency 0.33``, for the options that may be repeated.

    Commas may stand between the numbers: ``--latency 0.5,0.33``.
    """
    found: list[str] = []
    option, values = "", 0
    for one in _without_commas(args, repeated):
        if one.startswith("--"):
            name, equals, _ = one.partition("=")
            option, values = name if name in repeated else "", len(equals)
        elif option and values and _is_number(one):
            found.append(option)
        elif values:
            option = ""
        else:
            values = 1
        found.append(one)
    return found


def _without_commas(args: Sequence[str], repeated: Collection[str]) -> Iterator[str]:
    """The arguments, with lists such as ``0.5,0.33`` behind a repeated option as numbers of their own."""
    listed = False
    for one in args:
        name, equals, value = one.partition("=")
        if one.startswith("--"):
            listed = name in repeated
        start = f"{name}=" if listed and equals and one.startswith("--") else ""
        parts = [part for part in (value if start else one).split(",") if part]
        if listed and parts and all(map(_is_number, parts)):
            yield start + parts[0]
            yield from parts[1:]
        else:
            yield one


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class App(typer.Typer):
    """A program whose help shows flags without a type."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=Commands, **options)

    def command(self, *arguments: Any, **options: Any) -> Callable[[F], F]:
        """See :meth:`typer.Typer.command`."""
        return super().command(*arguments, **{"cls": Command, **options})


OF_REST = "pruningawaretraining.masks.unprunable"
"""The logger that warns of layers that keep all their channels."""
BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143


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
        ConfigError: not a shape.
    """
    from pruningawaretraining.errors import ConfigError

    parts = text.replace("x", ",").strip("[]() ").split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"--input-shape: {text!r} is not a shape. Allowed: whole numbers such as 1,3,224,224")
    return [int(part) for part in parts]


def check_out(path: Path, suffix: str | None = None, key: str = "--out") -> Path:
    """The path of a file to write, before any work is done for it.

    Args:
        path: as given; its folder must be there.
        suffix: that it must have; None for any.
        key: the option, for messages.

    Raises:
        ConfigError: it cannot be written there.
    """
    from pruningawaretraining.errors import ConfigError
    from pruningawaretraining.files import place_of

    place_of(path, key, ConfigError)
    if suffix is not None and path.suffix.lower() != suffix:
        raise ConfigError(f"{key}: {str(path)!r} does not end in {suffix}. Allowed: {str(path.with_suffix(suffix))!r}")
    if not path.parent.is_dir():
        raise ConfigError(
            f"{key}: the folder {str(path.parent)!r} does not exist. Allowed: a file in an existing folder"
        )
    return path


def say_written(*paths: Path) -> None:
    """Say which files a command has written, on one line."""
    typer.echo(f"wrote {', '.join(str(path) for path in paths)}")


def _in_terms_of_commands(text: str, shaped: bool) -> str:
    """A message of the library without the arguments of its functions."""
    advice = "Allowed: another --input-shape" if shaped else "Allowed: data or example inputs that the model takes"
    text = re.sub(r"Pass example_inputs= as .*?forward_fn\(model, inputs\)", advice, text)
    text = text.replace("load_config(file, variables={...})", "--set NAME=VALUE")
    return text.removeprefix("example_inputs: ") if shaped else text


@contextlib.contextmanager
def _warnings_once() -> Iterator[None]:
    """Let each warning of the library pass once: a command makes several pruners of one model."""
    filters = [(handler, _once()) for handler in logging.getLogger().handlers]
    for handler, is_new in filters:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler, is_new in filters:
            handler.removeFilter(is_new)


def _once() -> Callable[[logging.LogRecord], bool]:
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or not record.name.startswith("pruningawaretraining"):
            return True
        seen = record.getMessage() in said
        said.add(record.getMessage())
        return not seen

    return is_new


@contextlib.contextmanager
def reported(debug: bool, shaped: bool = False, lists_rest: bool = False) -> Iterator[None]:
    """Turn what the user can mend into lines on stderr and an exit code.

    Args:
        debug: show the traceback too.
        shaped: whether the command has the option ``--input-shape``.
        lists_rest: whether it lists the layers that stay itself, so that nothing need warn of them.
    """
    from pruningawaretraining.errors import PruningError

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("pruningawaretraining").setLevel(logging.DEBUG if debug else logging.WARNING)
    logging.getLogger(OF_REST).setLevel(logging.ERROR if lists_rest and not debug else logging.NOTSET)
    errors = Console(stderr=True)
    try:
        with _warnings_once():
            yield
    except KeyboardInterrupt as stop:
        errors.print("; ".join(["interrupted", *map(str, stop.args)]), highlight=False, markup=False)
        raise typer.Exit(INTERRUPTED if type(stop) is KeyboardInterrupt else TERMINATED) from stop
    except (PruningError, OSError) as error:
        if debug:
            errors.print_exception()
        for line in _in_terms_of_commands(str(error), shaped).splitlines() or [type(error).__name__]:
            errors.print(f"error: {line}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None
    finally:
        logging.getLogger(OF_REST).setLevel(logging.NOTSET)


MEASURING = "pruningawaretraining.costs.latency.meter.progress"
"""The logger that says how far a first measurement has come."""


class _MeasuringBar(logging.Handler):
    """Shows records of :data:`MEASURING`: a line when a measurement begins, and a bar where there is a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console, self._bar = console, contextlib.ExitStack()
        self._progress: Progress | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """See :class:`logging.Handler`."""
        done, total, what = (vars(record)[key] for key in ("done", "total", "what"))
        if done == 0:
            self._begin(total, vars(record))
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=done, description=what)
        if done == total:
            self.close()

    def _begin(self, total: int, about: dict[str, Any]) -> None:
        text = f"measuring on {about['runtime']}, once for this machine: {about['title']} (kept in {about['folder']})"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        if self.console.is_terminal:
            columns = (BarColumn(20), TaskProgressColumn(), TimeRemainingColumn(compact=True), "{task.description}")
            with contextlib.suppress(LiveError):  # another bar is there: the line has to do
                self._progress = self._bar.enter_context(Progress(*columns, console=self.console))
                self._progress.add_task("", total=total)

    def close(self) -> None:
        """See :class:`logging.Handler`."""
        self._progress = None
        self._bar.close()
        super().close()


@contextlib.contextmanager
def measuring(console: Console) -> Iterator[None]:
    """Show the first measurement of latencies, which takes a while."""
    logger, bar = logging.getLogger(MEASURING), _MeasuringBar(console)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(bar)
    try:
        yield
    finally:
        logger.removeHandler(bar)
        bar.close()
        logger.setLevel(level)
        logger.propagate = propagate
