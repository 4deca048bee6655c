"""Keys of other systems' files that have no effect, or another one than they seem to: said once, or refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from pruningawaretraining import load_config
from pruningawaretraining.config.recipe import load_recipe
from pruningawaretraining.errors import ConfigError


def recipe(*more: dict[str, Any], **keys: Any) -> dict[str, Any]:
    modifier = {"!tag": "!GMPruningModifier", "params": ["re:.*weight"], "init_sparsity": 0.1, "final_sparsity": 0.5,
                "start_epoch": 0, "end_epoch": 2, "update_frequency": 1.0}  # fmt: skip
    return {"modifiers": [{**modifier, **keys}, *more]}


def rate(**keys: Any) -> dict[str, Any]:
    own = {"start_epoch": 0, "end_epoch": 4, "lr_func": "linear", "init_lr": 0.1, "final_lr": 0.01}
    return {"!tag": "!LearningRateFunctionModifier", **own, **keys}


def section(**keys: Any) -> dict[str, Any]:
    return {"pruning": {"approach": {"weight_compression": keys}}}


SAID: list[tuple[dict[str, Any], str]] = [
    (recipe(params=[]), "modifiers[0].params: [] is every layer that can be pruned, as it is there"),
    (section(pruners=[]), "weight_compression.pruners: [] prunes nothing: the layers stay dense, as they do there"),
    (recipe(n=2), "modifiers[0].n is ignored: mask_type is 'unstructured'"),
    (recipe(n=2, m=4, mask_type="block4"), "modifiers[0].m is ignored: mask_type is 'block4'"),
    (recipe(rate(decay_rate=0.5)), "modifiers[1].decay_rate is ignored: lr_func is linear"),
    (recipe(rate(decay_epochs=3.0, lr_func="cosine")), "modifiers[1].decay_epochs is ignored: lr_func is cosine"),
    (recipe(rate(warmup=2, cycle_warmup=1)), "modifiers[1].cycle_warmup is ignored: warmup decides: 2"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "expected"), SAID, ids=[row[1][:40] for row in SAID])
def test_it_is_said_once(config: dict[str, Any], expected: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    load_config(config)
    assert len([one for one in caplog.records if expected in one.getMessage()]) == 1


@pytest.mark.parametrize(
    "config",
    [
        recipe(n=2, m=4, mask_type="N:M"),
        recipe(rate(lr_func="exponential", decay_rate=0.5, decay_epochs=2.0)),
        recipe(rate(lr_func="linear", warmup=1, cycle_epochs=2)),
        recipe(rate(cycle_warmup=1)),
        recipe(params="__ALL_PRUNABLE__"),
        recipe(params=[], final_sparsity={"0.5": ["a.weight"]}),
        section(pruners=[{"target_sparsity": 0.5}]),
    ],
)
def test_nothing_is_said_where_it_counts(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    load_config(config)
    assert not [one.getMessage() for one in caplog.records]


REFUSED: list[tuple[dict[str, Any], str]] = [
    (recipe(update_frequency=0), "update_frequency: 0 is not allowed. Allowed: -1, or a number above 0"),
    (recipe(update_frequency=-2), "update_frequency: -2 is not allowed. Allowed: -1, or a number above 0"),
    (recipe(rate(cycle_epochs=0)), "cycle_epochs: 0 is not allowed. Allowed: -1, or a number above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "expected"), REFUSED, ids=[row[1][:40] for row in REFUSED])
def test_it_is_refused(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(config)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_no_pruners_leave_the_model_dense() -> None:
    (rule,) = load_config(section(pruners=[])).rules
    assert not rule.enabled


@pytest.mark.parametrize("load", [load_config, load_recipe])
def test_a_variable_that_no_value_reads_is_said(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    config = {**recipe(end_epoch="eval(n)"), "n": 1}
    load(config, variables={"n": 3, "nn": 4})
    assert [one.getMessage() for one in caplog.records] == [
        "nn is ignored: no eval(...) of the recipe reads it; did you mean 'n'?"
    ]
