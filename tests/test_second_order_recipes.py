"""SparseML-style recipes: they load unchanged, mean what they say, and run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from second_order_fixture import batches, cross_entropy, layer_weights, small_net, total, zeros

from pruningawaretraining import Pruning, load_config
from pruningawaretraining.config.dialects.sparseml import layers_of
from pruningawaretraining.config.dialects.sparseml_criteria import pattern_of
from pruningawaretraining.config.dialects.sparseml_keys import GlobalPruning
from pruningawaretraining.config.dialects.sparseml_recipe import Found, evaluated
from pruningawaretraining.config.recipe import load_recipe
from pruningawaretraining.config.targets import Target
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.session.one_shot import one_shot

DATA = Path(__file__).parent / "data" / "recipes"


def test_a_gradual_recipe_becomes_a_rule():
    (rule,) = load_config(DATA / "cap_gradual.yaml").rules
    assert rule.layers == ["param:.*attn.qkv.weight", "param:.*attn.proj.weight", r"param:.*mlp.fc\d.weight"]
    assert rule.initial == 0.05
    assert rule.pattern == "unstructured"
    assert rule.criterion == {
        "type": "cap", "num_grads": 4096, "micro_batch": 16, "damp": 1e-8, "fisher_block_size": 192,
        "num_recomputations": 1, "blocks_in_parallel": None, "fisher_inv_device": "cpu", "traces_backup_dir": None,
        "merge": "cumulative",
    }  # fmt: skip
    assert (rule.start, rule.end, rule.every, rule.unit) == (0, 20, 2, "epoch")
    assert (rule.schedule, rule.scope, rule.target) == ("cubic", "global", Target(sparsity=0.75))


def test_one_modifier_with_several_sparsities_becomes_several_rules():
    rules = load_config(DATA / "mixed_one_shot.yaml").rules
    shown = [(one.layers, one.target.sparsity, one.schedule, one.scope, one.start, one.end, one.every) for one in rules]
    assert shown == [
        (["layer1.0.conv1", "conv1"], 0.6, "one_shot", "global", 0, 0, 1),
        (["param:layer2.*.weight"], 0.75, "one_shot", "local", 0, 0, 1),
        (["linear"], 0.5, "linear", "global", 3, 9, 3),
        (["param:layer3.*.weight"], 0.8, "linear", "global", 3, 9, 3),
    ]
    assert rules[0].pattern == {"type": "block", "rows": 1, "columns": 4}
    assert rules[1].pattern == {"type": "n_of_m", "drop": 3, "of": 4}
    assert [one.criterion["type"] for one in rules] == ["obs", "fast_cap", "magnitude", "magnitude"]


HERE = Found("here", "GlobalMagnitudePruningModifier", GlobalPruning())
RATES = [
    (0.0, 5e-4), (1.0, (5e-4 + 1e-5) / 2), (1.9999, 1e-5), (2.0, 5e-4), (13.0, (5e-4 + 1e-5) / 2),
    (20.0, 2.5e-4), (25.0, 1.25e-4), (30.0, 0.0), (40.0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("epoch", "expected"), RATES)
def test_learning_rates_are_those_of_the_recipe(epoch, expected):
    assert load_recipe(DATA / "cap_gradual.yaml").rates.at(epoch) == pytest.approx(expected, abs=1e-7)


def test_a_rate_is_set_from_its_epoch_on_and_epochs_come_from_the_range_or_the_last_modifier():
    recipe = load_recipe(DATA / "mixed_one_shot.yaml")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    assert recipe.rates.apply(optimizer, 0.5) is None and optimizer.param_groups[0]["lr"] == 0.3
    assert recipe.rates.apply(optimizer, 1.0) == 0.01 and optimizer.param_groups[0]["lr"] == 0.01
    assert recipe.epochs == 9
    assert load_recipe(DATA / "cap_gradual.yaml").epochs == 30


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("__ALL_PRUNABLE__", None),
        (["__ALL__"], None),
        (["a.weight", "b.0.weight"], ["a", "b.0"]),
        (["re:.*weight"], ["param:.*weight"]),
        ([r"re:(blocks\.\d+\.fc1|head)\.weight"], [r"param:(blocks\.\d+\.fc1|head)\.weight"]),
        (["a.bias", "b.weight"], ["b"]),
        (["a"], ["a"]),
    ],
)
def test_parameters_are_read_as_layers(params, expected):
    assert layers_of(params, HERE) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unstructured", {"type": "unstructured"}),
        ([4, 1], {"type": "block", "rows": 4, "columns": 1}),
        ("block4", {"type": "block", "rows": 1, "columns": 4}),
        ("4x1", {"type": "block", "rows": 4, "columns": 1}),
        ("2:4", {"type": "n_of_m", "drop": 2, "of": 4}),
        ("1:16", {"type": "n_of_m", "drop": 15, "of": 16}),
    ],
)
def test_mask_types(text, expected):
    found, final = pattern_of(HERE, GlobalPruning(mask_type=text), None if ":" in str(text) else 0.5)
    assert found == expected
    assert final == (found["drop"] / found["of"] if "drop" in found else 0.5)


@pytest.mark.parametrize("text", ["4:4", "5:4", "0:4", "block8", "", "a:b", "0x4"])
def test_unknown_mask_types_are_refused(text):
    with pytest.raises(ConfigError, match="mask_type: .* is not known"):
        pattern_of(HERE, GlobalPruning(mask_type=text), 0.5)


@pytest.mark.parametrize(
    ("keys", "sparsity", "drop"),
    [
        ({"mask_type": "N:M", "n": 2, "m": 4}, 0.5, 2),
        ({"mask_type": "1:4"}, 0.75, 3),  # N stay
        ({"mask_type": "1:4"}, 0.25, 1),  # as CAP means it, N go
        ({"mask_type": "N:M", "n": 3, "m": 8}, None, 5),
    ],
)
def test_which_of_n_and_m_go_is_what_the_sparsity_says(keys, sparsity, drop):
    found, final = pattern_of(HERE, GlobalPruning(**keys), sparsity)
    assert found == {"type": "n_of_m", "drop": drop, "of": int(keys.get("m", 4))}
    assert final == drop / found["of"]


def test_a_sparsity_that_n_of_m_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"here.final_sparsity: 0.6 is not that of 1:4. Allowed: 0.75, or 0.25 for N"):
        pattern_of(HERE, GlobalPruning(mask_type="1:4"), 0.6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("eval(a * 2 + 1)", 7.0),
        ("eval(-(a - 1) / 4)", -0.5),
        ("eval(7 // 2)", 3),
        ("plain", "plain"),
        ("eval(a", "eval(a"),
    ],
)
def test_arithmetic_is_worked_out(text, expected):
    assert evaluated(text, "key", {"a": 3.0}) == expected


@pytest.mark.parametrize(
    "text", ["eval(b)", "eval(__import__('os'))", "eval(a.real)", "eval(1 / 0)", "eval(a a)", "eval(a**9)"]
)
def test_anything_but_arithmetic_is_refused(text):
    with pytest.raises(ConfigError, match="key: .eval"):
        evaluated(text, "key", {"a": 3.0})


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modifiers:\n  - !CAPruningModifer {final_sparsity: 0.5}\n", "'!CAPruningModifer' is not known"),
        ("modifiers:\n  - {final_sparsity: 0.5}\n", r"modifiers\[0\]: .* is not known"),
        ("modifiers:\n  - !CAPruningModifier {final_sparsities: 0.5}\n", "did you mean 'final_sparsity'"),
        ("modifiers:\n  - !CAPruningModifier {final_sparsity: 1.5}\n", "final_sparsity"),
        ("modifiers:\n  - !CAPruningModifier {params: [a]}\n", r"modifiers\[0\].final_sparsity: missing"),
        ("modifiers:\n  - !STRPruningModifier {params: [a]}\n", "learned thresholds are not supported"),
        ("modifiers:\n  - !StructuredPruningModifier {final_sparsity: 0.5}\n", "'channel' rules"),
        ("a_stage:\n  b_modifiers:\n    CAPModifier: {final_sparsity: 0.5}\n", "did you mean 'CAPruningModifier'"),
        ("modifiers:\n  - !CAPruningModifier {final_sparsity: 0.5, mask_type: 3:2}\n", "mask_type"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, text))


def test_what_differs_is_said(tmp_path, caplog):
    text = (
        "modifiers:\n  - !OBSPruningModifier {final_sparsity: 0.5, init_sparsity: 0.1, start_epoch: 0.5, end_epoch: 4, "
        "grad_sampler_kwargs: {batch_size: 2, num_workers: 4}, log_types: all}\n"
    )
    (rule,) = load_config(written(tmp_path, text)).rules
    assert (rule.start, rule.end, rule.every, rule.initial) == (0.5, 4, 1e-6, 0.1)  # every step
    said = [one.message for one in caplog.records if one.levelname == "WARNING"]
    assert said == [
        "modifiers[0].log_types is ignored: the loop logs",
        "modifiers[0].grad_sampler_kwargs.num_workers is ignored: the loader that is given decides",
    ]


def test_a_recipe_that_prunes_nothing_leaves_the_model_dense(tmp_path, caplog):
    text = "modifiers:\n  - !EpochRangeModifier {end_epoch: 3}\n  - !SetWeightDecayModifier {weight_decay: 0.1}\n"
    config = load_config(written(tmp_path, text))
    assert [one.enabled for one in config.rules] == [False]
    assert [one.message for one in caplog.records] == [
        "modifiers[1] (SetWeightDecayModifier) is ignored: the weight decay is the optimizer's",
        "recipe is ignored: no modifier in it prunes: the model stays dense",
    ]


GRADUAL = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 4}
  - !LearningRateFunctionModifier
    {start_epoch: 0, end_epoch: 4, lr_func: cyclic_linear, init_lr: 0.05, final_lr: 0.005, cycle_epochs: 1}
  - !KIND
    {params: ["re:.*weight"], final_sparsity: 0.6, start_epoch: 0, end_epoch: 2, update_frequency: 1,
     num_grads: 8, fisher_block_size: 32, grad_sampler_kwargs: {batch_size: 2}}
"""


@pytest.mark.parametrize("kind", ["CAPruningModifier", "OBSPruningModifier", "FastCAPruningModifier"])
def test_a_recipe_runs_gradually(tmp_path, kind):
    recipe = load_recipe(written(tmp_path, GRADUAL.replace("KIND", kind)))
    model, data = small_net(), batches(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pruner = Pruning(model, recipe.pruning, optimizer=optimizer)
    pruner.calibrate_with(data, cross_entropy)
    seen = []
    for epoch in range(recipe.epochs):
        pruner.prune(model, epoch)
        for number, (inputs, targets) in enumerate(data):
            seen.append(recipe.rates.apply(optimizer, epoch + number / len(data)))
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    assert seen == pytest.approx([0.05, 0.035, 0.02] * 4)
    assert zeros(model) == pytest.approx(0.6 * total(model), abs=5)


@pytest.mark.parametrize("leave_enabled", [True, False])
def test_masks_are_lifted_after_the_end_where_they_are_not_left_enabled(tmp_path, leave_enabled):
    text = GRADUAL.replace("KIND", "CAPruningModifier").replace(
        "final_sparsity", f"leave_enabled: {leave_enabled}, final_sparsity"
    )
    config = load_config(written(tmp_path, text))
    model, data = small_net(), batches(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = Pruning(model, config, optimizer=optimizer)
    pruner.calibrate_with(data, cross_entropy)
    levels = []
    for epoch in range(5):
        pruner.prune(model, epoch)
        levels.append(zeros(model) / total(model))
        for inputs, targets in data:
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    assert levels[2] == pytest.approx(0.6, abs=0.01)
    assert levels[4] == pytest.approx(0.6, abs=0.01) if leave_enabled else levels[4] < 0.2
    assert pruner.phase == "finetune"


def test_one_shot_and_fine_tuning_prunes_before_any_training(tmp_path):
    text = "modifiers:\n  - !CAPruningModifier {params: __ALL_PRUNABLE__, final_sparsity: 0.5, num_grads: 8}\n"
    config = load_config(written(tmp_path, text))
    model, data = small_net(), batches(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruning(model, config, optimizer=optimizer)
    assert zeros(model) == 0
    pruner.calibrate_with(data, cross_entropy)
    expected = one_shot(small_net(), config.rules[0], data, cross_entropy)[0.5]
    pairs = zip(layer_weights(model).values(), layer_weights(expected).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and zeros(model) == total(model) // 2
    for epoch in range(2):
        pruner.prune(model, epoch)
        for inputs, targets in data:
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        assert zeros(model) == total(model) // 2 and pruner.phase == "finetune"


def test_channels_are_never_released():
    with pytest.raises(ConfigError, match="release: True is not supported by the pattern 'channel'"):
        load_config({"rules": [{"release": True, "target": {"sparsity": 0.5}}]})


def test_a_recipe_runs_in_one_shot(tmp_path):
    text = 'modifiers:\n  - !CAPruningModifier {params: __ALL_PRUNABLE__, mask_type: "2:4", num_grads: 8}\n'
    (rule,) = load_config(written(tmp_path, text)).rules
    assert rule.target == Target(sparsity=0.5)
    model = one_shot(small_net(), rule, batches(), cross_entropy)[0.5]
    assert all(int((weight != 0).sum()) > 0 for weight in layer_weights(model).values())
    assert ((layer_weights(model)["hidden.weight"][:, :12].reshape(15, 3, 4) != 0).sum(-1) == 2).all()


def test_timm_models_run_by_name():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=4)
    text = {"modifiers": [{"!tag": "!CAPruningModifier", "params": ["re:blocks.*weight"], "final_sparsity": 0.5,
                           "num_grads": 4, "fisher_block_size": 48}]}  # fmt: skip
    (rule,) = load_config(text).rules
    data = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    out = one_shot(model, rule, data, cross_entropy)[0.5]
    weights = [p for name, p in out.named_parameters() if name.startswith("blocks") and p.dim() > 1]
    assert len(weights) == 4
    assert sum(int((p == 0).sum()) for p in weights) == sum(p.numel() for p in weights) // 2
