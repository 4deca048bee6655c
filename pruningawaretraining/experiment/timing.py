"""``pat latency``: dense and pruned models timed in turns, with their costs."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruningawaretraining.checkpoint.pruned import load_pruned
from pruningawaretraining.costs.latency.meter import RuntimeMeter
from pruningawaretraining.costs.macs import count_macs
from pruningawaretraining.costs.memory import peak_activation_bytes
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment import record
from pruningawaretraining.experiment.inspection import Inspected, load_inspected
from pruningawaretraining.experiment.shipped import named
from pruningawaretraining.files import read_object, reading
from pruningawaretraining.runtimes.timing import Model, compare_latency, is_wide

SPREAD = 0.25
"""Of times, from the 10th to the 90th percentile, as a part of their median: beyond it the machine is called busy."""


@dataclass(frozen=True)
class Candidate:
    """A model to time.

    Attributes:
        name: in the table.
        family: models of one family are compared with its first, the dense one.
        model: a module, or the path of an ONNX file.
        inputs: example inputs.
        bytes: size on disk.
        accuracy: where a run has measured it.
    """

    name: str
    family: str
    model: Model
    inputs: Any
    bytes: int
    accuracy: float | None = None


@dataclass(frozen=True)
class Timed:
    """One row.

    Attributes:
        name, family: as in :class:`Candidate`.
        median_ms, p10, p90: latency.
        ratio: of its time to that of the family's first, the median over the turns.
        macs, parameters, peak_bytes: None for files.
        bytes: size on disk.
        accuracy: or None.
        low, high: 95% confidence interval of the ratio; None where it is not known.
    """

    name: str
    family: str
    median_ms: float
    p10: float
    p90: float
    ratio: float
    macs: int | None
    parameters: int | None
    peak_bytes: int | None
    bytes: int
    accuracy: float | None
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> str:
        """Of the ratio, for a table."""
        return "–" if self.low is None or self.high is None else f"{self.low:.3f} to {self.high:.3f}"

    @property
    def is_noisy(self) -> bool:
        """Whether the interval of the ratio is too wide to promise milliseconds, or the times themselves spread."""
        known = self.low is not None and self.high is not None
        wide = known and is_wide(self.ratio, float(self.low or 0.0), float(self.high or 0.0))
        return wide or self.p90 - self.p10 > SPREAD * self.median_ms


def candidates(
    sources: Sequence[str],
    model: str | None = None,
    input_shape: Sequence[int] | None = None,
    *,
    trusted: bool = False,
    data: Path | None = None,
) -> list[Candidate]:
    """Load what the command line names: folders of runs, checkpoints, ONNX files, models and experiments.

    Models of one name, as of ``demo`` and ``runs/demo``, are told apart by what was given for them.

    Args:
        sources: as given.
        model: of checkpoints and folders of runs: the dense model by name, or an experiment config.
        input_shape: of the example input.
        trusted: whether the configs in folders of runs may name a ``module:callable`` to import.
        data: where the data of experiments lies, instead of their ``data.root``.

    Raises:
        ConfigError: a source of another kind, or a checkpoint without ``model``.
        CheckpointError: a checkpoint that does not fit.
    """
    found: list[Candidate] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found += _of_run(path, functools.partial(_of_folder, path, model, input_shape, trusted, data))
        elif path.suffix == ".onnx":
            inputs = torch.zeros(list(_needed(input_shape, source)))
            found.append(Candidate(path.name, source, path, inputs, path.stat().st_size))
        elif path.suffix == ".safetensors":
            look = functools.partial(_of_name, str(model), input_shape, data)
            found += _of_checkpoint(path, model, look, [one.family for one in found])
        else:
            seen = _of_name(source, input_shape, data)
            found.append(Candidate(f"{source} (dense)", source, seen.model, seen.inputs, weight_bytes(seen.model)))
    names = Counter(one.name for one in found)
    return [replace(one, name=_full_name(one)) if names[one.name] > 1 else one for one in found]


def _full_name(one: Candidate) -> str:
    """``demo (dense)`` of ``runs/demo`` as ``runs/demo (dense)``."""
    _, bracket, kind = one.name.rpartition(" (")
    return f"{one.family}{bracket}{kind}" if bracket else one.name


def _needed(input_shape: Sequence[int] | None, source: str) -> Sequence[int]:
    if input_shape is None:
        raise ConfigError(f"--input-shape: needed for {source!r}, e.g. 1,3,224,224")
    return input_shape


def _of_name(name: str, input_shape: Sequence[int] | None, data: Path | None) -> Inspected:
    """A model, an experiment or a shipped experiment by name."""
    return load_inspected(named(name), input_shape, data=data)


def _of_folder(
    folder: Path, model: str | None, input_shape: Sequence[int] | None, trusted: bool, data: Path | None
) -> Inspected:
    """The dense model of a run: the one that is given, or what the run's config and summary say."""
    if model is not None:
        return _of_name(model, input_shape, data)
    summary_file = folder / record.SUMMARY
    with reading(summary_file):
        found = read_object(summary_file)["data"]
        channels, height, width = map(int, found["shape"])
        known = int(found["classes"]), (channels, height, width)
    return load_inspected(str(folder / record.CONFIG), input_shape, trusted=trusted, known=known)


def _of_run(folder: Path, look: Callable[[], Inspected]) -> list[Candidate]:
    summary_file = folder / record.SUMMARY
    if not summary_file.is_file():
        raise ConfigError(f"{folder}: holds no {record.SUMMARY}. Allowed: folders of finished runs")
    summary: Mapping[str, Any] = read_object(summary_file)
    seen = look()
    found = []
    for kind, file in (("dense", record.DENSE), ("pruned", record.PRUNED)):
        built = seen.model if kind == "dense" else load_pruned(look().model, folder / file)
        size = (folder / file).stat().st_size if (folder / file).is_file() else weight_bytes(built)
        with reading(summary_file):
            accuracy = (summary.get(kind) or {}).get("accuracy")
        found.append(Candidate(f"{folder.name} ({kind})", str(folder), built, seen.inputs, size, accuracy))
    return found


def _of_checkpoint(
    path: Path, model: str | None, look: Callable[[], Inspected], families: Sequence[str]
) -> list[Candidate]:
    """A pruned checkpoint, after the dense model that it was made from."""
    if model is None:
        raise ConfigError(f"--model: needed for {str(path)!r}: the dense model by name, or an experiment config")
    seen = look()
    pruned = load_pruned(look().model, path)
    one = Candidate(path.stem, model, pruned, seen.inputs, path.stat().st_size)
    dense = Candidate(f"{model} (dense)", model, seen.model, seen.inputs, weight_bytes(seen.model))
    return [one] if model in families else [dense, one]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights and buffers, which is what a checkpoint takes but for its header."""
    return sum(one.numel() * one.element_size() for one in model.state_dict().values())


def timed(
    found: Sequence[Candidate],
    runtime: str = "onnxruntime",
    threads: int = 1,
    batch: int = 1,
    repeats: int = 50,
) -> list[Timed]:
    """Time all of them in turns.

    Args:
        found: at least one, of different names.
        runtime, threads, repeats: as in :func:`~pruningawaretraining.runtimes.timing.compare_latency`.
        batch: rows of the inputs.

    Raises:
        ConfigError, ModelError: as there; ConfigError too where two have one name.
    """
    names = [one.name for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice!r} is given twice. Allowed: models of different names")
    resize = RuntimeMeter(runtime, batch, threads).inputs
    pairs = {one.name: (one.model, resize(one.inputs)) for one in found}
    firsts: dict[str, str] = {}
    against = {one.name: firsts.setdefault(one.family, one.name) for one in found}
    compared = compare_latency(pairs, runtime, threads, repeats, against=against)
    rows = []
    for one in found:
        took = compared.latencies[one.name]
        times = (took.median_ms, took.p10, took.p90, compared.ratios[one.name])
        costs = _costs(*pairs[one.name])
        interval = (None, None) if against[one.name] == one.name else compared.intervals[one.name]
        rows.append(Timed(one.name, one.family, *times, *costs, one.bytes, one.accuracy, *interval))
    return rows


def _costs(model: Any, inputs: Any) -> tuple[int | None, int | None, int | None]:
    """MACs, parameters and peak activation bytes; unknown for a file."""
    if not isinstance(model, nn.Module):
        return None, None, None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return count_macs(model, inputs), parameters, peak_activation_bytes(model, inputs)


def write_timing(rows: Sequence[Timed], path: Path) -> None:
    """Write the rows as JSON."""
    record.write_json(path, {"models": [asdict(one) for one in rows]}, indent=2)
