"""What messages, plans and reports say of rules that rank experts with other structures."""

from __future__ import annotations

from typing import Any

import moe
import pytest
import torch
from test_expert_structures import built
from torch import nn

from pruningawaretraining import Pruning
from pruningawaretraining.config import load_config
from pruningawaretraining.config.plan import rule_lines
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.report.nouns import units_of
from pruningawaretraining.session.plan import plan, rule_of

ALL = ["channel", "head", "expert", "depth"]
RULE = {"pattern": ALL, "criterion": "taylor", "target": {"parameters": 0.6}}


@pytest.mark.parametrize(
    ("pattern", "heading"),
    [
        (ALL, "Channels, attention heads, experts and residual blocks"),
        (["channel", "expert"], "Channels and experts"),
        ({"type": "expert", "depth": True}, "Experts and residual blocks"),
        (["channel", "head"], "Channels and attention heads"),
        ("moe", "Experts"),
    ],
)
def test_headings_name_every_structure_of_a_list(pattern: Any, heading: str) -> None:
    config = load_config({"rules": [{**RULE, "pattern": pattern}]})
    assert units_of({"config": {"pruning": config.model_dump()}}).heading == heading


@pytest.mark.parametrize("change", [{"final_sparsity": 0.9}, {"compensation": "bias"}, {"dynamic": "regrow"}])
def test_messages_show_the_list_that_was_written(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"the pattern \['channel', 'head', 'expert', 'depth'\]\. Allowed"):
        load_config({"rules": [{**RULE, **change}]})


def test_a_check_names_the_structures() -> None:
    (rule,) = load_config({"rules": [RULE]}).rules
    assert rule_lines(rule, 0, None, None)[0] == "rule rules[0]: channel, head, expert, depth by taylor, global"


def test_a_plan_with_experts_predicts_no_latency() -> None:
    model, x = moe.MoeNet(experts=4), torch.randn(24, 4)
    rule = rule_of(load_config({"rules": [{**RULE, "pattern": ["channel", "expert"]}]}))
    calibration = Calibration(model, [(x, torch.zeros(24, dtype=torch.long))], nn.functional.cross_entropy)
    found = plan(model, rule, x, [("parameters", 0.8), ("macs", 0.9)], calibration)
    assert found.latency_ms is None and all(one.latency is None and not one.measured for one in found.targets)
    assert found.targets[0].parameters <= 0.8 * found.parameters
    assert found.note.startswith("no latency: a token takes as many experts")
    with pytest.raises(ConfigError, match=r"--latency: 0.5 cannot be weighed against experts"):
        plan(model, rule, x, [("latency", 0.5)], calibration)
    alone = rule_of(load_config({"rules": [{"pattern": "moe", "target": {"parameters": 0.8}}]}))
    assert plan(model, alone, x, [("parameters", 0.8)]).latency_ms is None


@pytest.mark.parametrize("pattern", ["expert", ["expert", "depth"]])
def test_a_report_has_the_experts_of_routers_that_are_no_linear_layers(pattern: Any) -> None:
    model, x = built("Mixtral")
    rule = {**RULE, "pattern": pattern, "target": {"parameters": 0.7}}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=x, optimizer=optimizer)
    names = [f"model.layers.{number}.mlp.experts" for number in range(2)]
    dense = {row["name"]: row for row in pruner.report().layers}
    assert [(dense[name]["dense_out"], dense[name]["kept_out"]) for name in names] == [(4, 4), (4, 4)]
    model(**x, labels=x["input_ids"]).loss.backward()
    optimizer.step()
    pruner.prune(epoch=0)
    report, modules = pruner.report(), dict(model.named_modules())
    rows = {row["name"]: row for row in report.layers}
    kept = {one["source"]: one["kept"] for one in report.groups}
    for name in names:
        assert rows[name]["kept_out"] == kept[name.removesuffix(".experts")]
        experts = modules.get(name)
        assert rows[name]["parameters"] == (0 if experts is None else sum(one.numel() for one in experts.parameters()))
    assert any(rows[name]["kept_out"] < 4 for name in names)
    assert sum(" → " in line for line in str(report).splitlines() if ".experts" in line) >= 1


def test_a_cost_where_none_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pruningawaretraining.config.targets.names", lambda kind: [])
    with pytest.raises(
        ConfigError, match=r"costs: 'flops' is not known. Allowed: a name under @register\('cost', name"
    ):
        load_config({"rules": [{**RULE, "target": {"costs": {"flops": 0.5}}}]})
