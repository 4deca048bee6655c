"""What a new user gets wrong first, and the one line that says how it is meant."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from pruningawaretraining import Pruning, load_config
from pruningawaretraining.cli.main import app
from pruningawaretraining.errors import ConfigError, ModelError

HALF = {"target": {"macs": 0.5}}
EXAMPLE = torch.zeros(1, 8)


def network(norm: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), *([nn.BatchNorm1d(16)] if norm else []), nn.ReLU(), nn.Linear(16, 4))


def pruner(rule: dict[str, Any], norm: bool = False) -> Pruning:
    return Pruning(network(norm), {"rules": [rule]}, example_inputs=EXAMPLE)


@pytest.mark.parametrize("rule", [HALF, {**HALF, "criterion": "magnitude", "start": 1, "end": 3}])
def test_a_rule_at_top_level_is_to_be_wrapped(rule: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"of a rule. Allowed: wrap it in rules: \[\{\.\.\.\}\]"):
        load_config(rule)


class TakesBatch(nn.Module):
    """A model whose forward takes one dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(batch["x"])))
        return out


def test_a_dict_as_one_argument_goes_into_a_tuple() -> None:
    with pytest.raises(ModelError, match=r"If it takes the dict as one argument, pass \(\{\.\.\.\},\)"):
        Pruning(TakesBatch(), {"rules": [HALF]}, example_inputs={"x": EXAMPLE})
    assert Pruning(TakesBatch(), {"rules": [HALF]}, example_inputs=({"x": EXAMPLE},)).macs.dense == 192


@pytest.mark.parametrize(("given", "message"), [("prunning", "did you mean 'pruning'"), ("configs", "Allowed:")])
def test_a_schema_by_a_wrong_name(given: str, message: str) -> None:
    found = CliRunner().invoke(app, ["schema", given])
    assert found.exit_code == 2 and message in found.stderr and len(found.stderr.splitlines()) == 1


def test_bn_scale_wants_a_norm() -> None:
    rule = {**HALF, "criterion": "bn_scale"}
    with pytest.raises(ConfigError, match=r"rules\[0\].criterion: 'bn_scale' needs norms"):
        pruner(rule)
    assert pruner(rule, norm=True).prune() == "removed"


def test_prune_without_an_epoch_is_for_rules_without_a_schedule() -> None:
    scheduled = pruner({**HALF, "start": 2, "end": 5})
    with pytest.raises(ConfigError, match=r"epoch is required: rules\[0\] prunes in epochs 2 to 5"):
        scheduled.prune(scheduled.model)
    assert scheduled.sparsity == 0
    at_once = pruner(HALF)
    assert at_once.prune() == "removed"


@pytest.mark.parametrize(("epoch", "warned"), [(100, True), (5, False), (3, False)])
def test_a_first_call_after_the_schedule_is_warned_of(
    epoch: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    one = pruner({**HALF, "start": 2, "end": 5})
    with caplog.at_level(logging.WARNING, "pruningawaretraining"):
        one.prune(one.model, epoch)
        one.prune(one.model, epoch + 1)
    said = [record.message for record in caplog.records if "at once" in record.message]
    late = "rules[0]: epoch 100 is the first to be handed to prune, after the schedule's last (5): everything is pruned"
    assert len(said) == warned and all(message.startswith(late) for message in said)
