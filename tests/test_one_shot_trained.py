"""One shot on a small network that has been trained on real digits: what the criteria and compensations are for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from pruningawaretraining.experiment.models import DigitsResNet
from pruningawaretraining.session.one_shot import AfterPruning, accuracy, one_shot

OBS = {"type": "obs", "num_grads": 256, "micro_batch": 4}
CAP = {"type": "cap", "num_grads": 256, "micro_batch": 4, "fisher_block_size": 48, "damp": 1e-5}


@pytest.fixture(scope="module")
def trained():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    data = list(zip(images[:1280].split(32), labels[:1280].split(32), strict=True))
    torch.manual_seed(0)
    model = DigitsResNet(widths=(16, 32), blocks=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(6):
        for inputs, targets in data:
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    test = [(images[1280:], labels[1280:])]
    assert accuracy(model.eval(), test) > 0.94
    return model, data, test


def reached(trained: tuple[nn.Module, list, list], pattern: str, criterion: object, sparsity: float, **after) -> float:
    model, data, test = trained
    spec = {"pattern": pattern, "criterion": criterion}
    pruned = one_shot(model, spec, data, functional.cross_entropy, [sparsity], after=AfterPruning(**after))
    return accuracy(pruned[sparsity], test)


def test_obs_channels_lose_less_and_least_squares_the_least(trained):
    """Measured: magnitude 33%, OBS 82%, with the bias 90%, bias and variance 91%, least squares 94% of 96%."""
    magnitude, obs, bias, variance, squares = (
        reached(trained, "channel", "magnitude", 0.3),
        *(
            reached(trained, "channel", OBS, 0.3, compensation=one)
            for one in ("none", "bias", "bias_variance", "least_squares")
        ),
    )
    assert magnitude + 0.2 < obs < min(bias, variance, squares)
    assert squares > 0.9


def test_norms_measured_again_help_removed_channels(trained):
    assert reached(trained, "channel", "magnitude", 0.3) + 0.2 < reached(
        trained, "channel", "magnitude", 0.3, norm_batches=20
    )


def test_cap_is_at_least_obs_is_more_than_magnitude_for_single_weights(trained):
    plain = {"type": "magnitude", "normalize": "none"}
    cap, obs, magnitude = (reached(trained, "unstructured", one, 0.8) for one in (CAP, {**CAP, "type": "obs"}, plain))
    assert cap >= obs - 0.01 and obs > magnitude + 0.05
