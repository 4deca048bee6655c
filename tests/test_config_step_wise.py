"""Step-wise pattern pruning by YAML: the form of 2022 with its tags, and the flat form of 2.x."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining import load_config
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.config.targets import Target
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.patterns.stacking import Claim, check_stacking
from pruningawaretraining.registry import build
from pruningawaretraining.session.unmatched import tell_of_unmatched

DATA = Path(__file__).parent / "data" / "step_wise"


def bert_like() -> nn.ModuleDict:
    """The names of a two-layer BERT."""

    def layer() -> nn.ModuleDict:
        heads = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value")})
        attention = nn.ModuleDict({"self": heads, "output": nn.ModuleDict({"dense": nn.Linear(8, 8)})})
        inner = {"intermediate": nn.Linear(8, 16), "output": nn.Linear(16, 8)}
        parts = {name: nn.ModuleDict({"dense": module}) for name, module in inner.items()}
        return nn.ModuleDict({"attention": attention, **parts})

    bert = {
        "embeddings": nn.ModuleDict({"word_embeddings": nn.Embedding(10, 8)}),
        "encoder": nn.ModuleDict({"layer": nn.ModuleList([layer(), layer()])}),
        "pooler": nn.ModuleDict({"dense": nn.Linear(8, 8)}),
    }
    return nn.ModuleDict({"bert": nn.ModuleDict(bert), "classifier": nn.Linear(8, 2)})


def layers_of(rule: Rule, model: nn.Module) -> list[str]:
    grouping = build("pattern", rule.pattern).build(model, rule.layers, rule.exclude)
    return [one.name for one in grouping.sets]


def test_the_seeds_yaml_means_two_rules() -> None:
    single, blocks = load_config(DATA / "bert_mini.yaml").rules
    assert single.name == "pruning.approach.weight_compression_pytorch.pruners[0]"
    assert single.pattern == {"type": "unstructured", "types": ["Linear"], "spare_last": False}
    assert blocks.pattern == {"type": "block", "rows": 4, "columns": 1, "types": ["Linear"], "spare_last": False}
    for rule in (single, blocks):
        assert rule.criterion == {"type": "snip_momentum", "reduction": "mean", "half": False}
        assert (rule.schedule, rule.scope, rule.unit) == ("exponential", "global", "step")
        assert (rule.start, rule.end, rule.every) == (0, 0, 100)
        assert (rule.target, rule.max_sparsity, rule.min_sparsity) == (Target(sparsity=0.9), 0.98, 0.0)


def test_the_seeds_pruners_share_no_layer_and_leave_none_out() -> None:
    model = bert_like()
    rules = load_config(DATA / "bert_mini.yaml").rules
    single, blocks = (layers_of(rule, model) for rule in rules)
    assert {name.split(".")[-1] for name in blocks} == {"query", "key", "value"}
    assert len(single) == 6
    assert not any("pooler" in name or "classifier" in name for name in [*single, *blocks])
    check_stacking([Claim("a", "unstructured", single), Claim("b", "block", blocks)])


def test_the_flat_form() -> None:
    model = bert_like()
    local, progressive = load_config(DATA / "flat.yaml").rules
    assert (local.name, progressive.name) == ("pruning_configs[0]", "pruning_configs[1]")
    assert local.pattern == {"type": "block", "rows": 0, "columns": 1, "types": ["Linear"], "spare_last": True}
    assert (local.scope, local.target.sparsity) == ("local", 0.6)
    assert (progressive.scope, progressive.target.sparsity) == ("global", 0.5)
    assert (local.progressive, progressive.progressive) == (1, 4)
    assert progressive.criterion == {"type": "snip_momentum", "reduction": "mean", "half": True}
    assert (local.end, local.every, local.min_sparsity, local.max_sparsity) == (10, 2, 0.1, 0.98)
    assert local.exclude == progressive.exclude == ["?re:.*(?:pooler).*"]
    assert {name.split(".")[-1] for name in layers_of(local, model)} == {"query", "key", "value"}


def flat(**changes: Any) -> Rule:
    (rule,) = load_config({"pattern": "4x1", **changes}).rules
    return rule


def test_defaults() -> None:
    rule = flat()
    assert rule.criterion == {"type": "snip_momentum", "reduction": "mean", "half": False}
    assert (rule.target.sparsity, rule.schedule, rule.scope) == (0.9, "exponential", "global")
    assert (rule.start, rule.end, rule.every, rule.unit) == (0, 0, 1, "step")
    assert (rule.min_sparsity, rule.max_sparsity) == (0.0, 0.98)
    assert (rule.layers, rule.exclude, rule.regularizer) == (None, [], None)
    assert (rule.keep_zeros, rule.progressive, rule.mode, rule.enabled) == (False, 1, "prune", True)


def flat_criterion(kind: str) -> dict[str, Any]:
    return {"type": kind, "reduction": "mean", "half": False}


def four_rows(rows: int, columns: int) -> dict[str, Any]:
    return {"type": "block", "rows": rows, "columns": columns, "types": ["Conv", "Linear"], "spare_last": True}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prune_type": "magnitude"}, {"criterion": {"type": "weight", "reduction": "mean", "half": False}}),
        ({"criterion_reduce_type": "max"}, {"criterion": {"type": "snip_momentum", "reduction": "max", "half": False}}),
        ({"pruning_type": "retrain_free"}, {"criterion": {"type": "retrain_free"}}),
        ({"pruning_type": "block_mask"}, {"criterion": {"type": "block_mask"}}),
        ({"pruning_type": "pattern_lock"}, {"mode": "lock"}),
        ({"pruning_type": "snip_progressive"}, {"progressive": 4}),
        ({"sparsity_decay_type": "cube"}, {"schedule": "cube"}),
        ({"sparsity_decay_type": "cubic"}, {"schedule": "cubic"}),
        ({"sparsity_decay_type": "cos"}, {"schedule": "cosine"}),
        ({"prune_domain": "local"}, {"scope": "local"}),
        ({"update_frequency_on_step": 7}, {"every": 7}),
        ({"max_sparsity_ratio_per_layer": 0.5}, {"max_sparsity": 0.5}),
        ({"resume_from_pruned_checkpoint": True}, {"keep_zeros": True}),
        ({"reg_type": "group_lasso", "reg_coeff": 0.01}, {"regularizer": {"type": "block_lasso", "strength": 0.01}}),
        (
            {"reg_type": "group_lasso", "parameters": {"reg_coeff": 0.02}},
            {"regularizer": {"type": "block_lasso", "strength": 0.02}},
        ),
        ({"reg_type": "group_lasso"}, {"regularizer": None}),
        ({"target_sparsity": 0}, {"enabled": False}),
        ({"update_frequency": 7}, {"every": 7}),
        ({"prune_frequency": 7}, {"every": 7}),
        ({"max_layer_sparsity_ratio": 0.5}, {"max_sparsity": 0.5}),
        ({"pruning_type": "snip_momentum_block"}, {"criterion": flat_criterion("snip_momentum")}),
        ({"start_step": 3, "end_step": -1}, {"start": 3, "end": 3}),
        ({"pattern": "oc_pattern_4x1"}, {"pattern": four_rows(4, 1)}),
        ({"pattern": "ic_pattern_4x1"}, {"pattern": four_rows(4, 1)}),
        ({"pattern": "tile_pattern_1x2"}, {"pattern": four_rows(1, 2)}),
        ({"names": ["fc"]}, {"layers": ["re:.*(?:fc).*"]}),
        ({"op_names": []}, {"layers": None}),
        ({"extra_excluded_names": ["a"], "excluded_names": "b"}, {"exclude": ["?re:.*(?:b).*", "?re:.*(?:a).*"]}),
    ],
)
def test_keys(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    values = flat(**changes).model_dump()
    assert {key: values[key] for key in expected} == expected


def test_local_wins_over_global_over_default_and_exclusions_add_up() -> None:
    first, second = load_config(
        {
            "target_sparsity": 0.8,
            "reg_type": "group_lasso",
            "reg_coeff": 0.01,
            "excluded_op_names": ["a"],
            "pruning_configs": [{"target_sparsity": 0.5, "exclude_names": ["b"]}, {"reg_coeff": 0.02}],
        }
    ).rules
    assert (first.target.sparsity, second.target.sparsity) == (0.5, 0.8)
    assert first.exclude == ["?re:.*(?:a).*", "?re:.*(?:b).*"]
    assert second.exclude == ["?re:.*(?:a).*"], "the exclusions of one pruner do not leak into the next"
    assert first.regularizer == {"type": "block_lasso", "strength": 0.01}
    assert second.regularizer == {"type": "block_lasso", "strength": 0.02}


def file_2022(section: dict[str, Any], kind: str = "weight_compression_pytorch", **others: Any) -> dict[str, Any]:
    return {"model": {"name": "m"}, "pruning": {"approach": {kind: section}}, **others}


def test_a_pruners_own_list_goes_before_that_of_the_file() -> None:
    section = {
        "target_sparsity": 0.5,
        "not_to_prune_names": ["classifier", "query"],
        "pruners": [{"not_to_prune_names": ["classifier"]}, {"extra_excluded_names": ["key"]}],
    }
    model = bert_like()
    first, second = (layers_of(rule, model) for rule in load_config(file_2022(section)).rules)
    assert any("query" in name for name in first) and not any("classifier" in name for name in first)
    assert not any("query" in name or "key" in name or "classifier" in name for name in second)


def test_without_a_target_the_form_of_2022_leaves_the_model_dense(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(file_2022({"pruners": [{"pattern": "4x1"}, {"target_sparsity": 0.5}]}, tuning={"a": 1}))
    assert [(rule.enabled, rule.target.sparsity) for rule in config.rules] == [(False, None), (True, 0.5)]
    assert [one.message for one in caplog.records if one.levelname == "WARNING"] == [
        "model, tuning is ignored: the model, its data and its training are the loop's",
        "pruning.approach.weight_compression_pytorch.pruners[0] is ignored: without target_sparsity it prunes nothing: "
        "the layers stay dense",
    ]
    assert flat().target.sparsity == 0.9


def test_an_excluded_name_that_matches_nothing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config({"pattern": "4x1", "excluded_op_names": ["qa_outputs"], "pruning_op_types": ["Linear"]})
    assert len(layers_of(config.rules[0], bert_like())) == 13
    tell_of_unmatched(bert_like(), config)
    (warning,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert warning.startswith("excluded_op_names") and "qa_outputs" in warning and "matches no module" in warning


STEPS: list[tuple[dict[str, Any], dict[int, float]]] = [
    ({"start_step": 4, "end_step": 4}, {4: 0.9}),
    ({"end_step": 1000, "pruning_frequency": 250, "sparsity_decay_type": "linear"},
     {0: 0.0, 250: 0.225, 500: 0.45, 750: 0.675, 1000: 0.9}),
    ({"end_step": 1000, "pruning_frequency": 250},
     {0: 0.0, 250: 0.4376586748, 500: 0.6837722340, 750: 0.8221720590, 1000: 0.9}),
    ({"end_step": 1000, "pruning_frequency": 250, "sparsity_decay_type": "cos"},
     {0: 0.0, 250: 0.0685084207, 500: 0.2636038969, 750: 0.5555849107, 1000: 0.9}),
    ({"end_step": 1000, "pruning_frequency": 250, "sparsity_decay_type": "cube"},
     {0: 0.0, 250: 0.0140625, 500: 0.1125, 750: 0.3796875, 1000: 0.9}),
    ({"start_step": 1, "end_step": 10, "pruning_frequency": 4, "sparsity_decay_type": "linear"},
     {1: 0.0, 5: 0.45, 9: 0.9}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), STEPS, ids=range(len(STEPS)))
def test_sparsity_of_every_step(changes: dict[str, Any], expected: dict[int, float]) -> None:
    for rule in (flat(**changes), *load_config(file_2022({"target_sparsity": 0.9, **changes, "pruners": [{}]})).rules):
        times = rule.timeline()
        assert {now: times.sparsity(now) for now in times.events()} == pytest.approx(expected, abs=1e-6)


EPOCHS: list[tuple[dict[str, Any], dict[int, float]]] = [
    ({"start_epoch": 0, "end_epoch": 4, "target_sparsity": 0.6}, {0: 0.12, 1: 0.24, 2: 0.36, 3: 0.48, 4: 0.6}),
    ({"start_epoch": 2, "end_epoch": 3, "target_sparsity": 0.6}, {2: 0.3, 3: 0.6}),
    ({"start_epoch": 3, "end_epoch": 3, "target_sparsity": 0.6}, {3: 0.6}),
    ({"end_epoch": 3, "target_sparsity": 0.6, "initial_sparsity": 0.2}, {0: 0.3, 1: 0.4, 2: 0.5, 3: 0.6}),
    ({"end_epoch": 3, "target_sparsity": 0.6, "update_frequency": 2}, {1: 0.3, 3: 0.6}),
    ({"end_epoch": 4, "target_sparsity": 0.5, "update_frequency": 2}, {1: 0.2, 3: 0.4}),
    ({"end_epoch": 1, "target_sparsity": 0.6, "update_frequency": 0.1}, {0: 0.3, 1: 0.6}),
    ({}, {0: 0.194, 1: 0.388, 2: 0.582, 3: 0.776, 4: 0.97}),
]


@pytest.mark.parametrize(("pruner", "expected"), EPOCHS, ids=range(len(EPOCHS)))
def test_sparsity_of_every_epoch_of_the_older_section(pruner: dict[str, Any], expected: dict[int, float]) -> None:
    (rule,) = load_config(file_2022({"pruners": [pruner]}, "weight_compression")).rules
    times = rule.timeline()
    assert (rule.unit, rule.scope) == ("epoch", "local")
    assert {now: times.sparsity(now) for now in times.events()} == pytest.approx(expected, abs=1e-6)


def test_pruners_of_the_older_section() -> None:
    section = {
        "target_sparsity": 0.5,
        "pruners": [
            {
                "!tag": "!Pruner",
                "prune_type": "group_lasso",
                "parameters": {"alpha": 0.006, "pattern": "tile_pattern_1x2"},
                "names": [
                    "layer.*.attention.self.query.weight",
                    "layer.0.attention.output.dense.bias",
                    "pooler.weight",
                ],
            },
            {"prune_type": "gradient_sensitivity", "names": ["classifier.weight"]},
        ],
    }
    lasso, sensitivity = load_config(file_2022(section, "weight_compression")).rules
    assert lasso.regularizer == {"type": "block_lasso", "strength": 0.006}
    assert lasso.pattern == "1x2" and lasso.criterion == {"type": "weight"}
    assert lasso.layers == [r"re:layer\.\d+\.attention\.self\.query", "pooler"]
    assert sensitivity.criterion == {"type": "snip", "momentum": 1.0} and sensitivity.layers == ["classifier"]
    heads = {"prune_type": "gradient_sensitivity", "parameters": {"target": 8, "stride": 64}}
    (rule,) = load_config(file_2022({"pruners": [heads]}, "weight_compression")).rules
    assert rule.keep_per_layer == 8 and rule.pattern == "channel"


def test_configs_do_not_leak_into_each_other() -> None:
    assert flat(excluded_op_names=["a"]).exclude == ["?re:.*(?:a).*"]
    assert flat().exclude == []


def test_sparing_the_classifier_spares_nothing_else() -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc": nn.Linear(8, 8)})
    assert layers_of(flat(), model) == ["fc1"]
    assert layers_of(flat(op_names=["fc$"]), model) == ["fc"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_sparity": 0.9}, "target_sparity: 'target_sparity' is not known; did you mean 'target_sparsity'?"),
        ({"pruning_configs": [{"prune_tpe": "snip"}]}, r"pruning_configs\[0\].prune_tpe: .*did you mean 'prune_type'"),
        ({"pattern": "4y1"}, "pattern: '4y1' is not known; did you mean '4x1'"),
        ({"pruning_type": "snipp"}, "pruning_type: 'snipp' is not known; did you mean 'snip'"),
        ({"pattern": "2:4"}, "target_sparsity: 0.9 is out of reach of the pattern 2:4. Allowed: at most 0.5"),
        ({"start_step": 5, "end_step": 3}, "end_step: 3 is before start_step"),
        ({"pruning_type": "snip", "prune_type": "gradient"}, "prune_type: 'gradient' is not the 'snip'"),
        ({"target_sparsity": 1.2}, r"target_sparsity: 1.2 is not allowed. Allowed: a number in \[0, 1\]"),
        ({"prune_domain": "globl"}, "prune_domain: 'globl' is not known; did you mean 'global'"),
        ({"op_names": ["("]}, r"op_names\[0\]: '\(' is not a regular expression"),
        ({"sparsity_decay_type": "expp"}, "sparsity_decay_type: 'expp' is not known; did you mean 'exp'"),
        ({"reg_coeff": 1, "parameters": {"reg_coeff": 2}}, "parameters.reg_coeff: 2.* is not the reg_coeff 1"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flat(**changes)


def test_other_tags_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("pruning: {approach: {weight_compression_pytorch: {pruners: [!!python/object:os.system {a: 1}]}}}")
    with pytest.raises(ConfigError, match="the tag .*os.system.* is not known"):
        load_config(path)


@pytest.mark.parametrize("pattern", ["4x1", "2:4", "channelx1", "1xchannel", "1x1", "slice"])
def test_native_rules_name_patterns_as_configs_do(pattern: str) -> None:
    (rule,) = load_config({"rules": [{"pattern": pattern, "target": {"sparsity": 0.5}}]}).rules
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    assert build("pattern", rule.pattern).build(model).size > 0
    assert torch.is_tensor(model[0].weight)


def test_the_largest_sparsity_of_a_layer_is_the_goal_of_the_schedule(caplog: pytest.LogCaptureFixture) -> None:
    rule = flat(target_sparsity=0.99, max_sparsity_ratio_per_op=0.9, start_step=0, end_step=3, pruning_frequency=1)
    times = rule.timeline()
    assert [times.sparsity(now) for now in range(4)] == pytest.approx([0, 0.5358, 0.7846, 0.9], abs=1e-4)
    assert "target_sparsity" in caplog.text and "0.9 is reached" in caplog.text
