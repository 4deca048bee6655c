"""Removal keeps the optimizer alive: state, parameter groups, schedulers, the gradient scaler and averages go on."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from pruningawaretraining import Pruning
from pruningawaretraining.masks.removal import kept_indices
from pruningawaretraining.models.surgery import slice_tensor

Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
ELEMENTWISE: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw capturable": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
}


class Factored(torch.optim.Optimizer):
    """Second moments as a row and a column with one dimension left out, as Adafactor in transformers keeps them."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self._step_one(parameter, group["lr"])

    def _step_one(self, parameter: Tensor, lr: float) -> None:
        square, state = parameter.grad.square() + 1e-12, self.state[parameter]
        if parameter.dim() < 2:
            state["exp_avg_sq"] = state.get("exp_avg_sq", torch.zeros_like(square)).lerp(square, 0.1)
            parameter -= lr * parameter.grad * state["exp_avg_sq"].rsqrt()
            return
        for name, dim in (("exp_avg_sq_row", -1), ("exp_avg_sq_col", -2)):
            part = square.mean(dim)
            state[name] = state.get(name, torch.zeros_like(part)).lerp(part, 0.1)
        row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        scale = (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.unsqueeze(-2).rsqrt()
        parameter -= lr * parameter.grad * scale


class Blocked(torch.optim.SGD):
    """State of a shape that has nothing to do with the parameter's, as 8-bit optimizers have."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("absmax", torch.zeros(math.ceil(parameter.numel() / 256) + 1))


class Flat(torch.optim.Optimizer):
    """Momentum in one row, as Prodigy keeps the sum of its gradients."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                row = self.state[parameter].setdefault("s", torch.zeros(parameter.numel()))
                row.mul_(0.9).add_(parameter.grad.flatten())
                parameter.sub_(row.view(parameter.shape), alpha=group["lr"])


ELEMENTWISE["flat"] = Flat
OTHERS: dict[str, Make] = {
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "factored": Factored,
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2, history_size=2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
}


def small() -> nn.Module:
    return zoo.architecture("groupnorm")[0].train()


def batch(number: int) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batch(number)).square().mean()
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def start(make: Make, **config: Any) -> tuple[nn.Module, torch.optim.Optimizer, Pruning]:
    """A model that has been trained for two steps and is masked to half since."""
    model = small()
    optimizer = make(model.parameters())
    ema = config.pop("ema", None)
    rules = {"rules": [{"target": {"sparsity": 0.5}, "end": 1, "scope": "local"}], **config}
    average = None if ema is None else ema(model)
    pruner = Pruning(model, rules, example_inputs=batch(0), optimizer=optimizer, ema=average)
    for number in range(2):
        step(model, optimizer, number)
    pruner.prune(model, 0)
    return model, optimizer, pruner


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_training_goes_on_as_if_nothing_had_been_removed(name: str) -> None:
    outputs = []
    for removed in (False, True):
        model, optimizer, pruner = start(ELEMENTWISE[name])
        if removed:
            pruner.remove()
        for number in range(2, 5):
            step(model, optimizer, number)
        outputs.append(model(batch(9)).detach())
    assert torch.allclose(outputs[0], outputs[1], atol=2e-5 * float(outputs[0].abs().max()))


@pytest.mark.parametrize("name", [*ELEMENTWISE, *OTHERS])
def test_state_is_sliced_as_the_parameter_was(name: str) -> None:
    model, optimizer, pruner = start({**ELEMENTWISE, **OTHERS}[name])
    engine = pruner.channel_pruner
    kept = kept_indices(engine.found.grouping, engine.keep_D)
    before = {key: dict(optimizer.state[parameter]) for key, parameter in model.named_parameters()}
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    pruner.remove()
    parameters = dict(model.named_parameters())
    assert {id(one) for group in optimizer.param_groups for one in group["params"]} == {
        id(one) for one in parameters.values()
    }
    assert {id(one) for one in optimizer.state} <= {id(one) for one in parameters.values()}
    followed = 0
    for key, state in before.items():
        assert optimizer.state[parameters[key]].keys() == state.keys()
        for entry, value in state.items():
            if isinstance(value, Tensor) and value.numel() == shapes[key].numel() and value.dim():
                expected = slice_tensor(value.view(shapes[key]), kept.get(key, {}))
                expected = expected.flatten() if value.shape != shapes[key] else expected
                assert torch.equal(optimizer.state[parameters[key]][entry], expected), (key, entry)
                followed += 1
    assert followed > 0 or name == "lbfgs"
    again = {**ELEMENTWISE, **OTHERS}[name](model.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin = copy.deepcopy(model)
    step(model, optimizer, 7)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    model.load_state_dict(twin.state_dict())
    step(model, again, 7)
    for mine, theirs in zip(model.parameters(), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_rows_and_columns_of_a_square_weight_are_not_mixed_up() -> None:
    model, optimizer, pruner = start(Factored)
    kept = kept_indices(pruner.channel_pruner.found.grouping, pruner.channel_pruner.keep_D)
    weight = model.conv2.weight
    with torch.no_grad():
        weight.grad = torch.arange(float(weight.numel())).view(weight.shape) + 1
    optimizer.step()
    state = {key: value.clone() for key, value in optimizer.state[weight].items()}
    pruner.remove()
    rows, columns = kept["conv2.weight"][0], kept["conv2.weight"][1]
    after = optimizer.state[model.conv2.weight]
    for key in ("exp_avg_sq_row", "exp_avg_sq_col"):  # (16, 16, 3): the kernel's dimensions are what is summed out
        assert torch.equal(after[key], state[key][rows][:, columns])
    hidden = optimizer.state[model.hidden.weight]
    outputs, inputs = model.hidden.weight.shape
    assert (len(hidden["exp_avg_sq_row"]), len(hidden["exp_avg_sq_col"])) == (outputs, inputs)


def test_state_of_an_unknown_shape_is_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, pruner = start(lambda p: Blocked(p, lr=0.05, momentum=0.9))
    with caplog.at_level(logging.WARNING):
        pruner.remove()
    assert "'absmax' of shape (3,)" in caplog.text
    assert "starts afresh" in caplog.text
    assert "momentum_buffer" in optimizer.state[model.out.bias]  # it was not cut
    assert not optimizer.state[model.conv1.weight]
    step(model, optimizer, 3)
    assert optimizer.state[model.conv1.weight]["momentum_buffer"].shape == model.conv1.weight.shape


def test_groups_schedulers_and_freezing_go_on() -> None:
    rates = []
    for removed in (False, True):
        model = small()
        model.conv2.weight.requires_grad_(False)
        named = list(model.named_parameters())
        groups = [{"params": named[:4], "lr": 0.1}, {"params": named[4:], "lr": 0.01, "weight_decay": 0.1}]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        schedulers = [
            torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
            torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=8),
        ]
        config = {"rules": [{"target": {"sparsity": 0.5}, "end": 1}]}
        pruner = Pruning(model, config, example_inputs=batch(0), optimizer=optimizer)
        seen = []
        for number in range(6):
            if number == 3 and removed:
                pruner.prune(model, 1)
                assert model.conv2.out_channels < 16
                assert not model.conv2.weight.requires_grad
                assert [len(group["params"]) for group in optimizer.param_groups] == [4, len(named) - 4]
                assert optimizer.param_groups[1]["param_names"] == [name for name, _ in named[4:]]
            frozen = model.conv2.weight.detach().clone()
            step(model, optimizer, number)
            assert torch.equal(model.conv2.weight, frozen)
            for scheduler in schedulers:
                scheduler.step()
            seen.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
        rates.append(seen)
    assert rates[0] == rates[1]


def test_the_gradient_scaler_goes_on() -> None:
    states = []
    for removed in (False, True):
        model, optimizer, pruner = start(ELEMENTWISE["adamw fused"])
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        for number in range(5):
            if number == 3 and removed:
                pruner.remove()
            optimizer.zero_grad()
            infinite = number == 2
            scaler.scale(model(batch(number)).square().mean() * (math.inf if infinite else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        states.append((scaler.state_dict(), pruner.steps, model(batch(9)).detach()))
    assert states[0][:2] == states[1][:2]
    assert states[0][1] == 2 + 4
    assert torch.allclose(states[0][2], states[1][2], atol=1e-5)


def averaged(model: nn.Module) -> nn.Module:
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema, use_buffers=True)


@pytest.mark.parametrize("kind", ["average", "swa", "copy", "several"])
def test_averages_follow_and_are_updated_further(kind: str) -> None:
    made: dict[str, Callable[[nn.Module], Any]] = {
        "average": averaged,
        "swa": torch.optim.swa_utils.AveragedModel,
        "copy": copy.deepcopy,
        "several": lambda model: [averaged(model), copy.deepcopy(model)],
    }
    tensors: list[list[dict[str, Tensor]]] = []
    for removed in (False, True):
        averages: list[Any] = []

        def make(model: nn.Module, averages: list[Any] = averages) -> Any:
            ema = made[kind](model)
            averages.extend(ema if isinstance(ema, list) else [ema])
            return ema

        model, optimizer, pruner = start(ELEMENTWISE["sgd"], ema=make)
        engine = pruner.channel_pruner
        kept = kept_indices(engine.found.grouping, engine.keep_D)
        if removed:
            pruner.remove()
        for number in range(2, 4):
            step(model, optimizer, number)
            for average in averages:
                update(average, model)
        found = [dict(getattr(average, "module", average).named_parameters()) for average in averages]
        if not removed:
            found = [{key: slice_tensor(value, kept.get(key, {})) for key, value in one.items()} for one in found]
        tensors.append(found)
        for average in averages:
            assert average(batch(1)).shape == (2, 5)
    for masked, small_ in zip(*tensors, strict=True):
        for key, value in small_.items():
            assert torch.allclose(value, masked[key], atol=1e-6), key


def update(average: nn.Module, model: nn.Module) -> None:
    if isinstance(average, torch.optim.swa_utils.AveragedModel):
        average.update_parameters(model)
        return
    with torch.no_grad():
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)


@pytest.mark.parametrize("name", [*ELEMENTWISE, *OTHERS])
def test_reset_optimizer_starts_afresh(name: str) -> None:
    make = {**ELEMENTWISE, **OTHERS}[name]
    model, optimizer, pruner = start(make, reset_optimizer=True)
    assert not pruner.channel_pruner.reset_optimizer
    pruner.remove()
    assert pruner.channel_pruner.reset_optimizer
    twin = copy.deepcopy(model)
    fresh = make(twin.parameters())
    for number in range(2):
        step(model, optimizer, number)
        step(twin, fresh, number)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_flag_is_set_by_a_removal_and_state_is_kept_by_default() -> None:
    model, optimizer, pruner = start(ELEMENTWISE["adam"])
    assert not pruner.channel_pruner.reset_optimizer
    pruner.prune(model, 1)
    assert pruner.channel_pruner.reset_optimizer
    assert len(optimizer.state) == len(list(model.parameters()))
    pruner.channel_pruner.reset_optimizer = False
    pruner.prune(model, 2)
    assert not pruner.channel_pruner.reset_optimizer
