"""The criterion `reconstruction`: what a channel's removal costs its readers once they have been fitted anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning
from pruningawaretraining.allocation.policies import allocation_of
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.criteria.base import Statistics
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.criteria.second_order.listening import EVERY
from pruningawaretraining.criteria.second_order.reconstruction import POOL, Reconstruction
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.session.one_shot import one_shot


def linear(width: int = 6) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(width)
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 5))
    return model, [(torch.randn(512, 8), torch.randint(0, 5, (512,)))]


def convolutional() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 36, 3)
    )
    return model, [(torch.randn(16, 2, 6, 6), torch.randint(0, 3, (16,)))]


def groups(model: nn.Module, data: list[tuple[Tensor, Tensor]], source: str) -> Grouping:
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.1}, "layers": [source]}]}, example_inputs=data[0][0])
    return pruner.channel_pruner.found.grouping


def scores(model: nn.Module, data: list[tuple[Tensor, Tensor]], grouping: Grouping) -> Tensor:
    criterion = Reconstruction(num_batches=1)
    tensors = criterion.measured(model, grouping, Calibration(model, data, functional.cross_entropy))
    return criterion.score(grouping, Statistics(tensors=tensors))


def left_unexplained(inputs_ND: Tensor, outputs_NO: Tensor, keep_D: Tensor) -> float:
    """Share of the outputs' variance that no linear function of these inputs gives, by plain least squares."""
    kept = inputs_ND[:, keep_D] - inputs_ND[:, keep_D].mean(0)
    wanted = outputs_NO - outputs_NO.mean(0)
    if not kept.shape[1]:
        return 1.0
    fit = torch.linalg.lstsq(kept, wanted).solution
    return float((wanted - kept @ fit).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("width", [6, POOL + 9, 2 * POOL + 5])
def test_scores_are_the_errors_of_a_fit(width: int) -> None:
    """The scores of what has gone add up to what a fit without it leaves unexplained, whatever the width."""
    model, data = linear(width)
    found = scores(model, data, groups(model, data, "0"))
    hidden = model[:2](data[0][0]).detach().double()
    outputs = hidden @ model[2].weight.detach().double().T
    order = torch.argsort(found, stable=True)
    for gone in {1, width // 3, width // 2, width - 1}:
        keep = torch.ones(width, dtype=torch.bool)
        keep[order[:gone]] = False
        expected = left_unexplained(hidden, outputs, keep)
        assert float(found[order[:gone]].sum()) == pytest.approx(expected, rel=0.05, abs=2e-3)


def test_convolutions_count_all_kernel_positions() -> None:
    model, data = convolutional()
    found = scores(model, data, groups(model, data, "0"))
    hidden = model[:2](data[0][0]).detach().double()
    columns = functional.unfold(hidden, 3, padding=1).movedim(1, -1).reshape(-1, 45)
    outputs = columns @ model[2].weight.detach().double().flatten(1).T
    first = int(found.argmin())
    alone = []
    for channel in range(5):
        keep = torch.ones(45, dtype=torch.bool)
        keep[9 * channel : 9 * channel + 9] = False
        alone.append(left_unexplained(columns, outputs, keep))
    assert first == min(range(5), key=alone.__getitem__)
    assert float(found[first]) == pytest.approx(alone[first], rel=0.05)


def test_of_two_that_are_alike_one_goes_for_nothing() -> None:
    model, data = linear(6)
    with torch.no_grad():
        for part in (model[0].weight, model[0].bias):
            part[3:] = part[:3] * 2.0
    found = scores(model, data, groups(model, data, "0"))
    pairs = found.view(2, 3)
    assert bool((pairs.amin(0) < 5e-3).all())
    assert bool((pairs.amax(0) > 0.02).all())


def test_what_no_layer_reads_that_can_be_fitted_goes_last() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.Flatten(),
        nn.LazyLinear(3),
    )  # fmt: skip
    x = torch.randn(4, 2, 8, 8)
    model(x)
    data = [(x, torch.zeros(4, dtype=torch.long))]
    found = Pruning(model, {"rules": [{"target": {"sparsity": 0.1}}]}, example_inputs=x).channel_pruner.found.grouping
    first = next(one for one in found.sets if one.name == "0")
    unread = torch.isinf(scores(model, data, found))
    assert unread.sum() == 4 and bool(unread[first.start : first.stop].all())
    with pytest.raises(ConfigError, match="finds no layer that reads 0"):
        scores(model, data, groups(model, data, "0"))


def test_heads_of_pytorchs_attention_are_refused_by_name_and_nothing_is_masked() -> None:
    layers = [nn.TransformerEncoderLayer(16, 4, 32, batch_first=True) for _ in range(2)]
    model = nn.Sequential(nn.Linear(8, 16), *layers, nn.Linear(16, 3))
    x = torch.randn(4, 5, 8)
    spec = {"rules": [{"pattern": "head", "criterion": "reconstruction", "target": {"sparsity": 0.5}}]}
    pruner = Pruning(model, spec, example_inputs=x)
    pruner.calibrate_with([(x, x[..., :3])], functional.mse_loss)
    with pytest.raises(ConfigError, match="nn.MultiheadAttention.*another criterion"):
        pruner.prune(model, 0)
    assert pruner.sparsity == 0


def rule(**more: Any) -> dict[str, Any]:
    return {"rules": [{"criterion": "reconstruction", "target": {"macs": 0.6}, "layers": ["0"], **more}]}


def test_a_training_without_data_listens_to_one_batch_in_sixteen() -> None:
    model, data = linear(16)
    pruner = Pruning(model, rule(start=1), example_inputs=data[0][0])
    heard = pruner.engine.rules[0].feed.collector
    model.eval()
    model(data[0][0])
    assert heard.sums == {}
    model.train()
    counts = []
    for _ in range(EVERY + 1):
        model(data[0][0])
        counts.append(heard.counts["2"])
    assert counts == [512.0] * EVERY + [512 * 1.9]
    pruner.prune(model, 0)
    pruner.prune(model, 1)
    assert model[0].out_features < 16 and pruner.phase == "finetune"


def test_a_training_with_data_does_not_listen() -> None:
    model, data = linear(16)
    pruner = Pruning(model, rule(), example_inputs=data[0][0])
    pruner.calibrate_with(data, functional.cross_entropy)
    model.train()
    model(data[0][0])
    assert pruner.engine.rules[0].feed.collector.sums == {}
    pruner.prune(model, 0)
    assert model[0].out_features < 16


def test_one_shot_uses_its_data() -> None:
    model, data = linear(16)
    with torch.no_grad():
        for part in (model[0].weight, model[0].bias):
            part[8:] = part[:8] * 3.0
    spec = {
        "criterion": "reconstruction",
        "layers": ["0"],
        "compensation": "least_squares",
        "target": {"sparsity": 0.5},
    }
    (pruned,) = one_shot(model, spec, data, functional.cross_entropy).values()
    before, after = model(data[0][0]), pruned(data[0][0])
    assert pruned[0].out_features == 8
    assert float((before - after).detach().square().mean()) < 1e-3 * float(before.detach().var())


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"criterion": "reconstruction"}, "macs"),
        ({"criterion": {"type": "reconstruction"}, "target": {"parameters": 0.5}}, "parameters"),
        ({"criterion": "reconstruction", "target": {"latency": 0.5, "macs": 0.5}}, "latency"),
        ({"criterion": "reconstruction", "allocation": "uniform"}, "uniform"),
        ({"criterion": "magnitude"}, "ranking"),
        ({"criterion": "magnitude", "target": {"latency": 0.5}}, "latency"),
    ],
)
def test_scores_that_add_up_go_by_what_is_saved(more: dict[str, Any], expected: str) -> None:
    assert allocation_of(Rule.model_validate({"target": {"macs": 0.5}, **more})) == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"criterion": {"type": "reconstruction", "num_batches": 0}}, "num_batches: 0 is not allowed"),
        ({"pattern": "depth"}, "'reconstruction' scores channels and heads, not"),
        ({"pattern": "4x1", "target": {"sparsity": 0.5}, "layers": ["2"]}, "'reconstruction' scores channels"),
    ],
)
def test_what_is_refused(more: dict[str, Any], message: str) -> None:
    model, data = linear()
    with pytest.raises(ConfigError, match=message):
        Pruning(model, rule(**more), example_inputs=data[0][0])


def test_slices_have_no_readers() -> None:
    model, data = linear()
    with pytest.raises(ConfigError, match="scores channels and heads, not the groups of '4x1'"):
        one_shot(model, {"pattern": "4x1", "criterion": "reconstruction", "target": {"sparsity": 0.5}, "layers": ["2"]},
                 data, functional.cross_entropy)  # fmt: skip
