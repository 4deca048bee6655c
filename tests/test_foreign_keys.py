"""Every key of every other form, one at a time: it changes what the config means, or it is said, or refused, or it is
what would be without it."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from pruningawaretraining.config.dialects import intel_epochs, intel_keys, sirc_keys, sparseml_keys, sparseml_recipe
from pruningawaretraining.config.dialects.flat import FlatConfig
from pruningawaretraining.config.load import load_config
from pruningawaretraining.config.plan import noted
from pruningawaretraining.config.recipe import is_recipe, load_recipe
from pruningawaretraining.errors import ConfigError

Put = Callable[[dict[str, Any], str, Any], None]


NAMES = {
    "final_sparsity",
    "compression_sparsity",
    "end_epoch",
    "end_step",
    "target_sparsity",
    "global_sparsity",
    "reg_coeff",
}
"""Keys beside which another one may be out of place, and that messages then begin with."""


def meaning(mapping: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """What a config means, and what is said about it."""
    with noted() as notes:
        if is_recipe(mapping):
            recipe = load_recipe(mapping)
            return (recipe.pruning, recipe.epochs, recipe.rates, recipe.quantized), list(notes)
        return load_config(mapping), list(notes)


def check(base: Mapping[str, Any], put: Put, key: str, value: Any, no_news: bool) -> None:
    """A key is read: with it the config is another one, or a message names it."""
    without, _ = meaning(base)
    given = copy.deepcopy(dict(base))
    put(given, key, value)
    try:
        found, notes = meaning(given)
    except ConfigError as error:
        named = "|".join(NAMES | {key})
        assert re.match(rf"[^:]*(: )?\b({named})\b(\.\w+)?:", str(error)), str(error)
        return
    said = [note for note in notes if key in note.partition(" is ignored")[0]]
    assert (found != without) or said or no_news, f"{key}: {value!r} is dropped in silence"


# --- recipes ----------------------------------------------------------------------------------------------------------

GRADUAL = {"params": ["re:a.*"], "init_sparsity": 0.05, "final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 8,
           "update_frequency": 1}  # fmt: skip
PHASED = {"params": ["re:a.*"], "compression_sparsity": 0.8, "start_epoch": 0, "end_epoch": 40, "update_frequency": 4}
BASES: dict[type[Any], dict[str, Any]] = {
    sparseml_keys.AlternatingPruning: PHASED,
    sparseml_keys.CapAlternating: PHASED,
    sparseml_keys.RegrowingPruning: {
        "params": ["re:a.*"], "final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 8, "update_frequency": 1
    },
    sparseml_keys.OneShotPruning: {"sparsity": 0.5},
    sparseml_keys.WandaPruning: {"sparsity": 0.5},
    sparseml_keys.SetRate: {"learning_rate": 0.1, "start_epoch": 0},
    sparseml_keys.RateFunction: {
        "lr_func": "linear", "init_lr": 0.1, "final_lr": 0.0, "start_epoch": 0, "end_epoch": 10
    },
    sparseml_keys.RateSchedule: {
        "lr_class": "StepLR", "lr_kwargs": {"step_size": 1}, "init_lr": 0.1, "start_epoch": 0, "end_epoch": 10
    },
    sparseml_keys.EpochRange: {"end_epoch": 10},
    sparseml_keys.Distillation: {},
    sparseml_keys.Constant: {"params": ["re:a.*"]},
    sparseml_keys.Quantization: {"start_epoch": 2},
}  # fmt: skip
VALUES: dict[str, list[Any]] = {
    "start_epoch": [1, 0.5], "end_epoch": [3, 36], "params": [["re:b.*"], "__ALL__"],
    "init_sparsity": [0.3, "__FROM_PARAM__"], "final_sparsity": [0.7, {"0.6": ["a.weight"]}],
    "update_frequency": [0.5, 2], "inter_func": ["linear", "inverse_cubic"], "mask_type": ["block4", "2:4", [4, 1]],
    "n": [2], "m": [4], "global_sparsity": [True, False], "leave_enabled": [False], "score_type": ["movement"],
    "log_types": ["all"], "phased": [True], "num_grads": [16, {"0.5": 64}],
    "grad_sampler_kwargs": [{"batch_size": 8}, {"other": 1}], "damp": [1e-3], "fisher_block_size": [64],
    "num_recomputations": [3], "recomputation_inter_func": ["cubic"], "blocks_in_parallel": [4],
    "fisher_inv_device": ["cpu"], "traces_backup_dir": ["folder"], "block_size": [16],
    "use_gradient_buffering": [True], "grads_device": ["cpu"], "num_pages": [2], "available_devices": [["cpu"]],
    "block_implementation": ["auto"], "compression_sparsity": [0.6], "momentum_buffer_reset": [False],
    "dense_fraction": [0.25], "last_decompression_epochs": [3], "last_compression_epochs": [9], "rescale": [True],
    "init_update_fraction": [0.2], "sparsity_strategy": ["uniform"], "sparsity": [0.6], "mask_structure": ["2:4"],
    "targets": [["re:b.*"], ["Linear"]], "ignore": [["a"]], "dampening_frac": [0.02], "percdamp": [0.03],
    "sequential_update": [True], "target_ids": [["x"]], "preserve_sparsity_mask": [True], "learning_rate": [0.01],
    "param_groups": [[0]], "constant_logging": [True], "lr_func": ["cosine"], "init_lr": [0.2], "final_lr": [0.01],
    "cycle_epochs": [2], "cycle_mul": [0.5], "cycle_warmup": [0.5], "warmup": [0.25], "decay_rate": [0.5],
    "decay_epochs": [2], "lr_class": ["ExponentialLR"], "lr_kwargs": [{"gamma": 0.5}], "hardness": [0.3],
    "temperature": [3.0], "distill_output_keys": [[0]], "teacher_input_keys": [["a"]],
    "disable_quantization_observer_epoch": [4.0], "freeze_bn_stats_epoch": [4.0],
}  # fmt: skip
SCOPES = {"global_sparsity", "apply_globally"}
"""Keys of which one of two values is what would be without it."""


def recipe_cases() -> Iterator[Any]:
    for name, model in sparseml_recipe.MODIFIERS.items():
        base = BASES.get(model, GRADUAL)
        newer = [(new, old) for new, old in sparseml_recipe.NEWER.items() if new not in model.model_fields]
        keys = [(key, key) for key in model.model_fields] + [pair for pair in newer if pair[1] in model.model_fields]
        for key, older in keys:
            yield pytest.param(name, base, key, older, id=f"{name}-{key}")


@pytest.mark.parametrize(("name", "base", "key", "older"), list(recipe_cases()))
def test_keys_of_recipes(name: str, base: dict[str, Any], key: str, older: str) -> None:
    def put(mapping: dict[str, Any], key: str, value: Any) -> None:
        mapping["modifiers"][0].pop(older, None)
        mapping["modifiers"][0][key] = value
        if isinstance(value, dict) and older == "final_sparsity":
            mapping["modifiers"][0]["params"] = []

    extra = {"mask_type": "N:M", "init_sparsity": 0.5, "final_sparsity": 0.5, "n": 2, "m": 4}
    given = {"!tag": f"!{name}", **base, **({} if older not in ("n", "m") else extra)}
    news = 0
    for value in VALUES[older]:
        config = {"modifiers": [given]}
        if older in ("n", "m"):
            changed = copy.deepcopy(config)
            changed["modifiers"][0][key] = value + 1
            with pytest.raises(ConfigError, match="is not that of|is not known"):
                meaning(changed)
            continue
        without, _ = meaning(config)
        if key in SCOPES:
            changed = copy.deepcopy(config)
            put(changed, key, value)
            found, notes = meaning(changed)
            news += found != without or any(key in note for note in notes)
            continue
        check(config, put, key, value, no_news=False)
    assert news == (key in SCOPES), f"{key}: one value of it is the other scope"


@pytest.mark.parametrize("name", sparseml_recipe.MODIFIERS)
def test_an_end_before_the_start_is_refused_as_there(name: str) -> None:
    base = BASES.get(sparseml_recipe.MODIFIERS[name], GRADUAL)
    for start, end in (("start_epoch", "end_epoch"), ("start", "end")):
        bare = {key: value for key, value in base.items() if key not in ("start_epoch", "end_epoch")}
        with pytest.raises(ConfigError, match=rf"modifiers\[0\] \({name}\): {end}: 2 is before start_epoch"):
            meaning({"modifiers": [{"!tag": f"!{name}", **bare, start: 5, end: 2}]})


# --- channel_sparsity_args, slice_sparsity_args and the flat form -----------------------------------------------------

CHANNELS = {"global_prune_rate": 0.5, "start_epoch": 1, "end_epoch": 5, "layers": ["a"]}
METHODS: list[dict[str, Any]] = [
    {}, {"mac_target": 0.5}, {"prune_channels_at_init": True}, {"regularize": {"reg": 1e-3}},
    *({"pruning_method": name} for name in ("VBP", "NormNet", "LAMP", "Random", "BNScalePruner", "MACAwareImportance")),
]  # fmt: skip
OF_CHANNELS: dict[str, list[Any]] = {
    "is_prune": [False], "layers": [["b"]], "global_pruning": [False], "block_size": [4], "start_epoch": [2],
    "end_epoch": [6], "epoch_rate": [2], "global_prune_rate": [0.4], "max_pruning_rate": [0.6, 0.3],
    "mac_target": [0.7], "prune_at_target": [False], "reach_mac_target": [False], "log_str": ["x"],
    "pruning_method": ["Random", "VBP"], "prune_channels_at_init": [True], "infer": [True], "isomorphic": [True],
    "input_shape": [[1, 3, 8, 8]], "container": ["list"],
    "regularize": [{"reg": 2e-3}, {"gamma": 2.0}, {"mac_reg": 1.0}, {"alpha_shrinkage_reg": 2.0}],
    "MAC_params": [{"use_macs": True, "alpha": 0.3}, {"use_macs": False, "beta": 3}, {"type": "Mul"}],
    "schedule": ["geometric"], "pruning_schedule": ["geometric"], "verbose": [2],
    "importance_mode": ["weight_variance"], "norm_per_layer": [False], "group_reduction": ["sum", "max"],
    "similarity_discount": [True], "sparse_mode": ["gmp"], "epochs_ft": [2], "max_batches": [3],
    "bn_recalibration": [True], "bn_recalib_batches": [5], "no_compensation": [True], "fold_bn_before_prune": [True],
    "alpha": [0.5], "normalize_importance": [True], "wv_base_mode": ["x"], "mag_guided_delta": [1],
    "var_loss_weight": [1], "sparse_gmp_target": [1], "reparam_lambda": [1], "reparam_normalize": [1],
    "reparam_layers": [1], "reparam_entropy_lambda": [1], "reparam_during_pat": [1], "reparam_target": [1],
}  # fmt: skip
OF_SLICES: dict[str, list[Any]] = {
    "is_prune": [False], "layers": [["b"]], "block_size": [4], "depthwise_block_size": [4], "start_epoch": [2],
    "end_epoch": [6], "epoch_rate": [2], "prune_rate": [0.4, 0], "pruning_gradually": [True],
    "pruning_mode": ["Unprune"], "disable_first_index": [True], "pruning_method": ["L1"], "reg": [1e-3],
}  # fmt: skip
OF_FLAT: dict[str, list[Any]] = {
    "start_epoch": [1], "end_epoch": [6], "interval": [2], "global_sparsity": [0.4], "mac_target": [0.6],
    "layers_to_prune": [["b"]], "schedule": ["geometric"], "reset_optimizer": [True],
}  # fmt: skip


def in_section(section: str) -> Put:
    def put(mapping: dict[str, Any], key: str, value: Any) -> None:
        mapping[section][key] = value

    return put


@pytest.mark.parametrize("key", sirc_keys.ChannelArgs.model_fields)
def test_keys_of_channels(key: str) -> None:
    for other in METHODS:
        args = {**CHANNELS, **other}
        for value in OF_CHANNELS[key]:
            if args.get(key) != value:
                check({"channel_sparsity_args": args}, in_section("channel_sparsity_args"), key, value, no_news=False)


@pytest.mark.parametrize("key", sirc_keys.SliceArgs.model_fields)
def test_keys_of_slices(key: str) -> None:
    base = {"slice_sparsity_args": {"prune_rate": 0.5, "start_epoch": 1, "end_epoch": 5}}
    for value in OF_SLICES[key]:
        check(base, in_section("slice_sparsity_args"), key, value, no_news=False)


@pytest.mark.parametrize("key", FlatConfig.model_fields)
@pytest.mark.parametrize("base", [{"global_sparsity": 0.5, "end_epoch": 5}, {"mac_target": 0.5, "end_epoch": 5}])
def test_keys_of_the_flat_form(base: dict[str, Any], key: str) -> None:
    for value in OF_FLAT[key]:
        check(base, lambda mapping, key, value: mapping.update({key: value}), key, value, no_news=False)


# --- step-wise pattern pruning ----------------------------------------------------------------------------------------

OF_STEPS: dict[str, list[Any]] = {
    "start_step": [2], "end_step": [50, -1], "target_sparsity": [0.4, 0],
    "pruning_type": ["magnitude", "pattern_lock", "retrain_free", "block_mask", "snip_progressive"],
    "criterion_type": ["gradient"], "pattern": ["1x1", "2:4", "mha", "channelx1", "1xchannel"],
    "op_names": [["a"]], "pruning_op_types": [["Linear"]], "pruning_scope": ["local"], "pruning_frequency": [5],
    "max_sparsity_ratio_per_op": [0.95], "min_sparsity_ratio_per_op": [0.1], "sparsity_decay_type": ["cube"],
    "criterion_reduce_type": ["sum"], "reg_type": ["group_lasso"], "reg_coeff": [0.1],
    "parameters": [{"reg_coeff": 0.1}], "low_memory_usage": [True], "resume_from_pruned_checkpoint": [True],
    "excluded_op_names": [["a"]], "distill_loss_weight": [1.0], "backend": ["x"],
}  # fmt: skip
PRUNERS: list[dict[str, Any]] = [
    {}, {"pruning_type": "pattern_lock"}, {"pruning_type": "retrain_free", "pattern": "channelx1"},
    {"pruning_type": "block_mask"}, {"pattern": "mha"}, {"reg_type": "group_lasso"}, {"reg_coeff": 0.01},
    {"reg_type": "group_lasso", "reg_coeff": 0.01}, {"pattern": "2:4"}, {"end_step": 0},
]  # fmt: skip


@pytest.mark.parametrize("place", ["all", "one"])
@pytest.mark.parametrize("key", [key for key in intel_keys.Flat2x.model_fields if key != "pruning_configs"])
def test_keys_of_pruners(key: str, place: str) -> None:
    plain = "excluded_op_names" if key in intel_keys.EXCLUDING else intel_keys.SAME.get(key, key)
    if place == "one" and key not in intel_keys.PrunerKeys.model_fields:
        return
    for other in PRUNERS:
        own = {name: value for name, value in other.items() if name != plain}
        base = {"end_step": 20, "target_sparsity": 0.5, **own}
        base = base if place == "all" else {"backend": None, "pruning_configs": [base]}
        for value in OF_STEPS[plain]:
            target = {"all": lambda m: m, "one": lambda m: m["pruning_configs"][0]}[place]
            check(base, lambda m, k, v, at=target: at(m).update({k: v}), key, value, no_news=False)


OF_EPOCHS: dict[str, list[Any]] = {
    "start_epoch": [1], "end_epoch": [6], "initial_sparsity": [0.1], "target_sparsity": [0.5, 0],
    "update_frequency": [2, 1.5], "frequency": [2], "prune_type": ["gradient_sensitivity", "pattern_lock"],
    "names": [["a.weight"]], "pattern": ["tile_pattern_4x1"], "method": ["per_channel"],
    "parameters": [{"alpha": 0.2}, {"pattern": "4x1"}, {"target": 3}, {"stride": 3}, {"normalize": 1},
                   {"transpose": True}, {"importance_inputs": ["x"]}, {"importance_metric": "x"}],
}  # fmt: skip
KINDS: list[dict[str, Any]] = [
    {}, {"prune_type": "group_lasso", "parameters": {"alpha": 0.1}}, {"prune_type": "group_lasso"},
    {"prune_type": "gradient_sensitivity"}, {"prune_type": "pattern_lock"},
    {"prune_type": "gradient_sensitivity", "parameters": {"target": 2, "importance_inputs": ["head_mask"]}},
]  # fmt: skip


@pytest.mark.parametrize("place", ["section", "pruner"])
@pytest.mark.parametrize("key", intel_epochs.EpochPruner.model_fields)
def test_keys_of_the_older_section(key: str, place: str) -> None:
    if place == "section" and key not in intel_epochs.EpochKeys.model_fields:
        return

    def put(mapping: dict[str, Any], key: str, value: Any) -> None:
        section = mapping["pruning"]["approach"]["weight_compression"]
        at = section if place == "section" else section["pruners"][0]
        at[key] = {**at.get(key, {}), **value} if isinstance(value, dict) else value

    for other in KINDS:
        pruner = {"names": ["a.weight", "b.weight"], **other}
        base = {"pruning": {"approach": {"weight_compression": {"pruners": [pruner]}}}}
        for value in OF_EPOCHS[key]:
            inner = next(iter(value)) if isinstance(value, dict) else None
            no_news = other.get(key) == value or (inner == "importance_inputs" and "target" in str(other))
            if inner is None:
                check(base, put, key, value, no_news)
            else:
                check(base, lambda m, k, v: put(m, "parameters", v), inner, value, no_news)


def test_what_is_said_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    load_config({"channel_sparsity_args": {**CHANNELS, "epochs_ft": 2}})
    assert [one.levelno for one in caplog.records] == [logging.WARNING]
