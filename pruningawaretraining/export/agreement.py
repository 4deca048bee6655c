"""How often an exported file decides as the model does, and how often each is right, on data.

Shape suffixes: ``_B`` rows of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pruningawaretraining.export.compare import outputs_in_onnxruntime, reference
from pruningawaretraining.models.trees import tensors_of
from pruningawaretraining.runtimes.flat_model import FlatGraph
from pruningawaretraining.runtimes.ort import open_session

logger = logging.getLogger(__name__)

LABELS = ("labels", "label", "targets", "target", "y")
NO_LABELS = (
    "calibration: labels of shape %s are not one for each decision, of shape %s: no accuracy is measured. Allowed: "
    "whole numbers, one for each"
)
MOST_ROWS = 512
"""Rows of the data that are looked at."""
CLASSES = {2: -1, 3: -1, 4: 1}
"""Number of dimensions of the first output -> the one of the classes."""


@dataclass(frozen=True)
class Agreement:
    """A file against its model.

    Attributes:
        rows: that were looked at.
        same: fraction of decisions (largest of the first output) that are the model's.
        accuracy: fraction of the file's decisions that are the labels; None without labels.
        model_accuracy: the model's.
    """

    rows: int
    same: float
    accuracy: float | None = None
    model_accuracy: float | None = None

    def __str__(self) -> str:
        right = ""
        if self.accuracy is not None and self.model_accuracy is not None:
            right = f" (accuracy {self.accuracy:.1%}, the model's {self.model_accuracy:.1%})"
        return f"agrees with the model on {self.same:.1%} of {self.rows} rows of the calibration data{right}"


def labels_of(graph: FlatGraph, batch: Any) -> Tensor | None:
    """The labels of a batch: of a mapping, under a usual name; of a sequence, the integers after the inputs."""
    if isinstance(batch, Mapping):
        found = [batch[key] for key in LABELS if key in batch and key not in graph.input_names]
    elif isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Mapping):
        found = list(tensors_of(batch[1:]))
    else:
        found = list(tensors_of(batch))[len(graph.input_names) :]
    return next((one for one in found if isinstance(one, Tensor) and not one.is_floating_point() and one.ndim), None)


def agreement(
    graph: FlatGraph, path: Path, batches: Sequence[tuple[Tensor, ...]], labels: Sequence[Tensor | None]
) -> Agreement | None:
    """Compare decisions on the first :data:`MOST_ROWS` rows; None where the first output has no classes."""
    session = open_session(str(path))
    rows, seen, same, right = 0, 0, 0, [0, 0]
    labelled = all(one is not None for one in labels)
    for tensors, given in zip(batches, labels, strict=True):
        if rows >= MOST_ROWS:
            break
        outputs = (outputs_in_onnxruntime(graph, session, tensors)[0], reference(graph, tensors)[0])
        dim = CLASSES.get(outputs[0].ndim)
        if dim is None or outputs[0].shape[dim] < 2 or not outputs[0].is_floating_point():
            return None
        file_B, model_B = (one.argmax(dim) for one in outputs)
        rows, seen = rows + len(tensors[0]), seen + file_B.numel()
        same += int((file_B == model_B).sum())
        if labelled and given is not None and given.shape != file_B.shape:
            logger.warning(NO_LABELS, tuple(given.shape), tuple(file_B.shape))
            labelled = False
        if labelled and given is not None:
            right = [right[0] + int((file_B == given).sum()), right[1] + int((model_B == given).sum())]
    if not seen:
        return None
    accuracies = (right[0] / seen, right[1] / seen) if labelled else (None, None)
    return Agreement(rows, same / seen, *accuracies)
