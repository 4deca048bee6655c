"""The chain of checks at the end of a run: masked = removed = reloaded = ONNX, on real images.

Shape suffixes: ``_BCHW`` a batch of images, ``_BK`` class scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pruningawaretraining.config import PruningConfig
from pruningawaretraining.experiment.data import Batch
from pruningawaretraining.experiment.train import scores_of
from pruningawaretraining.models.calling import evaluating
from pruningawaretraining.models.precision import strict_float32
from pruningawaretraining.runtimes.ort import as_arrays, checked_run, open_session
from pruningawaretraining.session.pruning import Pruning


@torch.no_grad()
def scores(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Class scores in eval mode without TF32, in float32 on the CPU; modes and settings are as before."""
    with evaluating(model), strict_float32():
        return scores_of(model(images_BCHW)).float().cpu()


def difference(left_BK: Tensor, right_BK: Tensor) -> float:
    """Largest absolute difference."""
    return float((left_BK - right_BK).abs().max())


def masked_scores(
    twin: nn.Module,
    state: Mapping[str, Tensor],
    config: PruningConfig,
    masks: Mapping[str, Tensor],
    images_BCHW: Tensor,
) -> Tensor | None:
    """Class scores of a model that is only masked.

    Args:
        twin: a freshly built dense model; it is changed.
        state: the weights before channels were removed.
        config: what the channel groups are made from.
        masks: keep masks of the dense model's groups, as :attr:`Pruning.masks` gives them.
        images_BCHW: the images; one of them serves as example input.

    Returns:
        The scores, or None when the groups cannot be masked alone: the config removes channels at construction.
    """
    twin.load_state_dict(state)
    pruner = Pruning(twin, config, example_inputs=images_BCHW[:1])
    coupled = pruner.engine.coupled
    if coupled is None or coupled.removed:
        return None
    coupled.masks.set(torch.cat([masks[one.name] for one in coupled.dense_sets]))
    return scores(twin, images_BCHW)


class OnnxModel:
    """An ONNX file with one input and class scores as its first output.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.session = open_session(str(path))
        self.name = self.session.get_inputs()[0].name

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Class scores."""
        arrays = as_arrays(self.session, {self.name: images_BCHW.cpu().contiguous()})
        return torch.from_numpy(checked_run(self.session, arrays)[0]).float()


def accuracy_of(predict: Callable[[Tensor], Tensor], batches: Iterator[Batch]) -> float:
    """The fraction of images whose best class is right."""
    right, seen = 0, 0
    for images_BCHW, labels_B in batches:
        right += int((predict(images_BCHW).argmax(1) == labels_B.cpu()).sum())
        seen += len(labels_B)
    return right / max(seen, 1)
