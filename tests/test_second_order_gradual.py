"""Second-order criteria in scheduled rules: with data of their own, and from the gradients of training."""

from __future__ import annotations

import copy

import pytest
import torch
from second_order_fixture import batches, cross_entropy, layer_weights, rule, small_net, total, zeros

from pruningawaretraining import Pruning
from pruningawaretraining.errors import ConfigError

CAP = {"type": "cap", "num_grads": 16, "micro_batch": 2}
CRITERIA = [
    CAP,
    {**CAP, "type": "obs"},
    {"type": "fast_cap", "num_grads": 16},
    {"type": "sparse_gpt", "num_grads": 4},
]


def ids(criterion):
    return criterion["type"]


def config(criterion, pattern="unstructured", **others):
    return {"rules": [rule(pattern, criterion, schedule="linear", start=1, end=3, **others)]}


def train_epoch(model, optimizer, pruner, epoch, data):
    pruner.prune(model, epoch)
    model.train()
    for inputs, targets in data:
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def trained(criterion, pattern="unstructured", epochs=5, data=None, calibrate=True, seed=0, **others):
    model, data = small_net(seed), batches(4) if data is None else data
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    pruner = Pruning(model, config(criterion, pattern, **others), optimizer=optimizer)
    if calibrate:
        pruner.calibrate_with(data, cross_entropy)
    levels = []
    for epoch in range(epochs):
        train_epoch(model, optimizer, pruner, epoch, data)
        levels.append(zeros(model) / total(model))
    return model, pruner, levels


@pytest.mark.parametrize("criterion", CRITERIA, ids=ids)
def test_sparsity_rises_on_schedule_and_what_is_masked_stays_zero(criterion):
    model, pruner, levels = trained(criterion)
    assert levels == pytest.approx([0.0, 0.5 / 3, 1 / 3, 0.5, 0.5], abs=0.005)
    assert pruner.phase == "finetune"
    assert pruner.sparsity == pytest.approx(0.5, abs=0.005)
    assert all((weight != 0).any() for weight in layer_weights(model).values())


@pytest.mark.parametrize("criterion", CRITERIA, ids=ids)
@pytest.mark.parametrize("pattern", ["2:4", "1x4", "1:3"])
def test_patterns_are_whole_at_the_end(criterion, pattern):
    target = {"sparsity": 1 / 3 if pattern == "1:3" else 0.5}
    model, pruner, _ = trained(criterion, pattern, target=target)
    assert pruner.phase == "finetune"
    for name, weight in layer_weights(model).items():
        rows = weight.movedim(1, -1)
        of, keep = {"2:4": (4, 2), "1x4": (4, 0), "1:3": (3, 2)}[pattern]
        for start in range(0, rows.shape[-1], of):
            run = rows[..., start : start + of] != 0
            if keep:
                assert (run.sum(-1) == min(keep, run.shape[-1])).all(), name
            else:
                assert (run.all(-1) | ~run.any(-1)).all(), name


def test_an_event_moves_the_weights_that_stay_and_lowers_the_loss_it_costs():
    """The same masks without compensation lose more."""
    data = batches(16, 16)
    model = small_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(12):
        for inputs, targets in data:
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    dense = copy.deepcopy(model)
    pruner = Pruning(model, {"rules": [rule("unstructured", {**CAP, "num_grads": 128, "damp": 1e-5}, start=0)]})
    pruner.calibrate_with(data, cross_entropy)
    pruner.prune(model, 0)
    only_masked = copy.deepcopy(dense)
    with torch.no_grad():
        for name, weight in layer_weights(only_masked).items():
            weight.mul_(model.get_parameter(name) != 0)

    def loss(net):
        net.eval()
        return float(sum(cross_entropy(net(x), y).detach() for x, y in data))

    assert loss(dense) < loss(model) < loss(only_masked)


def test_an_epoch_of_one_step_prunes():
    """The old system never pruned with steps_per_epoch = 1."""
    _, _, levels = trained(CAP, data=batches(1))
    assert levels[-1] == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_second_event_does_not_zero_everything(rounds):
    model, _, levels = trained({**CAP, "num_recomputations": rounds})
    assert levels[-1] == pytest.approx(0.5, abs=0.001)
    assert all(float(weight.abs().max()) > 0 for weight in layer_weights(model).values())


def test_events_leave_the_accumulated_gradients_and_the_modes_alone():
    model = small_net().train()
    pruner = Pruning(model, {"rules": [rule("unstructured", CAP)]})
    pruner.calibrate_with(batches(2), cross_entropy)
    cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    before = {name: one.grad.clone() for name, one in model.named_parameters()}
    running = model.norm.running_mean.clone()
    pruner.prune(model, 0)
    for name, one in model.named_parameters():
        kept = (one != 0) | torch.tensor(one.dim() == 1)
        assert torch.equal(one.grad[kept], before[name][kept])
    assert all(module.training for module in model.modules())
    assert torch.equal(model.norm.running_mean, running)


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "2:4"])
def test_without_data_of_its_own_a_criterion_reads_the_gradients_of_training(pattern):
    model, pruner, levels = trained(CAP, pattern, calibrate=False)
    assert pruner.phase == "finetune"
    assert levels[0] == 0 and levels[-1] > 0.35


def test_a_pattern_that_cannot_be_compensated_is_refused_when_the_pruner_is_made():
    with pytest.raises(ConfigError, match=r"slices.criterion: .* not the groups of .*'slice'"):
        Pruning(small_net(), {"rules": [rule({"type": "slice", "block_size": 2}, CAP, name="slices")]})


def test_a_resumed_run_goes_on_with_the_same_masks_and_weights():
    data = batches(4)

    def start():
        torch.manual_seed(5)
        model = small_net()
        model.drop.p = 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        pruner = Pruning(model, config(CAP), optimizer=optimizer)
        pruner.calibrate_with(data, cross_entropy)
        return model, optimizer, pruner

    model, optimizer, pruner = start()
    for epoch in range(5):
        if epoch == 2:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
        train_epoch(model, optimizer, pruner, epoch, data)
    again, other, resumed = start()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    for epoch in range(2, 5):
        train_epoch(again, other, resumed, epoch, data)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
