"""Coupled channels: what the proximal step zeroes can be removed, and lambda finds its way to a MAC target.

Shape suffixes: ``_G`` groups.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from zoo import scramble, vision

from pruningawaretraining.costs.macs import count_macs
from pruningawaretraining.errors import ConfigError, TargetError
from pruningawaretraining.proximal import CoupledChannelGrouper, CoupledGrouper, LambdaController, PruneOptimizer
from pruningawaretraining.session.pruning import Pruning

INPUTS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))


class Residual(nn.Module):
    """Two blocks on one stream, as in a residual network."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, 8, 1, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def residual() -> Residual:
    torch.manual_seed(0)
    return scramble(Residual())  # type: ignore[return-value]


def coupled(model: nn.Module, lr: float = 0.05, max_sparsity: float | None = 1.0, **options: Any) -> tuple[Any, Any]:
    grouper = CoupledChannelGrouper(model, INPUTS[:1], max_sparsity=max_sparsity)
    groups = grouper.param_groups(**{"reg_lambda": 0.0, **options})
    return grouper, PruneOptimizer(torch.optim.SGD(groups, lr=lr, momentum=0.9))


def train(model: nn.Module, optimizer: PruneOptimizer, steps: int = 1) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        x = torch.randn(INPUTS.shape, generator=generator)
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()


def test_a_group_is_the_rows_and_norms_of_a_channel() -> None:
    model = residual()
    grouper = CoupledChannelGrouper(model, INPUTS[:1])
    roles = {member.role for member in grouper.grouping.members}
    assert roles == {"out", "norm", "bias"}
    assert [one.size for one in grouper.grouping.sets] == [12, 8, 8]
    stream = {member.name for member in grouper.grouping.members if int(member.slots.min()) == 0}
    assert stream == {
        "stem.0.weight",
        *(f"stem.1.{kind}" for kind in ("weight", "bias")),
        *(f"blocks.{number}.3.weight" for number in (0, 1)),
        *(f"blocks.{number}.4.{kind}" for number in (0, 1) for kind in ("weight", "bias")),
    }


def test_the_step_is_group_lasso_over_the_coupled_norm() -> None:
    model = residual()
    grouper, optimizer = coupled(model, lr=0.5, max_sparsity=None, reg_lambda=1.0)
    plain = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors = dict(plain.named_parameters())
    stream = ["stem.0.weight", "stem.1.weight", "stem.1.bias"]
    stream += [f"blocks.{number}.{rest}" for number in (0, 1) for rest in ("3.weight", "4.weight", "4.bias")]
    for channel in range(12):
        row = torch.cat([tensors[name][channel].flatten() for name in stream])
        factor = max(0.0, 1 - 0.5 * math.sqrt(len(row)) / float(row.detach().norm()))
        for name in stream:
            torch.testing.assert_close(model.get_parameter(name)[channel], factor * tensors[name][channel])
    assert torch.equal(model.head.weight, plain.head.weight)


@pytest.mark.parametrize(
    ("max_sparsity", "alive"),
    [(None, [0, 0, 0]), (1.0, [1, 1, 1]), (0.75, [3, 2, 2]), (0.7, [4, 3, 3]), (0.0, [12, 8, 8])],
)
@pytest.mark.parametrize("relative", [True, False])
def test_no_set_loses_more_than_its_limit(max_sparsity: float | None, alive: list[int], relative: bool) -> None:
    model = residual()
    grouper = CoupledChannelGrouper(model, INPUTS[:1], max_sparsity=max_sparsity, relative=relative)
    optimizer = PruneOptimizer(torch.optim.SGD(grouper.param_groups(reg_lambda=1e3), lr=0.05))
    train(model, optimizer, 3)
    left = ~grouper.zeroed_G()
    assert [int(left[one.start : one.stop].sum()) for one in grouper.grouping.sets] == alive


def test_relative_norms_make_sets_of_different_scale_compare() -> None:
    found = []
    for scale in (1.0, 0.01):
        model = residual()
        with torch.no_grad():
            for parameter in model.blocks[0][:2].parameters():
                parameter.mul_(scale)
        grouper = CoupledChannelGrouper(model, INPUTS[:1], relative=True)
        optimizer = PruneOptimizer(torch.optim.SGD(grouper.param_groups(reg_lambda=10.0), lr=0.1))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # whatever is below the mean of its set goes
        found.append(grouper.zeroed_G())
        ratios = optimizer.threshold_norms(grouper)
        assert torch.equal(ratios.cpu() <= 1.0, found[-1])
        for one in grouper.grouping.sets:
            assert float(ratios[one.start : one.stop].mean()) == pytest.approx(1.0)
            assert 0 < int(found[-1][one.start : one.stop].sum()) < one.size
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", ["residual", "resnet18", "mobilenet_v2", "vgg16_bn"])
def test_what_is_zero_is_removed_without_loss(name: str) -> None:
    model = residual() if name == "residual" else vision(name, classes=5)
    if name == "vgg16_bn":
        model.classifier[1] = nn.ReLU()
    inputs = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    grouper = CoupledChannelGrouper(model, inputs[:1], max_sparsity=1.0)
    optimizer = PruneOptimizer(torch.optim.SGD(grouper.param_groups(), lr=0.05))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    ratios = optimizer.threshold_norms(grouper)
    optimizer.param_groups[0]["reg_lambda"] = float(ratios.median()) / 0.05
    optimizer.reproject(grouper)
    model.eval()
    zeroed = grouper.zeroed_G()
    assert 0.4 < float(zeroed.double().mean()) < 0.6
    before, macs = model(inputs), count_macs(model, inputs)
    pruner = Pruning(model, {"rules": [grouper.removal_rule()]}, example_inputs=inputs[:1], optimizer=optimizer)
    pruner.prune(model, 0)
    assert pruner.sparsity == pytest.approx(float(zeroed.double().mean()))
    assert count_macs(model, inputs) < 0.75 * macs
    after = model(inputs)
    assert (before - after).abs().max().item() <= 1e-5 * before.abs().max().item()


@pytest.mark.parametrize("strength", [1.0, 2.0, 1e3])
def test_training_goes_on_after_a_removal(strength: float) -> None:
    """With 1000, one channel is left of every set, and a set of one is no choice any more."""
    model = residual()
    grouper, optimizer = coupled(model, reg_lambda=strength)
    train(model, optimizer, 4)
    kept = [int((~grouper.zeroed_G()[one.start : one.stop]).sum()) for one in grouper.grouping.sets]
    assert len(kept) <= sum(kept) < grouper.grouping.size
    latent = optimizer.state[model.stem[0].weight]["latent"]
    pruner = Pruning(model, {"rules": [grouper.removal_rule()]}, example_inputs=INPUTS[:1], optimizer=optimizer)
    pruner.prune(model, 0)
    assert optimizer.state[model.stem[0].weight]["latent"].shape == model.stem[0].weight.shape != latent.shape
    train(model, optimizer, 2)
    assert [one.size for one in grouper.grouping.sets] == [size for size in kept if size > 1]
    weight = model.stem[0].weight
    shrunk = not torch.equal(weight, optimizer.state[weight]["latent"])
    assert shrunk == (kept[0] > 1)


@pytest.mark.parametrize("target", [0.8, 0.5, 0.25])
def test_lambda_ends_on_the_mac_target(target: float) -> None:
    model = residual()
    grouper = CoupledChannelGrouper(model, INPUTS[:1], max_sparsity=1.0)
    optimizer = PruneOptimizer(torch.optim.SGD(grouper.param_groups(), lr=0.05, momentum=0.9), 5, 40)
    dense = count_macs(model, INPUTS[:1])
    controller = LambdaController.for_macs(optimizer, grouper, target, 5, 40, every=5)
    for step in range(45):
        train(model, optimizer)
        controller.step()
        if step < 40:
            assert controller.done == (step == 39)
    assert [point.step for point in controller.path] == [10, 15, 20, 25, 30, 35, 40]
    assert controller.path[-1].budget == pytest.approx(target)
    assert len({round(point.reg_lambda, 9) for point in controller.path}) > 3
    assert controller.path[-1].cost <= target < controller.path[-1].cost + 0.1
    assert max(abs(point.cost - point.budget) for point in controller.path[-3:]) < 0.3  # coarse: 28 groups in all
    zeroed = grouper.zeroed_G()
    assert controller.cost(~zeroed) / dense == pytest.approx(controller.path[-1].cost)
    assert controller.cost(~zeroed) <= target * dense
    model.eval()
    before = model(INPUTS)
    pruner = Pruning(model, {"rules": [grouper.removal_rule()]}, example_inputs=INPUTS[:1], optimizer=optimizer)
    pruner.prune(model, 0)
    assert pruner.macs.kept == count_macs(model, INPUTS[:1]) <= target * dense
    torch.testing.assert_close(model(INPUTS), before, rtol=1e-4, atol=1e-5)


def test_the_target_is_met_by_the_least_threshold() -> None:
    model = residual()
    grouper = CoupledChannelGrouper(model, INPUTS[:1], max_sparsity=1.0)
    optimizer = PruneOptimizer(torch.optim.SGD(grouper.param_groups(), lr=0.05), 0, 20)
    controller = LambdaController.for_macs(optimizer, grouper, 0.5, 0, 20, every=4, gain=1.0)
    for _ in range(20):
        train(model, optimizer)
        controller.step()
    ratios = optimizer.threshold_norms(grouper)
    zeroed = grouper.zeroed_G()
    last = torch.argmax(torch.where(zeroed, ratios, -1.0))
    one_less = ~zeroed
    one_less[last] = True
    assert controller.cost(~zeroed) <= 0.5 * controller.dense < controller.cost(one_less)
    assert bool((ratios[zeroed].max() < ratios[~zeroed]).sum() >= (~zeroed).sum() - 3)  # but for those kept alive


def test_a_controller_can_be_resumed() -> None:
    model = residual()
    grouper, optimizer = coupled(model)
    controller = LambdaController.for_macs(optimizer, grouper, 0.5, 0, 12, every=2)
    for _ in range(5):
        train(model, optimizer)
        controller.step()
    again = LambdaController.for_macs(optimizer, grouper, 0.5, 0, 12, every=2)
    again.load_state_dict(controller.state_dict())
    assert again.report() == controller.report()
    assert [point["step"] for point in again.report()] == [2, 4]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": 0.0}, ConfigError, "target"),
        ({"target": 1.5}, ConfigError, "target"),
        ({"target": 0.001}, TargetError, "out of reach"),
        ({"end": 3}, ConfigError, "end: 3"),
        ({"schedule": "cubik"}, ConfigError, "did you mean 'cubic'"),
        ({"gain": 0.0}, ConfigError, "gain"),
    ],
)
def test_wrong_controllers_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    grouper, optimizer = coupled(residual())
    with pytest.raises(error, match=message):
        LambdaController.for_macs(optimizer, grouper, **{"target": 0.5, "start": 5, "end": 20, **options})


@pytest.mark.parametrize("healing", [31, 40])
def test_healing_begins_where_the_controller_ends(healing: int) -> None:
    model = residual()
    grouper = CoupledChannelGrouper(model, INPUTS[:1], max_sparsity=0.9)
    late = PruneOptimizer(torch.optim.SGD(grouper.param_groups(), lr=0.05), 0, healing)
    with pytest.raises(ConfigError, match=f"end: 30 is not healing_start_step, {healing}"):
        LambdaController.for_macs(late, grouper, 0.5, 0, 30)
    optimizer = PruneOptimizer(torch.optim.SGD(grouper.param_groups(), lr=0.05))
    controller = LambdaController.for_macs(optimizer, grouper, 0.5, 0, 30, every=5)
    assert optimizer.healing_start_step == 30
    reached = []
    for _ in range(45):
        train(model, optimizer)
        controller.step()
        reached.append(optimizer.relative_sparsity)
    assert len(set(reached[30:])) == 1 and controller.cost(~grouper.zeroed_G()) <= 0.5 * controller.dense


def test_nothing_to_remove_is_said() -> None:
    grouper, _ = coupled(residual())
    with pytest.raises(ConfigError, match="removal_rule: no channel is 0 yet"):
        grouper.removal_rule()


def test_a_grouper_of_no_param_group_is_refused() -> None:
    model = residual()
    _, optimizer = coupled(model)
    with pytest.raises(ConfigError, match="no param group"):
        optimizer.groups_of(CoupledChannelGrouper(model, INPUTS[:1]))


def test_missing_and_foreign_parameters_are_named() -> None:
    model = residual()
    grouper = CoupledChannelGrouper(model, INPUTS[:1])
    (first, _) = grouper.param_groups()
    with pytest.raises(ConfigError, match=r"\.bias belongs to CoupledChannelGrouper"):
        PruneOptimizer(torch.optim.SGD([{**first, "params": first["params"][:-1]}], lr=0.1))
    with pytest.raises(ConfigError, match="belongs to no group"):
        PruneOptimizer(torch.optim.SGD([{**first, "params": [*first["params"], model.head.weight]}], lr=0.1))


def test_param_groups_may_share_a_grouper() -> None:
    """Norms often go without weight decay: in a param group of their own, yet in the same coupled groups."""
    one, two = residual(), residual()
    grouper, optimizer = coupled(one, reg_lambda=2.0)
    other = CoupledChannelGrouper(two, INPUTS[:1], max_sparsity=1.0)
    common = {"group_type": other, "prox_type": "ProxGroupLasso", "reg_lambda": 2.0}
    split = [
        {"params": [p for p in other.parameters() if p.dim() > 1], **common},
        {"params": [p for p in other.parameters() if p.dim() == 1], **common, "weight_decay": 0.0},
        {"params": list(two.head.parameters())},
    ]
    second = PruneOptimizer(torch.optim.SGD(split, lr=0.05, momentum=0.9))
    for _ in range(3):
        train(one, optimizer)
        train(two, second)
    for mine, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    split[1]["reg_lambda"] = 1.0
    with pytest.raises(ConfigError, match=r"param_groups\[1\].reg_lambda: 1.0 differs"):
        PruneOptimizer(torch.optim.SGD([{**group} for group in split], lr=0.1))


def test_state_and_copies_of_coupled_groups() -> None:
    model = residual()
    grouper, optimizer = coupled(model, reg_lambda=2.0)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["group_type"] == "CoupledChannelGrouper"
    other = residual()
    other.load_state_dict(model.state_dict())
    _, again = coupled(other)
    again.load_state_dict(copy.deepcopy(state))  # torch loads tensors without copying them
    copied_model, copied = copy.deepcopy((model, optimizer))
    for one, trained in ((other, again), (copied_model, copied), (model, optimizer)):
        train(one, trained, 2)
    for a, b, c in zip(model.parameters(), other.parameters(), copied_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=0, atol=0)
    assert copied.param_groups[0]["group_type"].model is copied_model


def test_any_grouping_of_the_library_can_be_coupled() -> None:
    model = residual()
    found = CoupledChannelGrouper(model, INPUTS[:1]).channels.grouping
    grouper = CoupledGrouper(found)
    options = {"group_type": grouper, "prox_type": "MinSparsityConstraint", "min_sparsity": 0.5}
    optimizer = PruneOptimizer(torch.optim.SGD([{"params": grouper.parameters(), **options}], lr=0.1))
    train(model, optimizer)
    zeroed = grouper.grouping.reduce_of(lambda weight: (weight != 0).float()) == 0
    assert [int(zeroed[one.start : one.stop].sum()) for one in found.sets] == [6, 4, 4]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_masks_hold_and_steps_count_once_beside_a_pruner(given: bool, base: str) -> None:
    """A pruner with masks of its own, told of the optimizer or left to find it."""
    model = residual()
    grouper = CoupledChannelGrouper(model, INPUTS[:1])
    groups = grouper.param_groups(reg_lambda=0.01)
    kinds = {"sgd": lambda: torch.optim.SGD(groups, lr=0.05, momentum=0.9), "adamw": lambda: torch.optim.AdamW(groups)}
    optimizer = PruneOptimizer(kinds[base](), 1, 7)
    rule = {"target": {"sparsity": 0.5}, "start": 0, "end": 1}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=INPUTS[:1], optimizer=optimizer if given else None)
    train(model, optimizer, 2)
    pruner.prune(model, 0)  # a quarter, masked
    masked = [name for name, keep in pruner.masks.items() if not bool(keep.all())]
    for _ in range(4):
        train(model, optimizer)
        gone = ~pruner.masks["stem.0"]
        assert not bool(model.stem[0].weight[gone].any()) or "stem.0" not in masked
        assert not bool(model.head.weight[:, gone].any())
    assert pruner.steps == 6
    pruner.prune(model, 1)  # half, removed
    train(model, optimizer, 4)
    assert pruner.steps == 10
    inside = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert inside == {id(parameter) for parameter in model.parameters()}
    assert len(optimizer.state) == len(inside)
