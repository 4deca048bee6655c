"""Files of a run; each is written whole or not at all.

A run folder holds:

``config.yaml``
    The resolved experiment: every default filled in, the pruning config inline in the native form.

``metrics.jsonl``
    One JSON object a line, one line for each epoch of each model, in order; the dense baseline's lines come first::

        {"model": "dense" | "pruned",    which of the two is trained
         "epoch": 0,                     counted from 0
         "phase": "regularize",          "prune" if groups were masked or removed in the epoch, else the pruner's phase
                                         when it began: "regularize" | "prune" | "finetune" | "done"; always "train"
                                         for the dense model
         "loss": 0.31,                   mean training loss over the epoch
         "train_accuracy": 0.91,         fraction of the training images, while training
         "accuracy": 0.95,               fraction of the test images, after the epoch's pruning step
         "lr": 0.05,                     learning rate of the first parameter group during the epoch
         "macs": 0.62,                   MACs kept after the epoch's pruning step, as a fraction of the dense model's
         "sparsity": 0.40,               fraction of the prunable groups that is masked or removed by then
         "seconds": 1.7}                 wall-clock time of the epoch: training, pruning and testing

``norms.json``
    L2 norms of the groups after each epoch of the pruned model, as histograms over shared logarithmic bins::

        {"edges": [1e-06, ...],          bin edges, increasing, one more than there are bins; norms below the first or
                                         above the last edge count in the outermost bins
         "epochs": [{"epoch": 0, "phase": "regularize",
                     "sets": {"layer1.0.conv1": {"counts": [0, ...], "zeros": 3, "size": 16}, ...}}, ...]}

    ``dense`` has the same of the dense baseline, as a control, where a rule has a regulariser: a list like ``epochs``.
    ``zeros`` are groups whose norm is exactly 0 (masked), in no bin; ``size`` is the number of groups that are live,
    so that ``sum(counts) + zeros == size``.

``summary.json``
    The results, written last; a folder that holds it is finished::

        {"format": 1,
         "name": "demo", "version": "0.1.0", "date": "2025-01-31T12:00:00+00:00",
         "environment": {"python", "torch", "platform", "device", "threads"},
         "config": {...},                       the resolved experiment, as in config.yaml
         "data": {"name", "classes", "train", "test", "shape": [C, H, W]},
         "epochs": 40,
         "dense":  {"accuracy": 0.99 | null, "macs", "parameters", "bytes", "latency_ms" | null, "seconds" | null},
         "pruned": {the same},                  accuracy: fraction of the test images; bytes: of the weights' file;
                                                a dense accuracy or time is null when no baseline was trained
         "target": {"macs": 0.5 | null, "sparsity": 0.3 | null},   of the first rule; of a family its last
         "pruning": {...},                      Report.to_dict() of the pruner, at the end
         "recovery": {                          what it came to; null where none was asked for
             "began": 12 | null,                the epoch before which pruning was over; null: it never was
             "planned_epochs": 30, "epochs": 41, "budget": "time", "costs": {"dense": 0.031, "pruned": 0.018},
             "last": 0.95,                      accuracy of the last weights
             "average": {"from": 38, "unmeasured": 0.94, "accuracy": 0.953} | null},   norms as they were, and measured
         "verification": {                      largest absolute differences of the outputs on test images, in a chain
             "scale": 17.2,                     largest absolute output
             "masked_removed": 1e-6 | null,     the masked model against the physically pruned one
             "removed_reloaded": 0.0,           that against pruned.safetensors loaded into a fresh dense model
             "reloaded_onnx": 2e-6 | null,      that against model.onnx in onnxruntime
             "onnx_accuracy": 0.98 | null},     of model.onnx in onnxruntime over all test images
         "latency": {"runtime", "threads", "batch", "dense": {...}, "pruned": {...}, "ratio": 0.6,
                     "interval": [0.58, 0.62], "events": [...]} | null,
                                                dense and pruned are Latency.to_dict(); ratio is pruned / dense
         "family": [                            members of a target with a list, in order; empty without one
            {"number": 0, "name": "0.70", "target": {"macs": 0.7}, "epoch": 9,    the epoch in which it was finished
             "accuracy", "macs", "parameters", "bytes", "latency_ms" | null,      as of the pruned model
             "file": "pruned-0.70.safetensors", "onnx": "model-0.70.onnx" | null, "onnx_difference": 1e-6 | null}],
         "files": ["config.yaml", ...],         the files of the folder that the run wrote
         "seconds": 93.1}                       of the whole run, over all sessions if it was resumed

``report.html``, ``report.json``, ``epochs.csv``, ``layers.csv``, ``groups.csv``
    The same once more, drawn and as tables; see :mod:`pruningawaretraining.report`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.experiment.lock import LOCK
from pruningawaretraining.files import as_object, parse_json, read_object, read_text, write_text
from pruningawaretraining.report import numbers

CONFIG, METRICS, NORMS, SUMMARY = "config.yaml", "metrics.jsonl", "norms.json", "summary.json"
REPORT, PRUNED, DENSE = "report.html", "pruned.safetensors", "dense.safetensors"
ONNX, CHECKPOINT = "model.onnx", "checkpoint.pt"
NUMBERS = numbers.FILES
FILES = (SUMMARY, CONFIG, METRICS, NORMS, REPORT, *NUMBERS, PRUNED, DENSE, ONNX, CHECKPOINT)
"""Files of a run in the order of their deletion, the summary first."""

MEMBERS = ("pruned-0.[0-9]*.safetensors", "model-0.[0-9]*.onnx")

ROW = frozenset(("model", "epoch", "phase", "loss", "train_accuracy", "accuracy", "lr", "macs", "sparsity", "seconds"))
"""Keys of a line of ``metrics.jsonl``."""
MOMENT = frozenset(("epoch", "phase", "sets"))
"""Keys of an epoch of ``norms.json``."""
_DECADES, _PER_DECADE = (-6, 4), 16
EDGES: tuple[float, ...] = tuple(
    10 ** (_DECADES[0] + number / _PER_DECADE) for number in range((_DECADES[1] - _DECADES[0]) * _PER_DECADE + 1)
)
"""Bin edges of the norm histograms: fixed, so that the histograms of a resumed run line up."""


def member_files(folder: Path) -> list[Path]:
    """The files of a family's members: ``pruned-0.70.safetensors``, ``model-0.70.onnx``."""
    return [path for form in MEMBERS for path in sorted(folder.glob(form))]


def clear_temporary(folder: Path) -> None:
    """Take away what a killed process of this run was writing when it died: half-written files, folders of exports."""
    for name in (*FILES, *MEMBERS, LOCK):
        for left in folder.glob(f".{name}.*.tmp"):
            left.unlink(missing_ok=True)
    for left in folder.glob(".onnx-*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write plain data as JSON in one step; a number that is not finite becomes null."""
    write_text(path, json.dumps(_finite(value), indent=indent) + "\n")


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write a resolved config as YAML in one step."""
    write_text(path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def histogram(norms_G: Tensor) -> dict[str, Any]:
    """Counts over :data:`EDGES`, zeros apart: ``{"counts", "zeros", "size"}``.

    Args:
        norms_G: one L2 norm for each group.
    """
    norms_G = norms_G.detach().float().cpu()
    alive_G = norms_G[norms_G > 0].clamp(EDGES[0], EDGES[-1])
    bins_G = torch.bucketize(alive_G, torch.tensor(EDGES), right=True).sub(1).clamp(0, len(EDGES) - 2)
    counts = torch.bincount(bins_G, minlength=len(EDGES) - 1)
    return {"counts": counts.tolist(), "zeros": len(norms_G) - len(alive_G), "size": len(norms_G)}


class Recorder:
    """Keeps ``metrics.jsonl`` and ``norms.json`` of a run up to date.

    Args:
        folder: of the run.
        rows: epochs of ``metrics.jsonl`` to keep, of a run that is resumed; what came after them is forgotten.
        norms: epochs of ``norms.json`` to keep likewise.
    """

    def __init__(self, folder: Path, rows: int = 0, norms: int = 0) -> None:
        self.folder = folder
        self.rows = _first(_read_rows(folder / METRICS), rows, ROW, folder / METRICS) if rows else []
        self.norms = _known_norms(folder / NORMS, "epochs", norms) if norms else []
        dense = sum(row["model"] == "dense" for row in self.rows)
        self.control = _known_norms(folder / NORMS, "dense", dense, whole=False) if dense else []

    def add(self, row: Mapping[str, Any], norms: Mapping[str, Tensor] | None = None) -> None:
        """Add one epoch."""
        self.rows.append(dict(row))
        write_text(self.folder / METRICS, "".join(json.dumps(_finite(one)) + "\n" for one in self.rows))
        if norms is not None:
            sets = {name: histogram(norms_G) for name, norms_G in norms.items()}
            found = self.control if row["model"] == "dense" else self.norms
            found.append({"epoch": row["epoch"], "phase": row["phase"], "sets": sets})
            control = {"dense": self.control} if self.control else {}
            write_json(self.folder / NORMS, {"edges": EDGES, "epochs": self.norms, **control})


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [as_object(parse_json(line, path), path) for line in read_text(path).splitlines() if line.strip()]


def _known_norms(path: Path, key: str, count: int, *, whole: bool = True) -> list[dict[str, Any]]:
    """The first epochs of ``norms.json``; none of an earlier version's, whose bins do not line up.

    Args:
        path: of the file.
        key: "epochs", or "dense" for those of the dense baseline.
        count: how many.
        whole: whether all of them must be there.
    """
    known = read_object(path) if path.is_file() else {}
    edges, found = known.get("edges"), known.get(key, [])
    other = isinstance(edges, list) and edges != list(EDGES)
    return [] if other or not (whole or found) else _first(found, count, MOMENT, path)


def _first(found: Any, count: int, keys: frozenset[str], path: Path) -> list[dict[str, Any]]:
    """The first entries of a file.

    Raises:
        CheckpointError: there are fewer, or one lacks a key.
    """
    whole = isinstance(found, list) and all(isinstance(one, dict) and keys <= one.keys() for one in found)
    if not whole or len(found) < count:
        there = f"{len(found)} epochs" if whole else "something else"
        raise CheckpointError(f"{path}: {there} where the checkpoint counts {count} epochs")
    return list(found[:count])
