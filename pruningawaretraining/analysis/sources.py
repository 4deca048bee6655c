"""Sources of ``pat analyze``: folders of runs, folders of checkpoints, or single checkpoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pruningawaretraining.analysis.checkpoints import find_checkpoints
from pruningawaretraining.analysis.compare_figures import Compared, compared
from pruningawaretraining.analysis.norms import Build, Track, run_of, scan, scan_each
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.experiment.inspection import load_inspected
from pruningawaretraining.files import reading
from pruningawaretraining.report.run import NORMS, REPORT, load_run


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
        [compared(one.name, run_of(one.name, next(each))) if isinstance(one, Path) else one for one in found]
    )


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
