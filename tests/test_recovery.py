"""Recovery in a loop of one's own: rates at every step, averaged weights, norm statistics, epochs for saved time."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from pruningawaretraining import Pruning, load_config
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.recovery import (
    RewoundRates,
    averaged,
    course_of,
    epochs_for_time,
    measure_norms,
    rewound,
    step_seconds,
    take_average,
    warm_up,
)

RULE = {"pattern": "unstructured", "start": 1, "target": {"sparsity": 0.5}}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


# --- rates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "to", "expected"),
    [
        (3.0, 0.0, 3.0),  # before pruning is over
        (4.0, 0.0, 0.0),
        (8.0, 0.0, 5.0),
        (12.0, 0.0, 10.0),
        (4.0, 2.0, 2.0),
        (8.0, 2.0, 6.0),
        (4.0, None, 4.0),  # only stretched
        (8.0, None, 7.0),
        (13.0, None, 10.0),
    ],
)
def test_a_schedule_of_10_epochs_goes_back_at_epoch_4_of_12(epoch: float, to: float | None, expected: float) -> None:
    assert rewound(epoch, 4.0, 12.0, 10.0, to) == pytest.approx(expected)


def test_the_warm_up_rises_from_nothing_once_pruning_is_over() -> None:
    assert [warm_up(epoch, 4, 2) for epoch in (3.9, 4, 4.5, 5, 6, 9)] == [1, 0, 0.25, 0.5, 1, 1]
    assert warm_up(4, 4, 0) == 1


SCHEDULERS: dict[str, Any] = {
    "none": lambda one: None,
    "cosine": lambda one: lr_scheduler.CosineAnnealingLR(one, 6),
    "steps": lambda one: lr_scheduler.MultiStepLR(one, [2, 4], 0.1),
    "lambda": lambda one: lr_scheduler.LambdaLR(one, lambda epoch: 1 / (1 + epoch)),
    "one cycle": lambda one: lr_scheduler.OneCycleLR(one, 0.3, total_steps=7),
    "sequential": lambda one: lr_scheduler.SequentialLR(
        one, [lr_scheduler.LinearLR(one, 0.5, total_iters=2), lr_scheduler.ExponentialLR(one, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop"])
def test_the_course_of_a_scheduler_is_what_it_does_and_it_is_not_touched(name: str, kind: str) -> None:
    model = network()
    halves = [{"params": list(model[0].parameters())}, {"params": list(model[4].parameters()), "lr": 0.01}]
    optimizer = getattr(torch.optim, kind)(halves, lr=0.1, **({} if kind == "AdamW" else {"momentum": 0.9}))
    scheduler = SCHEDULERS[name](optimizer)
    before = {} if scheduler is None else {key: value for key, value in scheduler.state_dict().items() if key[0] != "_"}
    found = course_of(optimizer, scheduler, 6)
    if scheduler is not None:
        assert {key: value for key, value in scheduler.state_dict().items() if key[0] != "_"} == before
    stepped = []
    for _ in range(7):
        stepped.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        if scheduler is not None and len(stepped) < 7:
            scheduler.step()
    assert found == tuple(stepped)


def test_the_rates_at_each_step_of_a_restart_with_a_warm_up() -> None:
    optimizer = sgd(network())
    rates = RewoundRates.of(optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 4), 4)
    cosine = [0.05 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert [rates.at(epoch)[0] for epoch in range(4)] == pytest.approx(cosine)
    again = rates.after(2, 6, to=0, warmup=1.0, peak=0.5)
    halves = [2 + number / 2 for number in range(8)]
    expected = [0.0, 0.5 * cosine[0], cosine[1], cosine[1], cosine[2], cosine[2], cosine[3], cosine[3]]
    expected = [expected[0], 0.5 * 0.5 * cosine[0], *(0.5 * one for one in expected[2:])]
    assert [again.apply(optimizer, epoch)[0] for epoch in halves] == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected[-1])
    assert again.at(1)[0] == pytest.approx(cosine[1])  # what was before stays


def test_a_rate_that_is_a_tensor_is_filled() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], lr=torch.tensor(0.1))
    kept = optimizer.param_groups[0]["lr"]
    RewoundRates.of(optimizer, None, 4).after(2, peak=0.5).apply(optimizer, 3)
    assert optimizer.param_groups[0]["lr"] is kept and float(kept) == pytest.approx(0.05)


def test_what_cannot_be_rewound_is_refused() -> None:
    optimizer = sgd(network())
    with pytest.raises(ConfigError, match="ReduceLROnPlateau has no course"):
        course_of(optimizer, lr_scheduler.ReduceLROnPlateau(optimizer), 3)
    with pytest.raises(ConfigError, match="OneCycleLR fails at step 4"):
        course_of(optimizer, lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4), 6)
    rates = RewoundRates.of(optimizer, None, 4)
    for options, message in (
        ({"to": 4.0}, "to: 4 is not before the schedule's end, 4"),
        ({"warmup": -1.0}, "warmup: -1.0 is not allowed. Allowed: a number of 0 or more"),
        ({"peak": 0.0}, "peak: 0.0 is not allowed. Allowed: a number above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            rates.after(2, **options)


# --- averages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "weights"), [("ema", [0.5**3, 0.5**3, 0.5**2, 0.5]), ("swa", [0.25] * 4)])
def test_the_average_is_that_of_the_weights_and_masks_hold(kind: str, weights: list[float]) -> None:
    model = network()
    optimizer = sgd(model)
    pruner = Pruning(model, {"rules": [RULE]}, optimizer=optimizer)
    pruner.prune(model, 1)
    average, seen = averaged(model, kind, 0.5), []
    pruner.attach_ema(average)
    for number in range(4):
        optimizer.zero_grad()
        torch.manual_seed(number)
        model(torch.randn(4, 1, 8, 8)).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
        seen.append([one.detach().clone() for one in model.parameters()])
    masked = [one == 0 for one in model.parameters()]
    statistics = model[1].running_mean.clone()
    take_average(model, average)
    for place, one in enumerate(model.parameters()):
        expected = sum(weight * step[place] for weight, step in zip(weights, seen, strict=True))
        assert torch.allclose(one, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(one == 0, masked[place])
    assert int((model[4].weight == 0).sum()) >= model[4].weight.numel() // 4
    assert torch.equal(model[1].running_mean, statistics)


def test_what_is_zero_in_the_model_stays_so_where_masks_have_moved() -> None:
    model = nn.Linear(4, 1, bias=False)
    average = averaged(model)
    for zero in (0, 1):
        with torch.no_grad():
            model.weight.fill_(2.0)[0, zero] = 0
        average.update_parameters(model)
    assert bool(average.module.weight[0, 1] > 0)
    take_average(model, average)
    assert (model.weight == 0).tolist() == [[False, True, False, False]]


def test_an_average_from_before_a_removal_is_refused_and_nothing_changes() -> None:
    average, model = averaged(nn.Linear(4, 3)), nn.Linear(4, 2)
    before = model.weight.clone()
    with pytest.raises(ConfigError, match="average: its weights have other shapes"):
        take_average(model, average)
    assert torch.equal(model.weight, before)
    with pytest.raises(ConfigError, match="kind: 'swo' is not known; did you mean 'swa'"):
        averaged(model, "swo")
    with pytest.raises(ConfigError, match="decay: 1.5 is not allowed"):
        averaged(model, decay=1.5)


def test_norms_are_measured_anew_as_means_over_batches() -> None:
    model = network().train()
    torch.manual_seed(1)
    batches = [(torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)) for _ in range(3)]
    weights = [one.detach().clone() for one in model.parameters()]
    assert measure_norms(model, batches, 2) == 1
    with torch.no_grad():
        outputs = [model[0](images) for images, _ in batches[:2]]
    means = torch.stack([one.mean((0, 2, 3)) for one in outputs]).mean(0)
    variances = torch.stack([one.transpose(0, 1).flatten(1).var(1) for one in outputs]).mean(0)
    assert torch.allclose(model[1].running_mean, means, atol=1e-6)
    assert torch.allclose(model[1].running_var, variances, atol=1e-6)
    assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True)) and model.training


# --- budget ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "dense", "pruned", "expected"),
    [(10, 2.0, 1.0, 20), (10, 3.0, 2.0, 15), (7, 1.0, 0.6, 11), (5, 1, 1.2, 5)],
)
def test_epochs_for_the_time_that_is_saved(left: int, dense: float, pruned: float, expected: int) -> None:
    assert epochs_for_time(left, dense, pruned) == expected


def test_costs_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="pruned: 0 is not allowed. Allowed: a number above 0"):
        epochs_for_time(3, 1.0, 0)


def test_steps_are_timed_in_turns_forward_and_backward() -> None:
    order: list[str] = []
    models = {name: nn.Linear(2, 1) for name in ("dense", "pruned")}

    def loss(model: nn.Module) -> torch.Tensor:
        order.append(next(name for name, one in models.items() if one is model))
        time.sleep(0.02 if order[-1] == "dense" else 0.0)
        return model(torch.ones(1, 2)).sum()

    found = step_seconds(models, loss, repeats=3, warmup=1)
    assert order == ["dense", "pruned"] * 4
    assert found["dense"] > 0.019 and found["pruned"] < found["dense"]
    assert all(one.weight.grad is not None for one in models.values())


# --- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recovery", "message"),
    [
        ({}, "recovery: nothing is asked for. Allowed: rate, average, distillation, budget"),
        ({"budget": "tim"}, "recovery.budget: 'tim'"),
        ({"average": {"type": "emma"}}, "recovery.average.type: 'emma'"),
        ({"average": {"last": 0}}, "recovery.average.last: 0 is not allowed. Allowed: a number in \\(0, 1\\]"),
        ({"average": {"norm_batches": -1}}, "recovery.average.norm_batches: -1 is not allowed"),
        ({"rate": {"warmup": -1}}, "recovery.rate.warmup: -1 is not allowed"),
        ({"rate": {"peek": 1}}, "recovery.rate.peek: .*peak"),
    ],
)
def test_bad_blocks(recovery: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"rules": [RULE], "recovery": recovery})


def test_a_pruner_says_what_is_left_to_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    Pruning(network(), {"rules": [RULE], "recovery": {"distillation": {}}})
    assert not caplog.messages
    Pruning(network(), {"rules": [RULE], "recovery": {"rate": {}, "budget": "time"}})
    (text,) = caplog.messages
    assert text.startswith("recovery: rate, budget: this is for the training loop to do")


def test_one_teacher_in_either_place() -> None:
    model, teach = network(), {"weight": 3.0}
    pruner = Pruning(model, {"rules": [RULE], "recovery": {"distillation": teach}}, optimizer=sgd(model))
    with torch.no_grad():
        model[4].bias.add_(torch.tensor([1.0, 0.0, 0.0]))
    images = torch.randn(4, 1, 8, 8)
    assert float(pruner.distill_loss(model(images), images)) > 0
    with pytest.raises(ConfigError, match="recovery.distillation: there is 'distillation' beside the rules"):
        load_config({"rules": [RULE], "recovery": {"distillation": teach}, "distillation": teach})
