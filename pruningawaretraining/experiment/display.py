"""Progress of a run: bars in a terminal, one plain line per epoch elsewhere."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


def epoch_text(row: Mapping[str, Any]) -> str:
    """One epoch of ``metrics.jsonl`` in a line: ``regularize  loss 0.312  accuracy 95.20%  MACs 62.0%``.

    Where the MACs stay because weights are only set to zero, ``sparsity 50.0%`` follows.
    """
    text = f"{row['phase']:<10} loss {row['loss']:.3f}  accuracy {100 * row['accuracy']:.2f}%"
    return text if row["model"] == "dense" else f"{text}  {_kept(row)}"


def short_text(row: Mapping[str, Any]) -> str:
    """The same for a line that a progress bar shares: ``regularize  acc 95.20%  MACs 62.0%``."""
    text = f"{row['phase']:<10}  acc {100 * row['accuracy']:.2f}%"
    return text if row["model"] == "dense" else f"{text}  {_kept(row)}"


def _kept(row: Mapping[str, Any]) -> str:
    text, zeros = f"MACs {100 * row['macs']:.1f}%", float(row.get("sparsity") or 0.0)
    return f"{text}  sparsity {100 * zeros:.1f}%" if zeros > 0 and row["macs"] == 1 else text


def epochs_text(epochs: int) -> str:
    """How many epochs there are, and their numbers, which are those of the config and the report."""
    return f"{epochs} epoch{'s, 0 to' if epochs > 1 else ':'} {epochs - 1}"


def time_left(seconds: float) -> str:
    """``93.1 -> '1:33'``, with hours only if needed."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Pace:
    """How long the epochs that are left will take, from those that were seen.

    Args:
        epochs: of the stage.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs, self.seconds = epochs, list[float]()

    def left(self, row: Mapping[str, Any]) -> float:
        """Seconds after this epoch; the last five are the measure, for pruned models get faster."""
        self.seconds.append(float(row["seconds"]))
        recent = self.seconds[-5:]
        return (self.epochs - int(row["epoch"]) - 1) * sum(recent) / len(recent)


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
            logger.info(text)
        else:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

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
            pace = Pace(epochs)
            yield StageDisplay(lambda: None, lambda row: self._plain(row, epochs, pace.left(row)))
            return
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(20),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
        )
        self.say(title)
        with Progress(*columns, console=self.console) as progress:
            now = f"{min(done, epochs - 1)}/{epochs - 1}"
            task = progress.add_task("", total=epochs * steps, completed=done * steps, epoch=now, note="")
            yield _bar(progress, task, epochs, steps)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Something that takes seconds."""
        if self.console is not None and self.console.is_terminal:
            with self.console.status(title):
                yield
        else:
            self.say(title)
            yield

    def _plain(self, row: Mapping[str, Any], epochs: int, left: float) -> None:
        took = f"{row['seconds']:.1f} s, {time_left(left)} left"
        self.say(f"  epoch {row['epoch']:>3}/{epochs - 1}  {epoch_text(row)}  {took}")


def _bar(progress: Progress, task: TaskID, epochs: int, steps: int) -> StageDisplay:
    """One bar for a stage: it moves with every batch, and says what the last whole epoch came to."""

    def after_epoch(row: Mapping[str, Any]) -> None:
        done = int(row["epoch"]) + 1
        now = f"{min(done, epochs - 1)}/{epochs - 1}"
        progress.update(task, completed=done * steps, epoch=now, note=short_text(row))

    return StageDisplay(lambda: progress.advance(task), after_epoch)
