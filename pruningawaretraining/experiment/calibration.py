"""Training data as second-order criteria read it: in a fixed order, normalised, not augmented.

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


def loss_of(outputs: Any, labels_B: Tensor) -> Tensor:
    """Cross entropy of class scores."""
    return functional.cross_entropy(scores_of(outputs).float(), labels_B)
