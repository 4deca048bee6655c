"""What the pages on averages, AMP, accumulation, resuming and early stopping promise, and what fails without it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pruningawaretraining import Pruning
from pruningawaretraining.experiment.models import DigitsResNet

EXAMPLE = torch.randn(1, 1, 8, 8)
RULE = {"target": {"macs": 0.5}, "start": 1, "end": 3}
PENALTY = {"type": "growing_l2", "strength": 0.1}
SCALE = 65536.0


def batch(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size) % 10


def begin(**rule: Any) -> tuple[nn.Module, torch.optim.Optimizer, Pruning]:
    torch.manual_seed(0)
    model = DigitsResNet(widths=(16, 32), blocks=1).eval()  # of an eval model, two halves of a batch are the batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruning(model, {"rules": [{**RULE, **rule}]}, example_inputs=EXAMPLE, optimizer=optimizer)
    return model, optimizer, pruner


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    images, labels = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("given", [False, True])
def test_an_average_that_the_pruner_does_not_know_stops_at_the_removal(given: bool) -> None:
    model, optimizer, pruner = begin()
    hidden = {AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))}  # in a set, none is looked for

    def average() -> AveragedModel:
        return next(iter(hidden))

    if given:
        pruner.attach_ema(average())
    average().update_parameters(model)
    for epoch in (0, 1):
        train(model, optimizer)
        pruner.prune(model, epoch)
    average().update_parameters(model)
    gone = model.conv1.weight.abs().sum((1, 2, 3)) == 0
    left = average().module.conv1.weight.detach()[gone].abs().sum()
    assert bool(gone.any()) and (float(left) == 0) is given, "masked in the model, and in the average?"
    for epoch in (2, 3):
        pruner.prune(model, epoch)
    if given:
        average().update_parameters(model)
        assert average().module.conv1.out_channels == model.conv1.out_channels < 16
    else:
        with pytest.raises(RuntimeError, match="must match the size of tensor"):
            average().update_parameters(model)


def penalised(strength: float, scaled: bool, parts: int = 1) -> list[torch.Tensor]:
    """Weights after one step with a penalty."""
    model, optimizer, _ = begin(regularizer={**PENALTY, "strength": strength}, start=5, end=6)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=scaled)
    images, labels = batch()
    for some, wanted in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        scaler.scale(nn.functional.cross_entropy(model(some), wanted) / parts).backward()
    scaler.step(optimizer)
    scaler.update()
    return [one.detach() for one in model.parameters()]


def apart(these: list[torch.Tensor], those: list[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(these, those, strict=True))


def test_a_scaled_loss_leaves_the_penalty_as_strong_as_it_is() -> None:
    plain, none = penalised(0.1, scaled=False), penalised(0.0, scaled=False)
    assert apart(penalised(0.1, scaled=True), plain) < 1e-6 < 1e-3 < apart(plain, none)
    assert apart(penalised(0.1 / SCALE, scaled=False), none) < 1e-5, "what is left of a penalty on scaled gradients"


def test_accumulated_batches_have_one_penalty() -> None:
    once = penalised(0.1, scaled=False)
    assert apart(penalised(0.1, scaled=False, parts=4), once) < 1e-6
    assert apart(penalised(0.4, scaled=False), once) > 1e-3, "what one penalty for each of four micro-batches does"


def test_weights_alone_do_not_resume() -> None:
    model, optimizer, pruner = begin()
    for epoch in (0, 1):
        train(model, optimizer)
        pruner.prune(model, epoch)
    masked, state = copy.deepcopy(model.state_dict()), pruner.state_dict()
    again, _, fresh = begin()
    again.load_state_dict(masked)
    assert (fresh.phase, fresh.sparsity) == ("regularize", 0.0)
    fresh.load_state_dict(state)
    assert (fresh.phase, fresh.sparsity) == ("prune", pruner.sparsity)
    for epoch in (2, 3):
        pruner.prune(model, epoch)
    with pytest.raises(RuntimeError, match="size mismatch"):
        begin()[0].load_state_dict(model.state_dict())


def test_a_best_epoch_of_before_is_of_the_dense_model() -> None:
    model, optimizer, pruner = begin()
    best = copy.deepcopy(model.state_dict())
    for epoch in range(3):
        train(model, optimizer)
        pruner.prune(model, epoch)
    assert pruner.phase == "prune" and model.conv1.out_channels == 16, "stopped here, it is as large as before"
    pruner.remove()
    assert model.conv1.out_channels < 16
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(best)
