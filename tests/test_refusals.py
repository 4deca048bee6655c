"""What users get wrong in rules, and what they are told."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining import Pruning
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.export.semi_structured import to_semi_structured
from pruningawaretraining.session.distillation import Distiller

X, Y = torch.linspace(-1, 1, 64).reshape(4, 16).sin(), torch.tensor([0, 1, 2, 3])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def pruner_of(model: nn.Module, **rule: Any) -> Pruning:
    rule = {"target": {"sparsity": 0.5}, **rule}
    return Pruning(model, {"rules": [rule]}, example_inputs=X)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"pattern": {"type": "block", "types": "Linear"}}, "pattern.types: 'Linear' is not a list of texts"),
        ({"pattern": {"type": "unstructured", "spare_last": "no"}}, "spare_last: 'no' is not true or false"),
        ({"pattern": {"type": "channel", "heads": "yes"}}, "heads: 'yes' is not true or false"),
        ({"pattern": {"type": "head", "unit": 3}}, "unit: 3 is not a text"),
        ({"pattern": {"type": "head", "unit": "qery"}}, "unit: 'qery' is not known; did you mean 'query'"),
        ({"pattern": "head"}, r"rules\[0\].pattern: the Sequential has no attention block that is known"),
        ({"pattern": "4x1", "max_sparsity": 0.3}, "target.sparsity: 0.5 is out of reach: at most 0.3"),
        ({"pattern": "4x1", "min_sparsity": 0.6}, "min_sparsity: 0.6 is above target.sparsity"),
        ({"min_sparsity": 0.6}, "min_sparsity: 0.6 is above target.sparsity"),
        ({"pattern": "2:4", "final_sparsity": 0.7}, "final_sparsity: 0.7 is not supported by the pattern"),
        ({"pattern": "2:4", "allocation": "uniform"}, "allocation: 'uniform' is not supported by the pattern"),
        ({"target": {}}, "nothing to reach. Allowed: sparsity, macs, parameters, latency"),
    ],
    ids=str,
)
def test_rules_are_refused_by_name(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruner_of(net(), **rule)


@pytest.mark.parametrize("criterion", ["wanda", "variance", "snip", "taylor"])
@pytest.mark.parametrize("pattern", ["2:4", "4x1", "unstructured"])
def test_data_of_their_own_let_criteria_score_before_any_step(criterion: str, pattern: str) -> None:
    model = net()
    pruner = pruner_of(model, pattern=pattern, criterion=criterion, layers=["0"])
    pruner.calibrate_with([(X, Y)], nn.functional.cross_entropy)
    pruner.prune(model, 0)
    assert pruner.sparsity == 0.5 and pruner.phase == "finetune"
    assert float((model[0].weight == 0).float().mean()) == 0.5


def test_data_that_come_later_let_an_event_that_waits_take_place() -> None:
    model = net()
    pruner = pruner_of(model, pattern="2:4", criterion="wanda", layers=["0"])
    pruner.prune(model, 0)
    assert pruner.sparsity == 0.0
    pruner.calibrate_with([(X, Y)], nn.functional.cross_entropy)
    assert pruner.sparsity == 0.5


def test_a_layer_without_any_weight_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight *= 1e-3
    pruner = pruner_of(model, pattern="unstructured", criterion={"type": "magnitude", "normalize": "none"}, end=2)
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            pruner.prune(model, epoch)
    assert [one.getMessage() for one in caplog.records if "no weight is left in 2" in one.getMessage()] != []
    assert sum("no weight is left in 2" in one.getMessage() for one in caplog.records) == 1


@pytest.mark.parametrize(
    ("rule", "says"),
    [({"pattern": "2:4"}, "prune(model, epoch)"), ({"unit": "step", "start": 3}, "the optimizer's steps are counted")],
)
def test_a_rule_that_never_pruned_is_named_at_the_end(
    rule: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    pruner = pruner_of(net(), **rule)
    with caplog.at_level(logging.WARNING):
        pruner.on_train_end()
    assert any("rules[0]: it never pruned" in one.getMessage() and says in one.getMessage() for one in caplog.records)


def test_a_lock_needs_no_end() -> None:
    config = {"pruning_configs": [{"pruning_type": "pattern_lock", "start_step": 2, "pattern": "4x1"}]}
    rule = Pruning(net(), config, example_inputs=X).config.rules[0]
    assert (rule.mode, rule.start, rule.end) == ("lock", 2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Distiller(net(), weight=-1), "weight: -1 is not allowed"),
        (lambda: Distiller(net(), temperature=0), "temperature: 0 is not allowed"),
        (lambda: to_semi_structured(3), "model: a int is not allowed"),  # type: ignore[arg-type]
        (lambda: to_semi_structured(net(), layers="0"), "layers: '0' is a string"),
        (lambda: pruner_of(net()).update_items_for_all_pruners(start_step="x"), "start_step: 'x' is not allowed"),
    ],
)
def test_arguments_are_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_errors_of_rules_are_config_errors() -> None:
    with pytest.raises(ConfigError):
        pruner_of(net(), pattern={"type": "block", "types": "Linear"})
