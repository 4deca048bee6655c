"""Latency, memory and parameters as targets: laws of the costs, and the search over widths on a made-up staircase."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining import Pruning, count_macs, registry
from pruningawaretraining.allocation.goals import Goal
from pruningawaretraining.allocation.knapsack import Searched, WidthSearch
from pruningawaretraining.allocation.ranking import Allocator, Limits
from pruningawaretraining.config import Target
from pruningawaretraining.costs.latency import cache as time_cache
from pruningawaretraining.costs.latency import layer_timers
from pruningawaretraining.costs.latency.cache import TimeCache, cache_folder
from pruningawaretraining.costs.latency.layer_shapes import LayerShape, layer_shapes, shape_of
from pruningawaretraining.costs.latency.layer_tables import LayerTable, axis, measure_table
from pruningawaretraining.costs.latency.meter import RuntimeMeter
from pruningawaretraining.costs.latency.model import Fit, LatencyCost, fit
from pruningawaretraining.costs.macs import macs_cost, macs_per_layer, parameters_cost
from pruningawaretraining.costs.memory import peak_activation_bytes
from pruningawaretraining.engine.aiming import Aim
from pruningawaretraining.engine.latency_target import LatencyReached
from pruningawaretraining.engine.targets import Targets
from pruningawaretraining.errors import ConfigError, TargetError
from pruningawaretraining.experiment.models import DigitsResNet
from pruningawaretraining.masks.pruned_copy import bare_copy, pruned_copy
from pruningawaretraining.patterns.channel import Channel
from pruningawaretraining.runtimes import timing
from pruningawaretraining.runtimes.runtime import OnnxRuntime, TorchEager
from pruningawaretraining.runtimes.timing import Ratio

STEP = 8


def stair(width: float) -> float:
    """Work in whole blocks of channels."""
    return float(-(-int(width) // STEP) * STEP)


def table_of(shape: LayerShape) -> LayerTable:
    """A made-up machine: time goes with whole blocks of outputs and of inputs."""
    outputs, inputs = axis(shape.outputs), axis(shape.inputs)
    if shape.kind == "depthwise":
        inputs = (shape.inputs,)
    speed = 1e-4 * shape.positions

    def ms(out: int, in_: int) -> float:
        return speed * stair(out) * (1.0 if shape.kind == "depthwise" else stair(in_) / 8)

    odd = tuple(stair(56 + one) / (56 + one) for one in range(STEP))
    return LayerTable(outputs, inputs, tuple(tuple(ms(o, i) for i in inputs) for o in outputs), odd, (1.0,))


class MadeUp:
    """A meter whose models take 1.2 times what the tables say, and 1 ms; it counts what it was asked."""

    def __init__(self, slower: float = 1.0) -> None:
        self.slower, self.measured, self.known = slower, 0, {}

    def inputs(self, example_inputs: Any) -> Any:
        return example_inputs

    def tables(self, shapes: Mapping[str, LayerShape]) -> dict[str, LayerTable]:
        return {name: table_of(shape) for name, shape in shapes.items()}

    def milliseconds(self, models: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
        found = {}
        for name, (model, given) in models.items():
            self.measured += 1
            layers = [key for key, one in model.named_modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
            shapes = layer_shapes(model, given, layers)
            found[name] = 1.0 + 1.2 * sum(table_of(one)(one.outputs, one.inputs) for one in shapes.values())
            found[name] *= self.slower if name == "copy" else 1.0
        return found

    def ratio(self, dense: tuple[Any, Any], copied: tuple[Any, Any]) -> Ratio:
        found = self.milliseconds({"dense": dense, "copy": copied})
        value = found["copy"] / found["dense"]
        return Ratio(value, 0.99 * value, 1.01 * value, 0.02, 50)

    def ready(self, model: nn.Module, example_inputs: Any) -> nn.Module:
        return model

    def remembered(self, what: Mapping[str, Any], measure: Callable[[], list[float]]) -> list[float]:
        return measure()


class Net(nn.Module):
    """Four convolutions, one depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.second, self.third = nn.Conv2d(32, 48, 1), nn.Conv2d(48, 64, 3, padding=1)
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.norm(self.first(x)).relu()).relu()
        return self.head(self.third(self.second(x).relu()).relu().mean((2, 3)))


class Residual(nn.Module):
    """A stream with two blocks on it, and a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.one, self.two = nn.Conv2d(32, 48, 3, padding=1), nn.Conv2d(48, 32, 1)
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.two(self.one(x).relu())
        return self.head(self.down(x.relu()).relu().mean((2, 3)))


INPUT = torch.randn(2, 3, 8, 8)


def targets_of(model: nn.Module, meter: MadeUp) -> tuple[Targets, Any]:
    found = Channel().build(model, INPUT, None, [])
    macs = macs_cost(found.grouping, macs_per_layer(model, INPUT))
    parameters = parameters_cost(found.grouping, model)
    return Targets(model, found, macs, parameters, INPUT, None, lambda _: meter), found


def random_keep(found: Any, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    keep_G = torch.rand(found.grouping.size, generator=generator) > 0.4
    for one in found.grouping.sets:
        keep_G[one.start] = True
    return keep_G


def whole_blocks(found: Any, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    keep_G = torch.ones(found.grouping.size, dtype=torch.bool)
    for one in found.grouping.sets:
        keep_G[one.start + STEP * int(torch.randint(1, one.size // STEP + 1, (1,), generator=generator)) : one.stop] = 0
    return keep_G


@pytest.mark.parametrize("build", [Net, Residual])
def test_predicted_latency_is_that_of_the_removed_copy(build: Any) -> None:
    torch.manual_seed(0)
    model, meter = build(), MadeUp()
    targets, found = targets_of(model, meter)
    latency = targets.latency(Target(latency=0.5))
    for seed in range(6):
        keep_G = random_keep(found, seed) if seed % 2 else whole_blocks(found, seed)
        copied = pruned_copy(model, found, keep_G)
        truth = meter.milliseconds({"a": (copied, INPUT)})["a"]
        latency.cost.fitted = replace(latency.cost.fitted, correction=1.0)
        assert latency.cost(keep_G) == pytest.approx(truth, rel=0.3 if seed % 2 else 0.1)
        reached = latency.measure(keep_G, copied)
        assert reached.measured_ms == pytest.approx(truth) and latency.cost(keep_G) == pytest.approx(truth)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in build().named_parameters()}


def test_costs_of_widths_are_costs_of_masks() -> None:
    model = Residual()
    targets, found = targets_of(model, MadeUp())
    costs = [targets.latency(Target(latency=0.5)).cost, *(targets._cost(one) for one in ("macs", "parameters"))]
    costs.append(targets._cost("peak_memory"))
    for seed in range(3):
        keep_G = random_keep(found, seed)
        kept_S = torch.bincount(found.grouping.set_ids, keep_G.double(), len(found.grouping.sets))
        for cost in costs:
            assert float(cost.of_sets(kept_S.unsqueeze(0))[0]) == pytest.approx(cost(keep_G))
            grown = keep_G.clone()
            group = int(torch.nonzero(~keep_G)[0])
            grown[group] = True
            marginal = float(cost.marginal_G(keep_G)[group])
            assert marginal <= cost(grown) - cost(keep_G) + 1e-9
            assert bool((cost.marginal_G(keep_G)[keep_G] == 0).all())


def test_peak_memory_is_counted_and_predicted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(512, 2))
    assert peak_activation_bytes(model, INPUT) == 4 * 2 * 64 * 2 * 16  # what goes into the ReLU, and what comes out
    torch.manual_seed(0)
    net = Residual()
    targets, found = targets_of(net, MadeUp())
    cost = targets._cost("peak_memory")
    assert cost.dense == peak_activation_bytes(net, INPUT)
    for seed in range(4):
        keep_G = random_keep(found, seed)
        assert cost(keep_G) == peak_activation_bytes(pruned_copy(net, found, keep_G), INPUT)


# --- the search -----------------------------------------------------------------------------------------------------


class Stairs:
    """Two sets whose cost goes in blocks of 8 groups; the second is three times as dear."""

    dense = 64.0 + 3 * 64.0

    def __call__(self, keep_G: torch.Tensor) -> float:
        kept = torch.tensor([[float(keep_G[:64].sum()), float(keep_G[64:].sum())]], dtype=torch.float64)
        return float(self.of_sets(kept)[0])

    def of_sets(self, kept_NS: torch.Tensor) -> torch.Tensor:
        return (torch.ceil(kept_NS / STEP) * STEP) @ torch.tensor([1.0, 3.0], dtype=torch.float64)

    def neighbours(self) -> torch.Tensor:
        return torch.eye(2, dtype=torch.bool)


NONE = Limits()


def search(scores: torch.Tensor, limits: Limits = NONE, gone: int = 0) -> WidthSearch:
    from test_allocation import sets

    grouping = sets(64, 64)
    keep_D = torch.ones(128, dtype=torch.bool)
    keep_D[:gone] = False
    allocator = Allocator(grouping, scores, limits, removed_G=~keep_D)
    return WidthSearch(Searched(allocator, scores, [0, 1], torch.arange(128), keep_D, grouping.set_ids))


def test_widths_stand_on_stairs_where_milliseconds_are_saved() -> None:
    scores = torch.rand(128, generator=torch.Generator().manual_seed(0)).double() + 0.1
    cost = Stairs()
    keep_G = search(scores).solve([Goal("t", cost, 0.5 * cost.dense)], cost)
    first, second = int(keep_G[:64].sum()), int(keep_G[64:].sum())
    assert cost(keep_G) <= 0.5 * cost.dense
    assert first % STEP == 0 and second % STEP == 0 and first > second  # no group is given up for nothing
    inside = scores[64:]
    assert bool(keep_G[64:][inside.argsort(descending=True)[:second]].all())


def test_the_search_is_the_best_there_is_for_two_sets() -> None:
    scores = torch.rand(128, generator=torch.Generator().manual_seed(1)).double()
    cost, worth = Stairs(), lambda part, k: float(part.sort(descending=True).values[:k].sum())
    for share in (0.7, 0.5, 0.35):
        keep_G = search(scores).solve([Goal("t", cost, share * cost.dense)], cost)
        best = max(
            worth(scores[:64], a) + worth(scores[64:], b)
            for a in range(1, 65)
            for b in range(1, 65)
            if float(cost.of_sets(torch.tensor([[float(a), float(b)]], dtype=torch.float64))[0]) <= share * cost.dense
        )
        assert float(scores[keep_G].sum()) >= 0.97 * best


def test_caps_multiples_and_what_is_gone_hold() -> None:
    scores, cost = torch.rand(128).double(), Stairs()
    keep_G = search(scores, Limits(max_sparsity=0.5, multiple=16), gone=7).solve([Goal("t", cost, 160.0)], cost)
    kept = [int(keep_G[:64].sum()), int(keep_G[64:].sum())]
    assert all(one >= 32 and one % 16 == 0 for one in kept) and not bool(keep_G[:7].any())
    with pytest.raises(TargetError, match=r"a\.b: 0\.1.* at least 0\.5"):
        search(scores, Limits(max_sparsity=0.5)).solve([Goal("a.b", cost, 30.0)], cost)


class Odd(Stairs):
    """A machine on which widths below 8 are dearer than 8."""

    def of_sets(self, kept_NS: torch.Tensor) -> torch.Tensor:
        return super().of_sets(torch.where(kept_NS < STEP, 40.0, kept_NS))


def test_the_smallest_widths_need_not_be_the_fastest() -> None:
    scores, cost = torch.rand(128).double(), Odd()
    assert cost(search(scores).allocator.smallest()) == 160.0
    keep_G = search(scores).solve([Goal("t", cost, 32.0)], cost)
    assert [int(keep_G[:64].sum()), int(keep_G[64:].sum())] == [STEP, STEP]


# --- through the pruner ---------------------------------------------------------------------------------------------


def pruned(target: dict[str, Any], meter: MadeUp, **rule: Any) -> tuple[nn.Module, Pruning]:
    torch.manual_seed(0)
    model = Net()
    config = {"rules": [{"target": target, **rule}]}
    pruner = Pruning(model, config, example_inputs=INPUT)
    pruner.channel_pruner.targets._meter = lambda _: meter
    for epoch in range(rule.get("end", 0) + 1):
        pruner.prune(model, epoch)
    return model, pruner


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timing, "LAYER_MS", 0.0)
    monkeypatch.setattr(layer_timers, "ALIKE", float("inf"))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    meter = MadeUp(slower=1.1)
    monkeypatch.setattr("pruningawaretraining.engine.targets._runtime_meter", lambda *_: meter)
    return meter


@pytest.mark.parametrize("allocation", ["latency", "macs", "parameters", "uniform", "ranking"])
def test_every_allocation_reaches_a_latency(allocation: str, made_up: MadeUp) -> None:
    model, pruner = pruned({"latency": 0.6}, made_up, allocation=allocation, start=0, end=2)
    dense = made_up.milliseconds({"dense": (Net(), INPUT)})["dense"]
    took = made_up.milliseconds({"copy": (model, INPUT)})["copy"]
    assert took <= 0.6 * dense * 1.01  # also where the runtime is slower than predicted
    latencies = pruner.engine.rules[0].state.latencies
    assert [one["at"] for one in latencies] == list(range(len(latencies))) and len(latencies) in (1, 2, 3)
    assert latencies[-1]["measured_ms"] == pytest.approx(took)
    assert pruner.phase == "finetune"


def test_several_targets_hold_at_once(made_up: MadeUp) -> None:
    target = {"latency": 0.9, "macs": 0.5, "parameters": 0.6, "peak_memory": 0.7, "sparsity": 0.3}
    for allocation in ("latency", "ranking"):
        model, pruner = pruned(target, made_up, allocation=allocation)
        dense = Net()
        assert count_macs(model, INPUT) <= 0.5 * count_macs(dense, INPUT)
        count = [sum(one.numel() for one in net.parameters()) for net in (model, dense)]
        assert count[0] <= 0.6 * count[1] and pruner.channel_pruner.sparsity >= 0.3 - 1 / 144
        assert peak_activation_bytes(model, INPUT) <= 0.7 * peak_activation_bytes(dense, INPUT)


def test_a_latency_in_milliseconds(made_up: MadeUp) -> None:
    dense = made_up.milliseconds({"dense": (Net(), INPUT)})["dense"]
    model, _ = pruned({"latency_ms": 0.5 * dense, "batch": 2, "threads": 2}, made_up)
    assert made_up.milliseconds({"copy": (model, INPUT)})["copy"] <= 0.5 * dense * 1.01


def test_out_of_reach_is_said_before_training(made_up: MadeUp) -> None:
    with pytest.raises(TargetError, match=r"rules\[0\]\.target\.latency: 0\.0001\d* of the dense cost is out of reach"):
        Pruning(Net(), {"rules": [{"target": {"latency": 0.0001}}]}, example_inputs=INPUT)
    with pytest.raises(TargetError, match=r"rules\[0\]\.target\.parameters: 0\.001\d* of"):
        Pruning(Net(), {"rules": [{"target": {"parameters": 0.001, "macs": 0.9}}]}, example_inputs=INPUT)


def test_what_is_out_of_reach_is_said_in_the_users_own_numbers(made_up: MadeUp) -> None:
    for target, message in (
        (
            {"latency_ms": 0.0001},
            r"target\.latency_ms: 0\.0001 ms is out of reach.*least 0\.\d+, [\d.]+ of [\d.]+ ms\.",
        ),
        ({"latency": 0.01}, r"target\.latency: 0\.01 of the dense cost is out of reach"),
        ({"latency": 0.5, "latency_ms": 0.0001}, r"target\.latency_ms: 0\.0001 ms is"),
    ):
        for allocation in ("latency", "ranking"):
            with pytest.raises(TargetError, match=r"^rules\[0\]\." + message):
                Pruning(Net(), {"rules": [{"target": target, "allocation": allocation}]}, example_inputs=INPUT)


@pytest.mark.parametrize("allocation", ["latency", "ranking", "macs"])
@pytest.mark.parametrize("slower", [0.75, 1.0, 1.2])
def test_what_is_left_of_a_latency_is_given_back(
    slower: float, allocation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that are faster (or slower) than the tables say end just below the budget, and not far below it."""
    meter = MadeUp(slower)
    monkeypatch.setattr("pruningawaretraining.engine.targets._runtime_meter", lambda *_: meter)
    _, pruner = pruned({"latency": 0.6}, meter, allocation=allocation)
    reached = pruner.engine.rules[0].state.latencies[-1]
    assert 0.8 * reached["budget_ms"] <= reached["measured_ms"] <= 1.01 * reached["budget_ms"]


class Bumpy(MadeUp):
    """Copies take up to a fifth longer or shorter than predicted, one factor for some widths and another for others."""

    def milliseconds(self, models: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
        found = super().milliseconds(models)
        if "copy" in models:
            widths = [one.weight.shape[0] for one in models["copy"][0].modules() if isinstance(one, nn.Conv2d)]
            found["copy"] *= 1 + 0.2 * math.sin(sum(widths) / 9)
        return found


@pytest.mark.parametrize("keep", [0.8, 0.65, 0.5])
def test_predictions_that_err_by_another_factor_each_time_are_gone_between(
    keep: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Bumpy()
    monkeypatch.setattr("pruningawaretraining.engine.targets._runtime_meter", lambda *_: meter)
    _, pruner = pruned({"latency": keep}, meter)
    reached = pruner.engine.rules[0].state.latencies[-1]
    assert 0.9 * reached["budget_ms"] <= reached["measured_ms"] <= 1.01 * reached["budget_ms"]


def test_an_aim_goes_between_what_came_out_below_and_above() -> None:
    aim = Aim(10.0, 10.0)

    def then(measured: float) -> float | None:
        aim.note(torch.ones(1), LatencyReached(0.0, measured, 20.0))
        return aim.at

    assert then(12.5) == 8.0, "one measurement says where"
    assert then(7.0) == 9.0
    assert then(10.05) == 9.5, "a hundredth more holds"
    assert then(10.2) == 9.25
    assert aim.is_used and aim.best is not None and aim.best[1].measured_ms == 10.05
    assert then(9.0) == 9.25, "a worse one is no reason to begin there"
    aim.at = 9.01
    assert then(10.2) is None, "there is nothing in between"


def test_a_family_with_blocks_keeps_its_promise_from_below_too(
    made_up: MadeUp, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole blocks lose less importance than channels here, and would leave a tenth of the promise unused."""
    torch.manual_seed(0)
    model, labels = DigitsResNet(widths=[32, 48], blocks=3), torch.tensor([0, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rule = {"pattern": ["channel", "depth"], "criterion": "taylor", "start": 0, "end": 3, "hold": 1}
    target = {"latency": [0.7, 0.5]}
    images = torch.randn(2, 1, 8, 8)
    pruner = Pruning(model, {"rules": [{**rule, "target": target}]}, example_inputs=images, optimizer=optimizer)
    with caplog.at_level("WARNING"):
        for epoch in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            pruner.prune(model, epoch)
    last = {event["budget_ms"]: event for event in pruner.engine.rules[0].state.latencies}
    assert len(last) >= 2
    for budget, event in last.items():
        assert 0.97 * budget <= event["measured_ms"] <= 1.01 * budget, event
    assert "undercut" not in caplog.text


def test_an_undercut_promise_is_said_with_its_number(made_up: MadeUp, caplog: pytest.LogCaptureFixture) -> None:
    """Steps of 16 channels are too coarse for the promise."""
    with caplog.at_level("WARNING"):
        _, pruner = pruned({"latency": 0.85}, made_up, multiple=16)
    event = pruner.engine.rules[0].state.latencies[-1]
    less = 100 * (1 - event["measured_ms"] / event["budget_ms"])
    assert less > 3
    wanted = f"rules[0].target.latency: the target is undercut: {event['measured_ms']:.4g} ms measured, "
    assert wanted + f"{event['budget_ms']:.4g} ms asked for ({less:.1f}% less)" in caplog.text


class Slow(MadeUp):
    """Whatever the widths, copies take as long as the dense model."""

    def milliseconds(self, models: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
        return dict.fromkeys(models, 2.0) if "copy" in models else super().milliseconds(models)


@pytest.mark.parametrize("allocation", ["latency", "ranking"])
def test_a_missed_latency_is_said_with_both_numbers(
    allocation: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    meter = Slow()
    monkeypatch.setattr("pruningawaretraining.engine.targets._runtime_meter", lambda *_: meter)
    with caplog.at_level("WARNING"):
        _, pruner = pruned({"latency": 0.9}, meter, allocation=allocation)
    reached = pruner.engine.rules[0].state.latencies[-1]
    assert reached["measured_ms"] > reached["budget_ms"] and pruner.phase == "finetune"
    wanted = f"rules[0].target.latency: the target is missed: {reached['measured_ms']:.4g} ms measured, "
    assert wanted + f"{reached['budget_ms']:.4g} ms asked for" in caplog.text


def test_the_last_masks_are_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are chosen anew seven times, and not once more after the last measurement."""
    chosen: list[int] = []
    meter = Slow()
    monkeypatch.setattr("pruningawaretraining.engine.targets._runtime_meter", lambda *_: meter)

    def allocate(task: Any) -> torch.Tensor:
        chosen.append(len(chosen))
        keep_R = torch.ones(len(task.share.groups_D), dtype=torch.bool)
        keep_R[: len(chosen)] = False
        return keep_R

    monkeypatch.setattr("pruningawaretraining.engine.targets.lookup", lambda kind, name: allocate)
    _, pruner = pruned({"latency": 0.9}, meter)
    assert len(chosen) == 8 and int((~pruner.channel_pruner.keep_D).sum()) == 8


class Noisy(MadeUp):
    """A machine on which nothing can be measured: whatever it says is off by far, and it says so."""

    def ratio(self, dense: tuple[Any, Any], copied: tuple[Any, Any]) -> Ratio:
        return Ratio(3.0, 1.0, 5.0, 1.7, 45)


def test_a_noisy_machine_keeps_what_the_tables_predict(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    meter = Noisy()
    monkeypatch.setattr("pruningawaretraining.engine.targets._runtime_meter", lambda *_: meter)
    with caplog.at_level("WARNING"):
        model, pruner = pruned({"latency": 0.6}, meter)
    (event,) = pruner.engine.rules[0].state.latencies
    dense = event["dense_ms"]
    assert event["is_noisy"] and event["predicted_ms"] <= 0.6 * dense * 1.001 and event["spread"] == 1.7
    truth = meter.milliseconds({"a": (model, INPUT)})["a"]
    assert truth == pytest.approx(event["predicted_ms"], rel=0.1)  # the tables held; the measurement was not used
    assert f"with 95% confidence {dense:.4g} to {5 * dense:.4g} ms: the machine is too noisy" in caplog.text
    assert "spread by 170%" in caplog.text and "the target is missed" not in caplog.text
    assert pruner.phase == "finetune"
    head = " ".join(str(pruner.report()).split())
    assert f"latency {event['predicted_ms']:.4g} of {dense:.4g} ms predicted (" in head and "spread 170%" in head


def test_every_event_and_the_report_say_the_latency(made_up: MadeUp) -> None:
    torch.manual_seed(0)
    model, lines = Net(), []
    pruner = Pruning(model, {"rules": [{"target": {"latency": 0.6}, "end": 1}]}, example_inputs=INPUT)
    for epoch in range(2):
        pruner.prune(model, epoch, log=lines.append)
    for event in pruner.engine.rules[0].state.latencies:
        share, dense = event["measured_ms"] / event["dense_ms"], event["dense_ms"]
        text = f"latency {event['measured_ms']:.4g} of {dense:.4g} ms ({share:.3f}; 95%: "
        text += f"{0.99 * share:.3f} to {1.01 * share:.3f})"
        assert any(f"epoch {event['at']}: masked to" in line and text in line for line in lines)
    assert text in str(pruner.report()) and pruner.report().to_dict()["latency"]["measured_ms"] == event["measured_ms"]
    assert event["low_ms"] < event["measured_ms"] < event["high_ms"]


def test_the_first_measurement_is_told_and_the_next_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pruningawaretraining.costs.latency.meter.measure_table", lambda shape, *_: table_of(shape))
    shapes = layer_shapes(Net(), INPUT, ["first", "second", "third"])
    name = "pruningawaretraining.costs.latency.meter.progress"
    with caplog.at_level("INFO", logger=name):
        for _ in range(2):
            RuntimeMeter("onnxruntime", cache=TimeCache({}, tmp_path / "times")).tables(shapes)
    told = [(one.done, one.total) for one in caplog.records if one.name == name]
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert f"measuring 3 kinds of layers at many widths, 0 of 3: conv 3 x 32 (kept in {tmp_path}" in caplog.text


def test_points_whose_times_differ_are_timed_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_timers, "ALIKE", 1.05)
    times = {(1, 1): [2.0, 2.05], (2, 2): [5.0, 4.0, 3.0]}
    assert layer_timers.swept(list(times), lambda point: times[point].pop(0)) == [2.0, 3.0]
    assert times == {(1, 1): [], (2, 2): []}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_runtime_that_is_not_there_is_said_of_the_rule() -> None:
    with pytest.raises(ConfigError, match=r"^rules\[0\]\.target\.runtime: 'cuda' needs a GPU"):
        Pruning(Net(), {"rules": [{"target": {"latency": 0.5, "runtime": "cuda"}}]}, example_inputs=INPUT)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"latency": 1.5}, r"latency: 1.5 is not allowed. Allowed: a number in \(0, 1\]"),
        ({"latency_ms": 0}, "latency_ms: 0 is not allowed. Allowed: a number above 0"),
        ({"latency": 0.5, "runtime": "onnxruntim"}, "did you mean 'onnxruntime'"),
        ({"macs": 0.5, "threads": 2}, "threads: 2 requires latency or latency_ms"),
        ({"latencys": 0.5}, "did you mean 'latency'"),
    ],
)
def test_bad_targets(target: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pruning(Net(), {"rules": [{"target": target}]}, example_inputs=INPUT)


def test_weights_have_no_latency() -> None:
    with pytest.raises(ConfigError, match=r"target.latency: 0.5 is not supported by the pattern"):
        Pruning(Net(), {"rules": [{"pattern": "element", "target": {"latency": 0.5}}]}, example_inputs=INPUT)


def test_onnxruntime_end_to_end() -> None:
    """Small, and on the machine as it is: the user's model is only read, and tables are measured once."""
    torch.manual_seed(0)
    model, images = Net(), torch.randn(1, 3, 32, 32)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    config = {"rules": [{"target": {"latency": 0.8, "runtime": "onnxruntime", "batch": 1}}]}
    pruner = Pruning(model, config, example_inputs=images)
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    files = list(cache_folder().glob("*.json"))
    assert len(files) == 6  # five layers and the anchors
    pruner.prune(model, 0)
    state = pruner.engine.rules[0].state
    assert len(state.latencies) == 1 and state.latencies[0]["predicted_ms"] > 0
    assert pruner.channel_pruner.sparsity > 0 and len(list(cache_folder().glob("*.json"))) == 6
    times = [path.stat().st_mtime_ns for path in sorted(files)]
    Pruning(Net(), config, example_inputs=images)
    assert [path.stat().st_mtime_ns for path in sorted(files)] == times  # read, not measured again


# --- tables, fit, cache ---------------------------------------------------------------------------------------------


def test_fit_finds_the_coefficients_and_none_below_zero() -> None:
    numbers, tables = [1000.0, 500.0, 200.0, 700.0], [8.0, 3.0, 1.0, 4.0]
    ms = [0.5 + 1e-3 * n + 1.2 * t for n, t in zip(numbers, tables, strict=True)]
    found = fit(numbers, tables, ms)
    assert found.layers == pytest.approx(1.2, rel=0.1)
    for n, t, truth in zip(numbers, tables, ms, strict=True):
        assert found.fixed + found.per_number * n + found.layers * t == pytest.approx(truth, rel=0.02)
    assert fit([10.0, 1.0], [1.0, 2.0], [1.0, 2.0]) == Fit(0.0, 0.0, pytest.approx(1.0))


def test_tables_between_grid_points_and_at_odd_widths() -> None:
    table = LayerTable((8, 16), (4, 8), ((1.0, 2.0), (3.0, 4.0)), odd_out=(1.0, 2.0))
    assert (table(8, 4), table(16, 8), table(12, 6)) == (1.0, 4.0, 2.5)
    assert table(9, 4) == pytest.approx(2 * 1.25) and table(32, 99) == 4.0  # odd; outside, the nearest edge
    assert LayerTable.from_json(json.loads(json.dumps(table.to_json()))).to_json() == table.to_json()


@pytest.mark.parametrize("width", [1, 3, 8, 24, 63, 64, 100, 512])
def test_axes_are_ascending_and_end_at_the_dense_width(width: int) -> None:
    found = axis(width)
    assert list(found) == sorted(set(found)) and found[-1] == width and found[0] >= 1
    assert all(one % 4 == 0 for one in found[:-1])


def test_tables_and_single_lookups_agree() -> None:
    model = Net()
    targets, found = targets_of(model, MadeUp())
    latency: LatencyCost = targets.latency(Target(latency=0.5)).cost
    keep_G = random_keep(found, 3)
    copied = pruned_copy(model, found, keep_G)
    shapes = layer_shapes(copied, INPUT, latency.names)
    dense = layer_shapes(model, INPUT, latency.names)
    factor = latency.fitted.layers * latency.fitted.correction
    for name, ms in latency.layers(keep_G).items():
        assert ms == pytest.approx(factor * table_of(dense[name])(shapes[name].outputs, shapes[name].inputs))


@pytest.mark.parametrize(
    "layer",
    [
        (nn.Conv2d(8, 16, 3, stride=2, padding=1), (2, 8, 9, 9)),
        (nn.Conv2d(16, 16, 3, groups=16), (1, 16, 9, 9)),
        (nn.Conv2d(16, 8, 3, groups=4, padding="same"), (1, 16, 9, 9)),
        (nn.ConvTranspose2d(8, 4, 3, stride=2), (1, 8, 5, 5)),
        (nn.Conv1d(8, 8, 3, dilation=2), (1, 8, 20)),
        (nn.Linear(16, 8), (2, 5, 16)),
    ],
)
def test_every_kind_of_layer_is_timed_as_it_is(layer: tuple[nn.Module, tuple[int, ...]]) -> None:
    module, size = layer
    given = torch.randn(size)
    shape = shape_of(module, given)
    assert shape is not None and shape.positions * shape.outputs == module(given).numel()
    copied = shape.module(shape.outputs, shape.inputs)
    assert copied(shape.input(shape.inputs)).numel() == module(given).numel()
    session = __import__("onnxruntime").InferenceSession(layer_timers.layer_graph(shape, shape.outputs, shape.inputs))
    (array,) = session.run(None, {"x": shape.input(shape.inputs).numpy()})
    assert array.size == module(given).numel()
    table = measure_table(shape, OnnxRuntime(), "onnxruntime", 1)
    assert table(shape.outputs, shape.inputs) >= 0
    if shape.kind == "linear":
        assert measure_table(shape, TorchEager(), "torch", 1)(8, 16) > 0


def test_the_cache_is_of_one_machine_runtime_and_version(tmp_path: Path) -> None:
    one, other = TimeCache({"version": 1}, tmp_path), TimeCache({"version": 2}, tmp_path)
    one.put({"layer": 1}, [1.5])
    assert one.get({"layer": 1}) == [1.5] and one.get({"layer": 2}) is None and other.get({"layer": 1}) is None
    (path,) = tmp_path.iterdir()
    path.write_text("{damaged")
    assert one.get({"layer": 1}) is None
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: one.put({"layer": 1}, [float(number)] * 1000), range(40)))
    assert len(set(one.get({"layer": 1}))) == 1 and len(list(tmp_path.iterdir())) == 1


def test_the_cache_is_in_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "pruningawaretraining" / "latency"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says: ignore it
    assert cache_folder() == Path.home() / ".cache" / "pruningawaretraining" / "latency"
    assert str(os.cpu_count()) in time_cache.machine()
    locked = tmp_path / "file"
    locked.write_text("")
    TimeCache({}, locked / "below").put({}, [1.0])  # cannot be written: passed over


def test_a_meter_measures_once(tmp_path: Path) -> None:
    meter = RuntimeMeter("onnxruntime", cache=TimeCache({}, tmp_path))
    assert meter.remembered({"a": 1}, lambda: [1.0]) == [1.0] == meter.remembered({"a": 1}, lambda: [2.0])
    assert meter.inputs(INPUT).shape == (1, 3, 8, 8) and meter.inputs({"x": INPUT, "n": 3})["n"] == 3
    assert RuntimeMeter("onnxruntime", batch=5).inputs((INPUT, torch.ones(7)))[0].shape[0] == 5
    found = meter.milliseconds({"file": (meter.ready(Net(), INPUT), INPUT), "net": (Net(), INPUT)})
    assert list(found) == ["file", "net"] and all(one > 0 for one in found.values())


def test_a_copy_has_no_hooks_and_is_its_own() -> None:
    model = Net()
    heard: list[int] = []
    model.first.register_forward_hook(lambda *_: heard.append(1))
    model(INPUT).sum().backward()
    copied = bare_copy(model)
    copied(INPUT)
    assert len(heard) == 1 and copied.first.weight is not model.first.weight and copied.first.weight.grad is None


def test_allocations_are_registered() -> None:
    assert registry.names("allocation") == ["latency", "macs", "parameters", "ranking", "uniform"]


def test_layers_are_timed_in_the_models_own_type() -> None:
    shapes = layer_shapes(Net().double(), INPUT.double(), ["first", "head"])
    for name, width in (("first", 3), ("head", 64)):
        module, given = shapes[name].module(8, width), shapes[name].input(width)
        assert module(given).dtype is torch.float64
