"""``pat sensitivity``: accuracy on held-out images as each set of layers alone is pruned to a grid of widths.

Shape suffixes: ``_D`` groups of the dense model, ``_R`` groups of one rule, ``_P`` groups of one set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment import record
from pruningawaretraining.experiment.build import build_model, has_weights
from pruningawaretraining.experiment.calibration import TrainingBatches, loss_of
from pruningawaretraining.experiment.data import Batch, Pipeline
from pruningawaretraining.experiment.datasets import load_data
from pruningawaretraining.experiment.inspection import has_channels
from pruningawaretraining.experiment.run import find_device
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.experiment.train import scores_of
from pruningawaretraining.experiment.verify import accuracy_of
from pruningawaretraining.files import write_text
from pruningawaretraining.models.calling import evaluating
from pruningawaretraining.report.html import render_template
from pruningawaretraining.session.pruning import Pruning
from pruningawaretraining.version import __version__

GRID = (0.1, 0.25, 0.5, 0.75, 0.9)
BATCH = 250
Track = Callable[[Sequence[str]], Iterable[str]]


@dataclass(frozen=True)
class SensitivityOptions:
    """Options of ``pat sensitivity``.

    Args:
        sparsities: fractions of a set's groups to mask, ascending.
        tolerance: how much accuracy (a fraction) pruning one set alone may cost; sets its cap.
        images: test images to measure on; 0 for all.
        weights: of the dense model; None for those of the config, or of its finished run.
    """

    sparsities: tuple[float, ...] = GRID
    tolerance: float = 0.01
    images: int = 1000
    weights: Path | None = None

    def __post_init__(self) -> None:
        if not self.sparsities or not all(0 < one < 1 for one in self.sparsities):
            raise ConfigError(f"--sparsities: {list(self.sparsities)} is not allowed. Allowed: numbers in (0, 1)")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"--tolerance: {self.tolerance!r} is not allowed. Allowed: a fraction in [0, 1)")
        if self.images < 0:
            raise ConfigError(f"--images: {self.images!r} is not allowed. Allowed: 0 (all) or more")


def measure(config: ExperimentConfig, options: SensitivityOptions, track: Track = iter) -> dict[str, Any]:
    """Mask the lowest groups of each set alone, by the rule's criterion, and measure accuracy; nothing is trained.

    Args:
        config: model, data and channel rules.
        options: see there.
        track: shows progress over the sets.

    Returns:
        The content of ``sensitivity.json``: ``accuracy`` of the dense model, ``images``, ``tolerance``, and ``sets``:
        for each its number of ``groups``, ``rows`` of ``sparsity``, ``kept`` and ``accuracy``, and ``max_sparsity``:
        the largest sparsity up to which no measured one costs more than the tolerance.

    Raises:
        ConfigError: there are no trained weights, no rule on channels, or anything that the config gets wrong.
    """
    check_channels(config)
    device = find_device(config.device)
    torch.manual_seed(config.seed)
    data = load_data(config.data)
    model = build_model(_with_weights(config, options).model, len(data.classes), data.shape[0]).to(device)
    pipeline = Pipeline(data.mean, data.std, channels_last=config.channels_last)
    batches = list(_first(pipeline.test(data.test, BATCH, device), options.images or len(data.test)))
    pruner = Pruning(model, config.pruning, example_inputs=batches[0][0][:1])
    pruner.calibrate_with(TrainingBatches(pipeline, data.train, config.batch_size, device), loss_of)
    coupled = pruner.engine.coupled
    assert coupled is not None  # a rule is for channels
    dense = {key: value.detach().clone() for key, value in model.state_dict().items()}
    scores = _scores_by_set(coupled, pruner.engine.calibration)
    sets = {name: _of_set(coupled, name, scores[name], batches, options, dense) for name in track(list(scores))}
    accuracy = _accuracy(model, batches)
    for found in sets.values():
        found["max_sparsity"] = cap([(row["sparsity"], row["accuracy"]) for row in found["rows"]], accuracy, options)
    return {
        "format": 1,
        "name": config.name,
        "accuracy": accuracy,
        "images": sum(len(labels_B) for _, labels_B in batches),
        "tolerance": options.tolerance,
        "sets": sets,
    }


def _scores_by_set(coupled: CoupledGroups, calibration: Calibration | None) -> dict[str, Tensor]:
    """The scores of each set's groups, by its rule's criterion."""
    found = {}
    for rule in coupled.rules:
        scores_R = coupled.scores(rule, calibration)
        found.update({one.name: scores_R[one.start : one.stop] for one in rule.grouping.sets})
    return found


def check_channels(config: ExperimentConfig) -> None:
    """Refuse a config without a rule for coupled layers.

    Raises:
        ConfigError: every rule is for what is finer.
    """
    rules = [rule for rule in config.pruning.rules if rule.enabled]
    if not rules or has_channels(config.pruning):
        return
    shown = ", ".join(repr(rule.pattern) for rule in rules)
    raise ConfigError(
        f"pruning.rules: none is for channels, they are for {shown}; sensitivity is that of sets of channels. "
        "Allowed: a rule whose pattern is channel or head"
    )


def _with_weights(config: ExperimentConfig, options: SensitivityOptions) -> ExperimentConfig:
    """The experiment with trained weights for its model.

    Raises:
        ConfigError: no weights are given or found.
    """
    if options.weights is None and has_weights(config.model):
        return config
    found = options.weights or config.folder() / record.DENSE
    if not found.is_file():
        raise ConfigError(
            f"model.weights: missing, and {str(found)!r} does not exist. Allowed: --weights with a state dict, "
            "model.weights, or an experiment whose run has ended"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"weights": str(found)})})


def _first(batches: Iterator[Batch], images: int) -> Iterator[Batch]:
    """The first images of a split."""
    left = images
    for images_BCHW, labels_B in batches:
        yield images_BCHW[:left], labels_B[:left]
        left -= len(labels_B)
        if left <= 0:
            return


def _of_set(
    coupled: CoupledGroups,
    name: str,
    scores_P: Tensor,
    batches: Sequence[Batch],
    options: SensitivityOptions,
    dense: Mapping[str, Tensor],
) -> dict[str, Any]:
    """One set at every sparsity; the model is dense before and after."""
    one = next(each for each in coupled.dense_sets if each.name == name)
    order_P = torch.argsort(scores_P, stable=True)
    rows = []
    for sparsity in options.sparsities:
        gone = min(math.floor(sparsity * one.size + 1e-6), one.size - 1)
        keep_D = torch.ones_like(coupled.keep_D)
        keep_D[one.start + order_P[:gone]] = False
        coupled.masks.set(keep_D)
        rows.append({"sparsity": sparsity, "kept": one.size - gone, "accuracy": _accuracy(coupled.model, batches)})
        coupled.masks.clear()
        coupled.model.load_state_dict(dense)
    return {"groups": one.size, "rows": rows}


@torch.no_grad()
def _accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    with evaluating(model):
        return accuracy_of(lambda images_BCHW: scores_of(model(images_BCHW)).float().cpu(), iter(batches))


def cap(rows: Sequence[tuple[float, float]], accuracy: float, options: SensitivityOptions) -> float:
    """The largest sparsity before the first that costs more than the tolerance; 0 where all do."""
    found = 0.0
    for sparsity, reached in rows:
        if accuracy - reached > options.tolerance + 1e-9:
            break
        found = sparsity
    return found


def write_sensitivity(found: Mapping[str, Any], path: Path) -> list[Path]:
    """Write the result as JSON, and the page beside it.

    Returns:
        Both paths.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    html = path.with_suffix(".html")
    write_text(path, json.dumps(found, indent=1) + "\n")
    write_text(html, render_template("sensitivity.html.j2", page(found)))
    return [path, html]


def page(found: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template shows: the most sensitive set first."""
    levels = [row["sparsity"] for row in next(iter(found["sets"].values()))["rows"]]
    worst = max(found["accuracy"] - row["accuracy"] for one in found["sets"].values() for row in one["rows"])
    sets = []
    for name, one in found["sets"].items():
        cells = [_cell(found["accuracy"], row, max(worst, found["tolerance"], 1e-9)) for row in one["rows"]]
        sets.append({"name": name, "groups": one["groups"], "cells": cells, "cap": one["max_sparsity"]})
    sets.sort(key=lambda one: (one["cap"], -sum(cell["heat"] for cell in one["cells"])))
    return {**{key: found[key] for key in ("name", "accuracy", "images", "tolerance")}, "levels": levels, "sets": sets,
            "version": __version__}  # fmt: skip


def _cell(accuracy: float, row: Mapping[str, Any], worst: float) -> dict[str, Any]:
    drop = accuracy - row["accuracy"]
    text = f"{'−' if drop > 0 else '+'}{abs(100 * drop):.1f}"
    heat = round(100 * max(0.0, drop) / worst)
    return {"text": "0.0" if abs(drop) < 5e-4 else text, "heat": heat, "kept": row["kept"]}
