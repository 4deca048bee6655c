"""What a run shows while it works: progress bars in a terminal, one plain line an epoch elsewhere."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LOG = logging.getLogger(__name__)


def epoch_text(row: Mapping[str, Any]) -> str:
    """One epoch of ``metrics.jsonl`` in a line: ``regularize  loss 0.312  accuracy 95.20%  MACs 62.0%``."""
    text = f"{row['phase']:<10} loss {row['loss']:.3f}  accuracy {100 * row['accuracy']:.2f}%"
    return text if row["model"] == "dense" else f"{text}  MACs {100 * row['macs']:.1f}%"


@dataclass(frozen=True)
class StageDisplay:
    """The training of one model, on the screen.

    Attributes:
        tick: called after every batch.
        epoch: called after every epoch with its line of ``metrics.jsonl``.
    """

    tick: Callable[[], None]
    epoch: Callable[[Mapping[str, Any]], None]


class Display:
    """Writes to a console; without one, to the log.

    Args:
        console: of the command line, or None.
        watch: takes every epoch's line of ``metrics.jsonl`` too; None for nobody.
    """

    def __init__(
        self, console: Console | None = None, watch: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        self.console, self.watch = console, watch

    def say(self, text: str) -> None:
        """One line."""
        if self.console is None:
            LOG.info(text)
        else:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, renderable: Any) -> None:
        """A table or the like; only on a console."""
        if self.console is not None:
            self.console.print(renderable)

    @contextlib.contextmanager
    def stage(self, title: str, epochs: int, done: int, steps: int) -> Iterator[StageDisplay]:
        """Show the training of a model.

        Args:
            title: what is trained.
            epochs, done: in all, and so far.
            steps: batches in an epoch.
        """
        if self.console is None or not self.console.is_terminal:
            self.say(title)
            yield StageDisplay(lambda: None, lambda row: self._plain(row, epochs))
            return
        columns = (
            TextColumn("[bold]{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.say(title)
        with Progress(*columns, console=self.console) as progress:
            outer = progress.add_task("epochs", total=epochs, completed=done, note="")
            inner = progress.add_task("batches", total=steps, note="")
            yield _bars(progress, outer, inner)
            progress.remove_task(inner)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Something that takes seconds."""
        if self.console is not None and self.console.is_terminal:
            with self.console.status(title):
                yield
        else:
            self.say(title)
            yield

    def _plain(self, row: Mapping[str, Any], epochs: int) -> None:
        self.say(f"  epoch {row['epoch'] + 1:>3}/{epochs}  {epoch_text(row)}  {row['seconds']:.1f} s")


def _bars(progress: Progress, outer: TaskID, inner: TaskID) -> StageDisplay:
    def after_epoch(row: Mapping[str, Any]) -> None:
        progress.update(outer, advance=1, note=epoch_text(row))
        progress.reset(inner)

    return StageDisplay(lambda: progress.advance(inner), after_epoch)
