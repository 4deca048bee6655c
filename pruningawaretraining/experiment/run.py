"""Runs an experiment from its config: checks the folder, trains, finishes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pruningawaretraining.config.load import read_mapping
from pruningawaretraining.config.plan import rule_lines
from pruningawaretraining.config.recovery import recovery_lines
from pruningawaretraining.distributed.collectives import barrier, joined, rank
from pruningawaretraining.errors import ConfigError, PruningError
from pruningawaretraining.experiment import record
from pruningawaretraining.experiment.datasets import load_data
from pruningawaretraining.experiment.display import Display
from pruningawaretraining.experiment.finish import Trained, finish
from pruningawaretraining.experiment.lock import locked, refuse_locked
from pruningawaretraining.experiment.runner import Runner
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.experiment.state import check_same, load_state
from pruningawaretraining.experiment.stopping import StopRequest
from pruningawaretraining.experiment.tracking import Watch
from pruningawaretraining.export.onnx import check_opset
from pruningawaretraining.files import UnwritableError, read_object, reason
from pruningawaretraining.report.html import write_report


def run_experiment(
    config: ExperimentConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train, prune, save, export, measure and report; see :mod:`record` for what is written.

    Under torchrun every process trains on its share of each batch, and the first one writes.

    Args:
        config: the experiment.
        resume: go on where the run in the folder was interrupted; begin if there is nothing yet.
        overwrite: replace the run that is in the folder.
        console: where to show progress; None logs it.
        watch: is handed every epoch's line of ``metrics.jsonl``.

    Returns:
        The content of ``summary.json``; empty on all processes but the first.

    Raises:
        ConfigError, ModelError, TargetError, CheckpointError: bad input; a finished or interrupted run in the folder
            is not touched then.
    """
    stop = StopRequest()
    with joined(), stop.listening(), _advising(config.folder()):
        mine = rank() == 0
        display = Display(console if mine else None, watch if mine else None)
        return _run_here(config, resume, overwrite, display, stop)


@contextlib.contextmanager
def _advising(folder: Path) -> Iterator[None]:
    """Say how a run that was interrupted goes on, and of a file that cannot be written which option chose its place."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise stop if stop.args else type(stop)(_going_on(folder)) from None
    except OSError as error:
        text = str(error)
        if not isinstance(error, UnwritableError):
            if not str(error.filename or "").startswith(str(folder)):
                raise
            text = f"{error.filename!r} cannot be written: {reason(error)}"
        can = _can_go_on(folder)
        allowed = "a folder with room, and then --resume" if can else "a folder with room"
        raise UnwritableError(f"--out: {text}{'' if can else f'; {_going_on(folder)}'}. Allowed: {allowed}") from error


def _can_go_on(folder: Path) -> bool:
    return any(os.path.isfile(folder / name) for name in (record.CHECKPOINT, record.SUMMARY))


def _going_on(folder: Path) -> str:
    """What can be done after a run was interrupted."""
    if _can_go_on(folder):
        return "--resume goes on from the last checkpoint"
    gone = "no checkpoint has been written yet" if os.path.isdir(folder) else "its folder is not there"
    return f"{gone} and nothing can be resumed: start again"


def _run_here(
    config: ExperimentConfig, resume: bool, overwrite: bool, display: Display, stop: StopRequest
) -> dict[str, Any]:
    folder = config.folder()
    refuse_locked(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: {str(folder)!r} is a file. Allowed: a folder, created if needed")
    if resume and (folder / record.SUMMARY).is_file():
        _check_finished(config, folder)
        display.say(f"{folder} is finished")
        if not (folder / record.REPORT).is_file() and rank() == 0:  # killed between the two
            write_report(folder)
        return read_object(folder / record.SUMMARY)
    if not resume and not overwrite:
        _refuse_occupied(folder)
    with _threads(config.threads):
        return _run(config, resume, overwrite, display, stop)


def _run(
    config: ExperimentConfig, resume: bool, overwrite: bool, display: Display, stop: StopRequest
) -> dict[str, Any]:
    folder = config.folder()
    resolved = config.resolved()
    runner = Runner(config, load_data(config.data), find_device(config.device), display, stop)
    if config.onnx is not None and config.onnx.opset is not None:
        check_opset(config.onnx.exporter, config.onnx.opset, "onnx.opset")
    runner.new_stage("pruned")  # bad input is found before anything is written or trained
    barrier()  # every process has looked at the folder as it was
    with locked(folder) if runner.writes else contextlib.nullcontext():
        runner.locked = True
        if not resume and not overwrite:
            _refuse_occupied(folder)  # by a run that has ended meanwhile
        for number, rule in enumerate(config.pruning.rules):
            display.say("\n".join(rule_lines(rule, number, None, runner.data.steps(config.batch_size))))
        for line in recovery_lines(config.pruning.recovery):
            display.say(line)
        trained = _trained(runner, resume, display, resolved)
        return finish(trained, display) if runner.writes else {}


def _trained(runner: Runner, resume: bool, display: Display, resolved: dict[str, Any]) -> Trained:
    """Train in a folder that is this run's."""
    folder = runner.folder
    if runner.writes:
        record.clear_temporary(folder)
    if resume and (folder / record.CHECKPOINT).is_file():
        runner.state = load_state(folder, resolved)
        runner.recorder = runner.new_recorder(runner.state.rows, runner.state.norms)
        runner.restored(runner.new_stage(runner.state.stage))  # before anything is written
        display.say(f"going on in {folder}: {runner.state.stage} model, epoch {runner.state.epoch}")
    else:
        runner.state.config = resolved
        for path in [folder / name for name in record.FILES] + record.member_files(folder) if runner.writes else ():
            path.unlink(missing_ok=True)
    barrier()
    if runner.writes:
        record.write_config(folder / record.CONFIG, resolved)
    return runner.run()


def _check_finished(config: ExperimentConfig, folder: Path) -> None:
    """Refuse to show a finished run as the result of another experiment."""
    try:
        before = ExperimentConfig.model_validate(read_mapping(folder / record.CONFIG))
    except PruningError:
        return  # of another version, or taken away: there is nothing to compare with
    check_same(config.resolved(), before.resolved(), folder)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Set the number of CPU threads inside the block; 0 leaves it unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _refuse_occupied(folder: Path) -> None:
    if (folder / record.SUMMARY).is_file():
        raise ConfigError(f"out: {str(folder)!r} holds a finished run. Allowed: another --out, or --overwrite")
    if (folder / record.CHECKPOINT).is_file():
        raise ConfigError(
            f"out: {str(folder)!r} holds an interrupted run. Allowed: --resume, --overwrite, or another --out"
        )


def find_device(name: str) -> torch.device:
    """The device of a config; "auto" is a GPU if available.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device  # with its number: that of this process's own GPU
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device: {name!r} is not available: {str(error).splitlines()[0]}. Allowed: auto, cpu"
        ) from error
