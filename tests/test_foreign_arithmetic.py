"""Sparsities at every moment, by the arithmetic of the originals, over random configs; `pat convert` keeps them.

The functions here are the originals' rules written down anew: when an update is due, and how far it goes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from pruningawaretraining import Pruning, load_config
from pruningawaretraining.cli.main import app
from pruningawaretraining.config.plan import events_of
from pruningawaretraining.config.schema import PruningConfig, Rule

ROUNDING = 1e-9
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cubic": lambda x: 1 - (1 - x) ** 3,
    "inverse_cubic": lambda x: 1 - (1 - x) ** (1 / 3),
}


def modifiers_of(rng: random.Random) -> list[dict[str, Any]]:
    """One to three modifiers, each beginning where the one before has ended, or later."""
    found, start, before = [], rng.choice([0, 1, 0.5, 2]), rng.choice([0, 0.05, 0.3])
    for _ in range(rng.choice([1, 1, 2, 3])):
        end, final = start + rng.choice([1, 2, 3, 2.5]), round(min(0.99, before + rng.choice([0.1, 0.2, 0.3])), 3)
        times = {
            "start_epoch": start,
            "end_epoch": end,
            "update_frequency": rng.choice([-1, 1, 2, 0.5, 0.25, 0.3, 1.5]),
        }
        shape = rng.choice(list(SHAPES))
        found.append({"init_sparsity": before, "final_sparsity": final, "inter_func": shape, **times})
        start, before = end + rng.choice([0, 0, 1]), final
    return found


def by_updates(modifiers: Sequence[dict[str, Any]], steps: int, epochs: int) -> list[float]:
    """The sparsity at every step. An update is due when a modifier starts, when it ends, and when at least
    ``update_frequency`` has passed since the last one."""
    last: list[float | None] = [None] * len(modifiers)
    over, held, values = [False] * len(modifiers), [0.0] * len(modifiers), []
    for step in range(epochs * steps + 1):
        now = step / steps
        for number, one in enumerate(modifiers):
            start, end, every = one["start_epoch"], one["end_epoch"], one["update_frequency"]
            before, ends = last[number], now >= end - ROUNDING
            passed = before is not None and (every == -1 or now >= before + every - ROUNDING)
            if over[number] or now < start - ROUNDING or not (before is None or ends or passed):
                continue
            part = SHAPES[one["inter_func"]](min(1.0, (now - start) / (end - start)))
            held[number] = one["init_sparsity"] + part * (one["final_sparsity"] - one["init_sparsity"])
            last[number], over[number] = now, ends
        values.append(max(held))
    return values


def along(rules: Sequence[Rule], steps: int, until: int) -> list[float]:
    """The sparsity at every step, of rules on the same layers."""
    values = [0.0] * (until + 1)
    for rule in rules:
        times = rule.timeline(steps)
        scale = 1 if times.counts == "step" else steps
        events, here = {now * scale: times.sparsity(now) for now in times.events()}, 0.0
        for step in range(until + 1):
            here = max(here, events.get(step, 0.0))
            values[step] = max(values[step], here)
    return values


@pytest.mark.parametrize("seed", range(60))
def test_recipes(seed: int) -> None:
    rng = random.Random(seed)
    steps, modifiers = rng.choice([1, 2, 3, 4, 5, 7, 10]), modifiers_of(rng)
    epochs = math.ceil(modifiers[-1]["end_epoch"]) + 1
    tagged = [{"!tag": "!GMPruningModifier", "params": ["re:.*weight"], **one} for one in modifiers]
    found = along(load_config({"modifiers": tagged}).rules, steps, epochs * steps)
    assert found == pytest.approx(by_updates(modifiers, steps, epochs), abs=1e-6)


DECAYS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda t, target: target * t,
    "cos": lambda t, target: target * (1 - math.cos(math.pi * t / 2)),
    "cube": lambda t, target: target * t**3,
    "exp": lambda t, target: 1 - (1 - target) ** t,
}


@pytest.mark.parametrize("seed", range(60))
def test_pruners_that_count_steps(seed: int) -> None:
    rng = random.Random(seed)
    start, every, target = rng.choice([0, 1, 7]), rng.choice([1, 2, 3, 10]), rng.choice([0.5, 0.9, 0.97])
    end, decay = start + rng.choice([0, 1, 5, 20, 31]), rng.choice(list(DECAYS))
    keys = {"start_step": start, "end_step": end, "target_sparsity": target, "sparsity_decay_type": decay}
    (rule,) = load_config({**keys, "pruning_frequency": every}).rules
    count = (end - start) // every  # after the first event, which leaves everything unless it is the only one
    moments = range(start, end + 1, every)
    expected = {now: DECAYS[decay](k / count, target) if count else target for k, now in enumerate(moments)}
    times = rule.timeline()
    assert {now: times.sparsity(now) for now in times.events()} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_pruners_that_count_epochs(seed: int) -> None:
    rng = random.Random(seed)
    start, target = rng.choice([0, 2]), rng.choice([0.5, 0.9])
    end, initial = start + rng.choice([0, 1, 4, 9]), rng.choice([0.0, 0.0, 0.2])
    every = rng.choice([1, 1, 2, 0.5, 0.25, 1.5])
    pruner = {"start_epoch": start, "end_epoch": end, "initial_sparsity": initial, "target_sparsity": target}
    section = {"pruners": [{**pruner, "update_frequency": every, "names": ["a.weight"]}]}
    count, values = end - start + 1, [0.0] * start
    for number in range(1, count + 1):
        part = math.floor(number / every) * every / count
        values.append(target if start == end else initial + (target - initial) * part)
    if not any(values):
        return  # refused: no event fits
    (rule,) = load_config({"pruning": {"approach": {"weight_compression": section}}}).rules
    assert along([rule], 1, end) == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_channels_and_slices(seed: int) -> None:
    rng = random.Random(seed)
    start, every, rate = rng.choice([0, 1, 5]), rng.choice([1, 2, 3]), rng.choice([0.3, 0.6])
    end, shape = start + rng.choice([0, 1, 4, 10]), rng.choice(["linear", "geometric"])
    times = {"start_epoch": start, "end_epoch": end, "epoch_rate": every}
    gradually = rng.random() < 0.7
    channels, slices = load_config(
        {
            "channel_sparsity_args": {**times, "global_prune_rate": rate, "schedule": shape},
            "slice_sparsity_args": {**times, "prune_rate": rate, "pruning_gradually": gradually},
        }
    ).rules
    count = (end - start) // every + 1
    by_shape = {"linear": lambda t: rate * t, "geometric": lambda t: 1 - (1 - rate) ** t}[shape]
    expected = {start + k * every: by_shape((k + 1) / count) for k in range(count)}
    assert dict(events_of(channels)) == pytest.approx(expected, abs=1e-6)
    moments = [epoch for epoch in range(start, end + 1) if epoch % every == 0]
    if moments:  # else it goes at the first multiple after the end
        shares = [rate * (k + 1) / len(moments) if gradually else rate for k in range(len(moments))]
        assert dict(events_of(slices)) == pytest.approx(dict(zip(moments, shares, strict=True)), abs=1e-6)


# --- pat convert ------------------------------------------------------------------------------------------------------

FORMS: list[tuple[str, str]] = [
    ("yaml", "modifiers:\n  - !GMPruningModifier {params: ['re:.*weight'], init_sparsity: 0.1, final_sparsity: 0.5, "
     "start_epoch: 0, end_epoch: 2, update_frequency: 0.5}\n  - !GlobalMagnitudePruningModifier {params: "
     "['re:.*weight'], init_sparsity: 0.5, final_sparsity: 0.8, start_epoch: 2, end_epoch: 4, mask_type: block4}\n"),
    ("yaml", "modifiers:\n  - !GMPruningModifier {params: [], init_sparsity: 0.2, start_epoch: 0, end_epoch: 3, "
     "update_frequency: 1, final_sparsity: {0.5: [0.weight], 0.75: [2.weight]}, leave_enabled: False}\n"
     "  - !ConstantPruningModifier {params: __ALL__, start_epoch: 3}\n"),
    ("yaml", "modifiers:\n  - !ACDCPruningModifier {params: ['re:.*weight'], compression_sparsity: 0.6, "
     "start_epoch: 0, end_epoch: 4, update_frequency: 1}\n  - !DistillationModifier {hardness: 0.2}\n"),
    ("yaml", "pattern: 4x1\ntarget_sparsity: 0.75\nend_step: 4\npruning_type: magnitude\npruning_configs:\n"
     "  - {op_names: ['0'], pattern: '1x1'}\n  - {op_names: ['2'], pattern: '2:4', target_sparsity: 0.5}\n"),
    ("yaml", "pruning: {approach: {weight_compression_v2: {end_step: 4, target_sparsity: 0.5, pruners: [!PrunerV2 "
     "{pattern: 1xchannel, pruning_type: magnitude, pruning_scope: local}]}}}\n"),
    ("yaml", "pruning: {approach: {weight_compression: {end_epoch: 3, pruners: [!Pruner {target_sparsity: 0.6, "
     "update_frequency: 2, prune_type: group_lasso, parameters: {alpha: 0.1, pattern: tile_pattern_4x1}}]}}}\n"),
    ("json", '{"channel_sparsity_args": {"global_prune_rate": 0.5, "start_epoch": 0, "end_epoch": 3, "layers": ["0"]}, '
     '"slice_sparsity_args": {"prune_rate": 0.5, "is_prune": false}}'),
    ("json", '{"global_sparsity": 0.5, "start_epoch": 1, "end_epoch": 3, "layers_to_prune": ["0"]}'),
]  # fmt: skip


def masks_along(config: PruningConfig) -> list[dict[str, torch.Tensor]]:
    """The masks after each of some epochs of two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 20))
    batches = [torch.randn(4, 16) for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruning(model, config, example_inputs=batches[0], optimizer=optimizer)
    pruner.on_train_begin(batches)
    found = []
    for epoch in range(5):
        pruner.prune(model, epoch)
        for number, inputs in enumerate(batches):
            pruner.on_step_begin(number)
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        found.append({name: mask.clone() for name, mask in pruner.masks.items()})
    return found


@pytest.mark.parametrize(("ending", "text"), FORMS, ids=range(len(FORMS)))
@pytest.mark.parametrize("out", ["yaml", "json"])
def test_a_converted_file_prunes_the_same(ending: str, text: str, out: str, tmp_path: Path) -> None:
    source, native = tmp_path / f"source.{ending}", tmp_path / f"native.{out}"
    source.write_text(text, encoding="utf-8")
    done = CliRunner().invoke(app, ["convert", str(source), "--out", str(native)])
    assert done.exit_code == 0, done.output
    config, converted = load_config(source), load_config(native)
    assert converted == config
    assert [events_of(rule, 2) for rule in converted.rules] == [events_of(rule, 2) for rule in config.rules]
    before, after = masks_along(config), masks_along(converted)
    assert any(not bool(mask.all()) for masks in before for mask in masks.values())
    for one, other in zip(before, after, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
