"""Recipes of SparseML and of CAP: keys -> sparsity at each epoch or step, chosen layers and learning rates.

The numbers are those of the original's own arithmetic, worked out with its functions and written down here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from pruningawaretraining import Pruning, load_config
from pruningawaretraining.config.dialects.sparseml_keys import RateFunction, RateSchedule
from pruningawaretraining.config.rates import LearningRates
from pruningawaretraining.config.recipe import Quantized, load_recipe
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.errors import ConfigError

NAMES = r"re:(.*attn.[qkv].weight)|(.*attn.proj.weight)|(.*mlp.fc.*weight)"
ALL_OF_VIT = r"re:.*(attn.(qkv|proj)|mlp.fc\d+).weight"


def modifier(name: str = "GlobalMagnitudePruningModifier", **keys: Any) -> dict[str, Any]:
    return {"!tag": f"!{name}", "params": [ALL_OF_VIT], "inter_func": "linear", "update_frequency": 1, **keys}


def recipe(*modifiers: dict[str, Any]) -> PruningConfig:
    return load_config({"pruning_modifiers": list(modifiers)})


class Block(nn.Module):
    """A transformer block with timm's names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 32), "fc2": nn.Linear(32, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn["proj"](q * k.sigmoid() + v)
        return x + self.mlp["fc2"](self.mlp["fc1"](x).relu())


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(8, 8)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.patch_embed(x)))


def vit() -> Vit:
    torch.manual_seed(0)
    return Vit()


FROM_40 = {"init_sparsity": 0.4, "final_sparsity": 0.9, "start_epoch": 0, "end_epoch": 3}
TABLE: list[tuple[list[dict[str, Any]], int | None, dict[int, float]]] = [
    ([FROM_40], None, {0: 0.4, 1: 0.5666666667, 2: 0.7333333333, 3: 0.9}),
    ([{**FROM_40, "inter_func": "cubic"}], None, {0: 0.4, 1: 0.7518518519, 2: 0.8814814815, 3: 0.9}),
    ([{**FROM_40, "inter_func": "inverse_cubic"}], None, {0: 0.4, 1: 0.4632097676, 2: 0.5533193613, 3: 0.9}),
    ([{**FROM_40, "update_frequency": 2}], None, {0: 0.4, 2: 0.7333333333, 3: 0.9}),
    ([{**FROM_40, "init_sparsity": 0.9}], None, {0: 0.9}),
    ([{**FROM_40, "init_sparsity": 0.95}], None, {0: 0.9}),
    ([{**FROM_40, "init_sparsity": 0.9, "start_epoch": 2}], None, {2: 0.9}),
    ([{**FROM_40, "init_sparsity": 0.9, "end_epoch": 20, "update_frequency": 20}], None, {0: 0.9}),
    ([{**FROM_40, "init_sparsity": 0.0}], None, {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9}),
    ([{**FROM_40, "init_sparsity": "__FROM_PARAM__"}], None, {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9}),
    ([{**FROM_40, "init_sparsity": 0, "start_epoch": 2, "update_frequency": 0.5}], 4, {8: 0.0, 10: 0.45, 12: 0.9}),
    (
        [{**FROM_40, "init_sparsity": 0.05, "start_epoch": 1.0, "end_epoch": 10.0, "update_frequency": 0.5}],
        2,
        {step: 0.05 + 0.85 * (step - 2) / 18 for step in range(2, 21)},
    ),
    (
        [{"init_sparsity": 0.7, "final_sparsity": 0.97, "start_epoch": 0, "end_epoch": 0.75, "update_frequency": 0.25,
          "inter_func": "cubic"}],
        10,
        {0: 0.7, 3: 0.91168, 6: 0.96784, 8: 0.97},
    ),
    (
        [
            {"init_sparsity": 0.4, "final_sparsity": 0.6, "start_epoch": 0, "end_epoch": 40, "update_frequency": 20},
            {"init_sparsity": 0.6, "final_sparsity": 0.75, "start_epoch": 40, "end_epoch": 100, "update_frequency": 20},
            {"init_sparsity": 0.75, "final_sparsity": 0.9, "start_epoch": 100, "end_epoch": 280,
             "update_frequency": 20},
            {"init_sparsity": 0.9, "final_sparsity": 0.9, "start_epoch": 280, "end_epoch": 300, "update_frequency": 20},
        ],
        None,
        {0: 0.4, 20: 0.5, 40: 0.6, 60: 0.65, 80: 0.7, 100: 0.75, 120: 0.7666666667, 140: 0.7833333333, 160: 0.8,
         180: 0.8166666667, 200: 0.8333333333, 220: 0.85, 240: 0.8666666667, 260: 0.8833333333, 280: 0.9},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "steps", "expected"), TABLE, ids=range(len(TABLE)))
def test_sparsity_of_every_event(keys: list[dict[str, Any]], steps: int | None, expected: dict[int, float]) -> None:
    (rule,) = recipe(*(modifier(**one) for one in keys)).rules
    times = rule.timeline(steps)
    assert {now: times.sparsity(now) for now in times.events()} == pytest.approx(expected, abs=1e-6)
    assert rule.at_init == (expected == {0: 0.9})


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ([ALL_OF_VIT], {"qkv", "proj", "fc1", "fc2"}),
        ([NAMES], {"proj", "fc1", "fc2"}),  # [qkv] is one letter
        (["re:blocks.0.attn"], {"qkv", "proj"}),
        (["re:.*weight"], {"patch_embed", "qkv", "proj", "fc1", "fc2", "head"}),
        (["blocks.1.mlp.fc1.weight", "re:.*fc2.weight$"], {"fc1", "fc2"}),
        ("__ALL_PRUNABLE__", {"patch_embed", "qkv", "proj", "fc1", "fc2", "head"}),
    ],
)
def test_layers_are_chosen_by_the_names_of_their_weights(params: Any, expected: set[str]) -> None:
    config = recipe(modifier(params=params, init_sparsity=0.5, final_sparsity=0.5, start_epoch=0, end_epoch=1))
    pruner = Pruning(vit(), config)
    assert {name.split(".")[-2] for name in pruner.masks} == expected
    assert pruner.sparsity == pytest.approx(0.5, abs=1e-3)


def test_what_an_expression_matches_beside_weights_is_said(caplog: pytest.LogCaptureFixture) -> None:
    Pruning(vit(), recipe(modifier(params=["re:.*"], final_sparsity=0.5, start_epoch=0)))
    (warning,) = [one.message for one in caplog.records if one.levelname == "WARNING"]
    assert warning.startswith("pruning_modifiers[0]: its layers' expressions match 14 other parameters, which stay as")
    with pytest.raises(
        ConfigError,
        match=r"pruning_modifiers\[0\].params: 're:.*conv.*' matches no parameter. Parameters are: patch_embed.weight",
    ):
        Pruning(vit(), recipe(modifier(params=["re:.*conv.*"], init_sparsity=0.5, final_sparsity=0.5, start_epoch=0)))


def test_a_gradual_recipe_prunes_in_phases_and_leaves_what_later_ones_do_not_name() -> None:
    config = recipe(
        modifier(init_sparsity=0.5, final_sparsity=0.6, start_epoch=1, end_epoch=2),
        modifier(init_sparsity=0.6, final_sparsity=0.75, start_epoch=2, end_epoch=4),
        modifier(params=[NAMES], init_sparsity=0.75, final_sparsity=0.9, start_epoch=4, end_epoch=5),
        modifier(params=[NAMES], init_sparsity=0.9, final_sparsity=0.9, start_epoch=5, end_epoch=6),
    )
    assert len(config.rules) == 1 and len(config.rules[0].phases) == 3
    model = vit()
    pruner = Pruning(model, config)
    groups = {"qkv": r"attn.qkv.weight", "rest": r"(attn.proj|mlp.fc\d).weight"}
    counts = dict.fromkeys(groups, 0)
    levels = []
    for epoch in range(7):
        pruner.prune(model, epoch)
        weights = dict(model.named_parameters())
        for group in groups:
            chosen = [weight for name, weight in weights.items() if ("qkv" in name) == (group == "qkv")]
            chosen = [weight for weight in chosen if weight.dim() == 2 and weight.shape not in ((8, 8), (4, 8))] + [
                weights[f"blocks.{number}.attn.proj.weight"] for number in (0, 1) if group == "rest"
            ]
            counts[group] = sum(int((weight == 0).sum()) for weight in chosen)
        levels.append(counts["qkv"] + counts["rest"])
    total = 2 * (192 + 64 + 256 + 256)
    assert levels[:5] == [int(share * total) for share in (0, 0.5, 0.6, 0.675)] + [levels[4]]
    assert levels[4] >= int(0.75 * total)
    assert counts["rest"] == int(0.9 * 2 * (64 + 256 + 256))


RATES: list[tuple[dict[str, Any], int, dict[float, float]]] = [
    (
        {"lr_func": "linear", "end_epoch": 8, "cycle_epochs": 2},
        10,
        {0.0: 0.05, 1.0: 0.0242105263, 1.9: 0.001, 2.0: 0.05, 7.9: 0.001, 8.0: 0.001},
    ),
    (
        {"lr_func": "cosine", "end_epoch": 8, "cycle_epochs": 2},
        10,
        {0.0: 0.05, 1.0: 0.0255, 1.9: 0.00130163565541, 2.0: 0.05, 3.0: 0.0255},
    ),
    ({"lr_func": "linear", "end_epoch": 4}, 5, {0.0: 0.05, 2.0: 0.0242105263, 3.8: 0.001}),
    (
        {"lr_func": "linear", "end_epoch": 6, "cycle_epochs": 2, "cycle_mul": 0.5},
        4,
        {0.0: 0.05, 1.75: 0.001, 2.0: 0.025, 3.75: 0.0005, 4.0: 0.0125, 6.0: 0.00025},
    ),
    (
        {"lr_func": "linear", "end_epoch": 4, "cycle_epochs": 2, "warmup": 0.5},
        8,
        {0.0: 0.0, 0.25: 0.0217333333, 0.5: 0.0369333333, 2.25: 0.0217333333},
    ),
    ({"lr_func": "linear", "end_epoch": 5, "cycle_epochs": 2}, 4, {4.0: 0.05, 4.25: 0.022, 4.75: 0.022}),
    ({"lr_func": "cyclic_linear", "end_epoch": 5, "cycle_epochs": 2}, 4, {4.0: 0.05, 4.25: 0.0336666667, 4.75: 0.001}),
    (
        {"lr_func": "exponential", "end_epoch": 4, "cycle_epochs": 2, "decay_rate": 0.1, "decay_epochs": 1.0},
        4,
        {0.0: 0.05, 0.5: 0.0158113883, 1.75: 0.001, 2.0: 0.05, 2.5: 0.0158113883},
    ),
    (
        {"lr_func": "step", "end_epoch": 4, "cycle_epochs": 2, "decay_rate": 0.5, "decay_epochs": 0.5},
        4,
        {0.0: 0.05, 0.25: 0.05, 0.5: 0.025, 1.75: 0.00625, 2.25: 0.05},
    ),
]


@pytest.mark.parametrize(("keys", "steps", "expected"), RATES, ids=range(len(RATES)))
def test_learning_rates(keys: dict[str, Any], steps: int, expected: dict[float, float]) -> None:
    rates = LearningRates((RateFunction(**{"init_lr": 0.05, "final_lr": 0.001, "start_epoch": 0, **keys}),), cap=True)
    assert {epoch: rates.at(epoch, steps) for epoch in expected} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"lr_class": "StepLR", "lr_kwargs": {"step_size": 2, "gamma": 0.5}}, [0.1, 0.1, 0.05, 0.05, 0.025]),
        (
            {"lr_class": "MultiStepLR", "lr_kwargs": {"milestones": [1, 4], "gamma": 0.1}},
            [0.1, 0.01, 0.01, 0.01, 0.001],
        ),
        ({"lr_class": "ExponentialLR", "lr_kwargs": {"gamma": 0.9}}, [0.1, 0.09, 0.081, 0.0729, 0.06561]),
        (
            {"lr_class": "CosineAnnealingWarmRestarts", "lr_kwargs": {"lr_min": 0.02, "cycle_epochs": 2}},
            [0.1, 0.06, 0.1, 0.06, 0.1],
        ),
    ],
)
def test_schedulers_of_pytorch(keys: dict[str, Any], expected: list[float]) -> None:
    rates = LearningRates((RateSchedule(init_lr=0.1, start_epoch=0, end_epoch=10, **keys),))
    assert [rates.at(epoch) for epoch in range(5)] == pytest.approx(expected, abs=1e-9)


def test_criteria_of_the_same_family() -> None:
    common = {"init_sparsity": 0.5, "final_sparsity": 0.5, "start_epoch": 0, "end_epoch": 1}
    found = {
        name: (rule.criterion, rule.scope)
        for name, keys in {
            "MFACPruningModifier": {"num_grads": 16, "damp": "1e-6", "fisher_block_size": 64, "global_sparsity": True},
            "GWProdPruningModifier": {"num_grads": 16, "global_sparsity": True},
            "GMPruningModifier": {},
            "MagnitudePruningModifier": {},
            "GlobalMagnitudePruningModifier": {},
            "MovementPruningModifier": {},
            "OBSPruningModifier": {"recomputation_inter_func": "cubic", "num_recomputations": 3},
            "FastCAPruningModifier": {"damp": 0.01},
        }.items()
        for rule in recipe(modifier(name, **common, **keys)).rules
    }
    magnitude = {"type": "magnitude", "p": 1.0, "normalize": "none"}
    places = {"blocks_in_parallel": None, "fisher_inv_device": None, "traces_backup_dir": None, "micro_batch": None}
    assert found == {
        "MFACPruningModifier": (
            {"type": "obs", "num_grads": 16, "damp": 1e-6, "fisher_block_size": 64, "num_recomputations": 1, **places},
            "global",
        ),
        "GWProdPruningModifier": ({"type": "snip", "momentum": 1.0}, "global"),
        "GMPruningModifier": (magnitude, "local"),
        "MagnitudePruningModifier": (magnitude, "local"),
        "GlobalMagnitudePruningModifier": (magnitude, "global"),
        "MovementPruningModifier": ({"type": "movement"}, "local"),
        "OBSPruningModifier": (
            {
                "type": "obs",
                "num_grads": 1024,
                "fisher_block_size": 50,
                "num_recomputations": 3,
                "recomputation_schedule": "cubic",
                **places,
            },
            "global",
        ),
        "FastCAPruningModifier": (
            {
                "type": "fast_cap",
                "num_grads": 1024,
                "fisher_block_size": 50,
                "num_recomputations": 1,
                "micro_batch": None,
                "damp": 0.01,
            },
            "local",
        ),
    }


def test_acdc_and_rigl_are_dynamics() -> None:
    acdc = {"compression_sparsity": 0.8, "start_epoch": 0, "end_epoch": 10, "update_frequency": 2}
    rigl = {
        "final_sparsity": 0.75,
        "start_epoch": 0,
        "end_epoch": 3,
        "update_frequency": 1,
        "init_update_fraction": 0.2,
    }
    params = [ALL_OF_VIT]
    (alternating,) = recipe({"!tag": "!ACDCPruningModifier", "params": params, **acdc}).rules
    model = vit()
    pruner = Pruning(model, PruningConfig(rules=[alternating]))
    shares = []
    for epoch in range(10):
        pruner.prune(model, epoch)
        shares.append(round(pruner.sparsity, 2))
    assert shares == [0, 0, 0.8, 0.8, 0, 0, 0.8, 0.8, 0.8, 0.8]  # floor(epoch / 2) odd, or in the last phase
    short = recipe({"!tag": "!ACDCPruningModifier", "params": params, **acdc, "end_epoch": 2}).rules[0]
    assert short.timeline().events() == [0]
    (growing,) = recipe({"!tag": "!RigLPruningModifier", "params": params, **rigl}).rules
    assert growing.dynamic == {"type": "regrow", "by": "gradient", "fraction": 0.2, "layers": "erk"}
    assert growing.timeline().events() == [0, 1, 2, 3] and growing.target.sparsity == 0.75


def test_constant_modifiers_keep_the_zeros_that_are_there() -> None:
    model = vit()
    with torch.no_grad():
        model.blocks[0].mlp["fc1"].weight[:8] = 0
    config = load_config({"modifiers": [{"!tag": "!ConstantPruningModifier", "params": ["re:.*fc.*weight"]}]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    pruner = Pruning(model, config, optimizer=optimizer)
    for _ in range(3):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    weight = model.blocks[0].mlp["fc1"].weight
    assert int((weight == 0).sum()) == 64 and not weight[:8].any()
    assert pruner.sparsity == pytest.approx(64 / (4 * 256))


def test_a_constant_modifier_after_pruning_adds_nothing(caplog: pytest.LogCaptureFixture) -> None:
    constant = {"!tag": "!ConstantPruningModifier", "params": [ALL_OF_VIT], "start_epoch": 5}
    config = recipe(modifier(**FROM_40), constant)
    assert len(config.rules) == 1
    assert "pruning_modifiers[1] is ignored: the modifiers before it keep their zeros for good" in caplog.text
    rules = recipe(modifier(**FROM_40), {**constant, "params": ["re:.*weight"]}).rules
    assert rules[1].mode == "lock" and rules[1].exclude == [f"?param:{ALL_OF_VIT[3:]}"]
    pruner = Pruning(vit(), PruningConfig(rules=rules))
    assert {name.split(".")[-2] for name in pruner.masks} == {"patch_embed", "qkv", "proj", "fc1", "fc2", "head"}


DISTILLED = """
training_modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: &end 8}
  - !DistillationModifier {hardness: 0.25, temperature: 5.5, distill_output_keys: [logits]}
  - !QuantizationModifier {start_epoch: 6, disable_quantization_observer_epoch: 7, ignore: [head], submodules: [blocks]}
pruning_modifiers:
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: eval(first)
    final_sparsity: 0.8
    start_epoch: 0
    end_epoch: *end
    update_frequency: 1
"""


def test_distillation_quantization_and_variables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(DISTILLED, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"eval\(first\).*load_config\(file, variables="):
        load_config(path)
    found = load_recipe(path, variables={"first": 0.2})
    assert found.quantized == Quantized(6.0, 7.0, None) and found.epochs == 8
    assert found.pruning.distillation is not None
    assert (found.pruning.distillation.weight, found.pruning.distillation.temperature) == (0.25, 5.5)
    assert "0.75 * loss + pruner.distill_loss(outputs, inputs)" in caplog.text
    assert load_config(path, variables={"first": 0.2}).rules[0].initial == 0.2
    markdown = tmp_path / "recipe.md"
    markdown.write_text(f"---\n{DISTILLED}---\n# A recipe\n\nWith words.\n", encoding="utf-8")
    assert load_config(markdown, variables={"first": 0.2}) == load_config(path, variables={"first": 0.2})


STAGES = """
first_stage:
  run_type: oneshot
  obcq_modifiers:
    SparseGPTModifier:
      {sparsity: 0.5, block_size: 128, percdamp: 0.02, mask_structure: "0:0", targets: ["re:blocks.\\\\d+$"]}
    GPTQModifier: {block_size: 128}
train_stage:
  run_type: train
  pruning_modifiers:
    ConstantPruningModifier: {targets: __ALL__, start: 0}
second_stage:
  run_type: oneshot
  obcq_modifiers:
    SparseGPTModifier:
      {sparsity: 0.7, block_size: 128, percdamp: 0.02, mask_structure: "0:0", targets: ["re:blocks.\\\\d+$"]}
"""


def test_stages_without_tags_are_phases() -> None:
    config = load_config(yaml.safe_load(STAGES))
    pruned, locked = config.rules
    assert pruned.criterion == {"type": "sparse_gpt", "damp": 0.02} and pruned.layers == [r"in:blocks.\d+$"]
    times = pruned.timeline()
    assert {now: times.sparsity(now) for now in times.events()} == {0: 0.5, 1: 0.7}
    assert locked.mode == "lock" and locked.layers is None and locked.exclude == [r"?in:blocks.\d+$"]
    model = vit()
    pruner = Pruning(model, config)
    pruner.calibrate_with([(torch.randn(16, 8), torch.zeros(16, 4))], nn.functional.mse_loss)
    shares = []
    for epoch in range(2):
        pruner.prune(model, epoch)
        shares.append(float((model.blocks[1].mlp["fc1"].weight == 0).float().mean()))
    assert shares == pytest.approx([0.5, 0.7], abs=1 / 256)


def test_newer_names_of_keys() -> None:
    nested = {
        "test_stage": {
            "pruning_modifiers": {
                "MagnitudePruningModifier": {
                    "init_sparsity": 0.1,
                    "final_sparsity": 0.5,
                    "start": 1,
                    "end": 3,
                    "update_frequency": 1,
                    "update_scheduler": "linear",
                    "targets": ["head.weight"],
                    "mask_structure": "unstructured",
                    "leave_enabled": True,
                },
                "WandaPruningModifier": {
                    "sparsity": 0.5,
                    "mask_structure": "2:4",
                    "targets": ["Linear"],
                    "ignore": ["head"],
                },
            }
        }
    }
    magnitude, wanda = load_config(nested).rules
    times = magnitude.timeline()
    assert {now: times.sparsity(now) for now in times.events()} == pytest.approx({1: 0.1, 2: 0.3, 3: 0.5})
    assert magnitude.layers == ["head"] and magnitude.scope == "local"
    assert wanda.pattern == {"type": "n_of_m", "drop": 2, "of": 4, "types": ["Linear"]}
    assert (wanda.criterion, wanda.layers, wanda.exclude) == ({"type": "wanda"}, None, ["?head"])


def test_block4_pads_a_convolution_with_three_inputs() -> None:
    torch.manual_seed(0)
    for name in ("GlobalMagnitudePruningModifier", "OBSPruningModifier", "CAPruningModifier"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 3))
        keys = {"params": "__ALL_PRUNABLE__", "mask_type": "block4", "init_sparsity": 0.5, "final_sparsity": 0.5}
        sampled = {"num_grads": 4, "fisher_block_size": 8} if name != "GlobalMagnitudePruningModifier" else {}
        config = recipe(modifier(name, start_epoch=0, end_epoch=1, **keys, **sampled))
        pruner = Pruning(model, config)
        pruner.calibrate_with(
            [(torch.randn(4, 3, 6, 6), torch.zeros(4, dtype=torch.long))], nn.functional.cross_entropy
        )
        blocks = (model[0].weight != 0).permute(0, 2, 3, 1).any(-1)
        assert torch.equal((model[0].weight != 0).permute(0, 2, 3, 1).all(-1), blocks), name
        assert pruner.sparsity == pytest.approx(0.5, abs=0.02)


def test_an_update_frequency_of_minus_one_is_every_step() -> None:
    keys = {"init_sparsity": 0.2, "final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 2, "inter_func": "linear"}
    rule = recipe(modifier("GMPruningModifier", params=["re:.*weight"], update_frequency=-1, **keys)).rules[0]
    times = rule.timeline(steps=3)
    assert times.counts == "step" and times.events() == [0, 1, 2, 3, 4, 5, 6]
    assert [times.sparsity(now) for now in times.events()] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])


def test_a_later_modifier_that_begins_lower_keeps_what_is_there() -> None:
    first = {"init_sparsity": 0.1, "final_sparsity": 0.5, "start_epoch": 0, "end_epoch": 2}
    second = {"init_sparsity": 0.0, "final_sparsity": 0.6, "start_epoch": 2, "end_epoch": 4}
    rule = recipe(modifier("GMPruningModifier", **first), modifier("GMPruningModifier", **second)).rules[0]
    times = rule.timeline()
    assert [times.sparsity(now) for now in range(5)] == pytest.approx([0.1, 0.3, 0.5, 0.5, 0.6])


@pytest.mark.parametrize(("length", "end", "epochs"), [(5, 9, 9), (9, 5, 9), (5, 8.5, 9), (5, -1, 5)])
def test_a_modifier_that_ends_after_the_epoch_range_makes_the_training_longer(
    length: float, end: float, epochs: int, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
modifiers:
  - !EpochRangeModifier {{start_epoch: 0, end_epoch: {length}}}
  - !GMPruningModifier {{params: __ALL__, init_sparsity: 0.2, final_sparsity: 0.5, start_epoch: 2, end_epoch: {end}}}
""",
        encoding="utf-8",
    )
    assert load_recipe(path).epochs == epochs
