"""Checkpoint of a run in progress: everything that a killed run needs to continue exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.distributed.collectives import rank
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.experiment.record import CHECKPOINT
from pruningawaretraining.files import read_torch, reading, write_atomically

FORMAT = 1
WITHIN = {"steps", "loss", "right", "seen", "seconds"}
"""Numbers of an epoch that was stopped."""
ALLOWED = "--overwrite, or another --out"
MAY_CHANGE = ("name", "out", "device", "threads", "latency", "onnx", "data.root", "data.workers", "data.memory_gib")
"""Keys of the experiment that may differ when a run is resumed: they do not change what is computed."""
MOST_SHOWN = 6
"""How many differing keys a message names."""


@dataclass
class RunState:
    """Where a run is.

    Attributes:
        stage: "dense" while the baseline is trained, "pruned" after that.
        epoch: the next epoch of the stage.
        rows, norms: how many epochs ``metrics.jsonl`` and ``norms.json`` hold.
        seconds: wall-clock time so far.
        training: state dicts of model, optimizer, scheduler, scaler and pruner; empty before a stage's first epoch.
        rng: states of torch's generators.
        masked_removed: the check made when channels were removed, see :mod:`record`.
        config: the resolved experiment, to notice when a run is resumed with another one.
        members: lines of the members of a family that are finished.
        within: of an epoch that was stopped: its ``steps`` so far, their sums, and what its line will say; else empty.
    """

    stage: str = "dense"
    epoch: int = 0
    rows: int = 0
    norms: int = 0
    seconds: float = 0.0
    training: dict[str, Any] = field(default_factory=dict)
    rng: dict[str, Any] = field(default_factory=dict)
    masked_removed: float | None = None
    config: dict[str, Any] = field(default_factory=dict)
    within: dict[str, Any] = field(default_factory=dict)
    members: list[dict[str, Any]] = field(default_factory=list)


def save_state(state: RunState, folder: Path) -> None:
    """Write the checkpoint of a run in one step: a crash leaves the old one or the new one."""
    values = {"format": FORMAT, **{key: getattr(state, key) for key in asdict(RunState())}}
    write_atomically(folder / CHECKPOINT, lambda path: torch.save(values, path))


def load_state(folder: Path, config: Mapping[str, Any]) -> RunState:
    """Read the checkpoint of a run.

    Args:
        folder: of the run.
        config: the resolved experiment that is to be resumed.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ConfigError: the run was started with another config.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise CheckpointError(
            f"--resume: {str(folder)!r} holds no {CHECKPOINT}. Allowed: the folder of a run in progress"
        )
    values = read_torch(path, "--resume", ALLOWED)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise CheckpointError(f"--resume: {str(path)!r} is not a checkpoint of this version")
    with reading(path, "--resume", ALLOWED):
        state = _checked(values)
    check_same(config, state.config, folder)
    return state


def _checked(values: dict[str, Any]) -> RunState:
    """The state with these fields; a :class:`ValueError` where one is not of its kind."""
    state = RunState(**values)
    for key, default in asdict(RunState(masked_removed=0.0)).items():
        value = getattr(state, key)
        if not isinstance(value, (int, float) if isinstance(default, float) else type(default)) and (
            key != "masked_removed" or value is not None
        ):
            raise ValueError(f"{key!r} is a {type(value).__name__}")
    if state.stage not in ("dense", "pruned") or min(state.epoch, state.rows, state.norms) < 0:
        raise ValueError(f"no run is at epoch {state.epoch} of its {state.stage!r} stage")
    numbers = {key: value for key, value in state.within.items() if key != "phase"}
    if numbers and (numbers.keys() != WITHIN or not all(isinstance(one, (int, float)) for one in numbers.values())):
        raise ValueError("what its epoch has come to is not a number of steps with their sums")
    return state


def check_same(now: Mapping[str, Any], before: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume with another experiment.

    Args:
        now: the resolved experiment that is asked for.
        before: the one in the folder.
        folder: of the run.

    Raises:
        ConfigError: every key that differs, with both values.
    """
    found = [f"{key}: {new} here, {old} there" for key, new, old in _differences(now, before)]
    if found:
        more = f"; {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
        raise ConfigError(
            f"{'; '.join(found[:MOST_SHOWN])}{more}: the run in {str(folder)!r} was started so. "
            "Allowed: the same, or another --out"
        )


def _differences(now: Any, before: Any, key: str = "") -> Iterator[tuple[str, str, str]]:
    """Dotted keys that differ between two nests of plain data and may not, with both values, short."""
    if key in MAY_CHANGE or now == before:
        return
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        for inner in {**now, **before}:
            path = f"{key}.{inner}".removeprefix(".")
            yield from _differences(now.get(inner), before.get(inner), path)
    elif isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        for number, (new, old) in enumerate(zip(now, before, strict=True)):
            yield from _differences(new, old, f"{key}[{number}]")
    else:
        yield key, _shown(now), _shown(before)


def _shown(value: Any) -> str:
    """A value in a message: a nest of values only by what it is."""
    if isinstance(value, list) and any(isinstance(one, (Mapping, list)) for one in value):
        return f"{len(value)} entries"
    if isinstance(value, Mapping):
        return f"{value['type']!r} with its options" if "type" in value else f"{len(value)} keys"
    return repr(value)


def rng_state() -> dict[str, Any]:
    """The states of torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put torch's generators where they were, on the first process, whose they are; devices that are gone stay out."""
    if rank() != 0:
        return
    cpu: Tensor = state["cpu"]
    torch.set_rng_state(cpu)
    for number, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, number)
