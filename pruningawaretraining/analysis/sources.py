"""Sources of ``pat analyze``: folders of runs, folders of checkpoints, or single checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pruningawaretraining.analysis.checkpoints import find_checkpoints
from pruningawaretraining.analysis.compare_figures import Compared, compared, dense_accuracy, with_dense_of
from pruningawaretraining.analysis.norms import Build, Track, run_of, scan, scan_each
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.experiment.inspection import load_inspected
from pruningawaretraining.files import reading
from pruningawaretraining.report.run import NORMS, REPORT, Run, load_run

OF_A_RUN = ("name", "out", "pruning", "dense_baseline", "device", "threads", "latency", "onnx")
"""Keys of an experiment that do not change its dense baseline."""


def load_sources(
    sources: Sequence[Path],
    model: str | None = None,
    input_shape: Sequence[int] | None = None,
    page: Path | None = None,
    track: Track | None = None,
) -> list[Compared]:
    """Load every source as one run: a folder of checkpoints is a training, a single file is one moment.

    Args:
        sources: folders or files.
        model: the dense model of checkpoints: a name as in a config's ``model.name``, or an experiment config.
        input_shape: of its example input.
        page: where the page will be, for links to the runs' own reports.
        track: shows progress over files.

    Raises:
        CheckpointError: a source is not there or holds neither a run nor checkpoints.
        ConfigError: checkpoints without a model.
    """
    found: list[Compared | Path] = []  # files keep their place until they are read together
    for source in sources:
        if (source / NORMS).is_file():
            report = source / REPORT
            link = os.path.relpath(report, page.parent) if page is not None and report.is_file() else ""
            with reading(source, used=True):
                found.append(compared(source.resolve().name, load_run(source, finished=False), link))
        elif source.is_dir():
            paths = find_checkpoints(source)
            found.append(_scanned(source.resolve().name, paths, builder(model, input_shape, source), track))
        elif source.is_file():
            found.append(source)
        else:
            raise CheckpointError(f"there is no {str(source)!r}. Allowed: folders of runs or checkpoints, or files")
    files = [one for one in found if isinstance(one, Path)]
    each = iter(scan_each(files, builder(model, input_shape, files[0]), track or iter) if files else ())
    return _named_apart(
        _beside_one_dense_model(
            [compared(one.name, run_of(one.name, next(each))) if isinstance(one, Path) else one for one in found]
        )
    )


def _beside_one_dense_model(runs: Sequence[Compared]) -> list[Compared]:
    """Runs that differ in their pruning alone have one dense baseline: of a sweep, the first has trained it."""
    owners = {_trained_as(one.run): one.run for one in reversed(runs) if dense_accuracy(one.run) is not None}
    return [
        one
        if dense_accuracy(one.run) is not None or (owner := owners.get(_trained_as(one.run))) is None
        else compared(one.name, with_dense_of(one.run, owner), one.link)
        for one in runs
    ]


def _trained_as(run: Run) -> str:
    """How a run trains, without its pruning, as text; no two runs are alike of which it is not known."""
    config = run.summary.get("config")
    if not isinstance(config, Mapping):
        return f"unknown {id(run)}"
    return json.dumps({key: value for key, value in config.items() if key not in OF_A_RUN}, sort_keys=True)


def builder(model: str | None, input_shape: Sequence[int] | None, source: Path) -> Build:
    """Find the function that builds the dense model of checkpoints.

    Raises:
        ConfigError: no model is named.
    """
    if model is None:
        raise ConfigError(
            f"--model: missing, but {str(source)!r} holds checkpoints, not a run. Allowed: a torchvision or "
            "timm model, 'package.module:factory', or an experiment config"
        )

    def build() -> tuple[nn.Module, Any]:
        inspected = load_inspected(model, input_shape)
        return inspected.model.eval(), inspected.inputs

    return build


def _scanned(name: str, paths: Sequence[Path], build: Build, track: Track | None) -> Compared:
    norms = scan(paths, build, iter if track is None else track)
    return compared(name, run_of(name, norms))


def _named_apart(runs: Sequence[Compared]) -> list[Compared]:
    """The runs, numbered where two have the same name."""
    names = [one.name for one in runs]
    return [
        replace(one, name=f"{one.name} ({number + 1})") if names.count(one.name) > 1 else one
        for number, one in enumerate(runs)
    ]
