"""Data that can be read again and again: a split as it is, or as training sees it, for criteria and compensation.

Shape suffixes: ``_B`` labels of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pruningawaretraining.experiment.data import Batch, Pipeline, Source
from pruningawaretraining.experiment.train import scores_of


@dataclass(frozen=True)
class SourceBatches:
    """A split as normalised batches in a fixed order; it can be read again and again.

    Args:
        pipeline: normalisation.
        source: the split.
        size: images in a batch.
        device: where they go.
    """

    pipeline: Pipeline
    source: Source
    size: int
    device: torch.device

    def __iter__(self) -> Iterator[Batch]:
        return self.pipeline.test(self.source, self.size, self.device, self.pipeline.share)


@dataclass(frozen=True)
class TrainingBatches(SourceBatches):
    """A split as training sees it, shuffled and augmented: the same batches each time that it is read.

    Norms that training has measured on augmented images do not fit plain ones.
    """

    def __iter__(self) -> Iterator[Batch]:
        return self.pipeline.train(self.source, self.size, torch.Generator().manual_seed(0), self.device)


def loss_of(outputs: Any, labels_B: Tensor) -> Tensor:
    """Cross entropy of class scores."""
    return functional.cross_entropy(scores_of(outputs).float(), labels_B)
