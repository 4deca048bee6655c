"""Configs: the native form, the two foreign ones, how files are found and read, and what is said about mistakes."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml

from pruningawaretraining import registry
from pruningawaretraining.config import ExampleInputs, PruningConfig, Rule, Target, json_schema, load_config
from pruningawaretraining.config.dialects.base import TAG, native
from pruningawaretraining.errors import ConfigError

DATA = Path(__file__).parent / "data"
SIRC = DATA / "channel_and_slice" / "pruning_config.json"
FLAT = DATA / "flat.json"
NATIVE = DATA / "native.yaml"

HALF = {"target": {"sparsity": 0.5}}


@dataclass(frozen=True)
class Magnitude:
    """Size of the weights, as in :class:`Size`.

    More about it.

    Args:
        p: the power;
            2 for L2.
        normalize: by what.
    """

    p: int = 2
    normalize: Literal["mean", "none"] = "none"


@dataclass(frozen=True)
class Gone:
    strength: float

    def __post_init__(self) -> None:
        if self.strength <= 0:
            raise ValueError(f"strength: {self.strength} is not above 0")

    def prepare(self, grouping: Any, saving_G: Any = None) -> None: ...


@dataclass(frozen=True)
class Channel:
    """Channels."""

    def build(self, model: Any, layers: Any = None, exclude: Any = ()) -> None: ...


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry with one of each kind, beside the schedules and the dialects."""
    kept = {kind: dict(registry._ENTRIES[kind]) for kind in ("schedule", "dialect")}
    monkeypatch.setattr(registry, "_ENTRIES", kept)
    monkeypatch.setattr(registry, "_ALIASES", {"schedule": dict(registry._ALIASES["schedule"])})
    registry.register("criterion", "magnitude", "l2")(Magnitude)
    registry.register("regularizer", "gone")(Gone)
    registry.register("pattern", "channel")(Channel)
    for scope in ("global", "local", "isomorphic"):
        registry.register("scope", scope)(Channel)


def sirc(section: str = "channel_sparsity_args", **changes: Any) -> dict[str, Any]:
    """The seed's config reduced to one section, with some of its keys changed; a key set to ``...`` is left out."""
    args = json.loads(SIRC.read_text())[section] | changes
    return {section: {key: value for key, value in args.items() if value is not ...}}


def problems(source: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    return str(caught.value).splitlines()


# --- files that must load as they are -------------------------------------------------------------

CHANNELS = {
    "name": "channels",
    "pattern": "channel",
    "layers": ["conv1", "layer1.0.conv1", "layer2.0.conv1"],
    "exclude": [],
    "criterion": {"type": "magnitude", "p": 2, "normalize": "mean"},
    "schedule": "linear",
    "scope": "global",
    "allocation": None,
    "compensation": "none",
    "start": 5,
    "end": 50,
    "every": 5,
    "hold": None,
    "unit": "epoch",
    "steps_per_epoch": None,
    "initial": None,
    "stable": None,
    "phases": [],
    "target": Target(macs=0.7).model_dump(),
    "sparsity_per_layer": None,
    "keep_per_layer": None,
    "final_sparsity": 1.0,
    "widths": "free",
    "dynamic": "frozen",
    "min_sparsity": 0.0,
    "max_sparsity": 0.9,
    "max_sparsity_from": None,
    "multiple": 8,
    "application": "mask",
    "regularizer": {"type": "growing_l2", "strength": 5e-4, "gamma": 1.0, "alpha": 4.0, "mac_strength": 0.001},
    "at_init": False,
    "enabled": True,
    "mode": "prune",
    "keep_zeros": False,
    "nested": False,
    "release": False,
    "progressive": 1,
}
SLICES = CHANNELS | {
    "final_sparsity": None,
    "name": "slices",
    "pattern": {
        "type": "slice",
        "block_size": 8,
        "depthwise_block_size": 2,
        "first_tap": True,
        "order": "interleaved",
    },
    "layers": None,
    "criterion": {"type": "magnitude", "p": 2},
    "scope": "local",
    "start": 52,
    "end": 60,
    "every": 2,
    "target": Target(sparsity=0.5).model_dump(),
    "max_sparsity": 1.0,
    "multiple": 1,
    "regularizer": {"type": "slice_penalty", "strength": 1e-5},
}
FLAT_RULE = CHANNELS | {
    "name": None,
    "layers": ["conv1", "layer2", "layer3"],
    "criterion": "magnitude",
    "max_sparsity": 1.0,
    "multiple": 1,
    "regularizer": None,
}
EXPECTED = {
    SIRC: {
        "rules": [CHANNELS, SLICES],
        "example_inputs": {"shape": [1, 3, 32, 32], "container": None, "dtype": "float32"},
        "infer": False,
        "reset_optimizer": False,
        "trace_limit": 60.0,
        "distillation": None,
        "recovery": None,
    },
    FLAT: {
        "rules": [FLAT_RULE],
        "example_inputs": None,
        "infer": False,
        "reset_optimizer": False,
        "trace_limit": 60.0,
        "distillation": None,
        "recovery": None,
    },
}


@pytest.mark.parametrize("file", [SIRC, FLAT])
def test_foreign_file_by_path_folder_and_mapping(file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    mapping = json.loads(before)
    given = copy.deepcopy(mapping)
    (tmp_path / "pruning_config.json").write_bytes(before)
    for source in (file, str(file), tmp_path, str(tmp_path), mapping):
        assert load_config(source).model_dump() == EXPECTED[file]
    assert mapping == given
    assert file.read_bytes() == (tmp_path / "pruning_config.json").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["pruning_config.json"]


@pytest.mark.parametrize("file", [SIRC, FLAT])
@pytest.mark.parametrize("extension", ["yaml", "yml"])
def test_foreign_file_in_yaml(file: Path, extension: str, tmp_path: Path) -> None:
    written = tmp_path / f"pruning_config.{extension}"
    written.write_text(yaml.safe_dump(json.loads(file.read_text())))
    assert load_config(tmp_path).model_dump() == EXPECTED[file]


def test_native_file() -> None:
    config = load_config(NATIVE)
    assert [rule.name for rule in config.rules] == ["stem", "rest"]
    stem, rest = config.rules
    assert (stem.layers, stem.exclude, stem.schedule, stem.start, stem.end) == (["conv1"], [], "cubic", 0, None)
    assert (rest.layers, rest.exclude) == ([r"re:layer\d\..*", "layer4"], ["layer1.0"])
    assert rest.target == Target(sparsity=0.9, macs=0.5)
    assert rest.regularizer == {"type": "growing_l2", "strength": 5e-4}, "5e-4 is a number, in YAML too"
    assert config.example_inputs == ExampleInputs(shape=[[1, 3, 32, 32], [1, 10]], container="tuple")


def test_config_is_given_back_and_survives_a_round_trip() -> None:
    config = load_config(NATIVE)
    assert load_config(config) is config
    assert load_config(json.loads(config.model_dump_json())) == config
    assert load_config({"$schema": "./schema.json", **config.model_dump()}) == config


def test_defaults() -> None:
    rule = load_config({"rules": [HALF]}).rules[0]
    assert rule.model_dump() == CHANNELS | {
        "name": None,
        "final_sparsity": None,
        "layers": None,
        "criterion": "magnitude",
        "start": 0,
        "end": None,
        "every": 1,
        "target": Target(sparsity=0.5).model_dump(),
        "max_sparsity": 1.0,
        "max_sparsity_from": None,
        "multiple": 1,
        "regularizer": None,
    }


def test_mapping_is_not_shared() -> None:
    source = {"rules": [{**HALF, "criterion": {"type": "magnitude"}, "layers": ["module.conv1"]}]}
    given = copy.deepcopy(source)
    rule = load_config(source).rules[0]
    assert rule.layers == ["conv1"]
    assert isinstance(rule.criterion, dict)
    rule.criterion["type"] = "changed"
    assert source == given


# --- what the keys of channel_sparsity_args mean --------------------------------------------------

GROUP_NORM = {"type": "magnitude", "p": 2, "normalize": "mean"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"is_prune": False}, {"enabled": False}),
        ({"is_prune": False, "mac_target": ..., "global_prune_rate": ..., "layers": []}, {"enabled": False}),
        ({"is_prune": ...}, {"enabled": True}),
        ({"layers": ...}, {"layers": None}),
        ({"layers": ["module.a", "re:b.*"]}, {"layers": ["a", "re:b.*"]}),
        ({"global_pruning": False}, {"scope": "local"}),
        ({"isomorphic": True}, {"scope": "isomorphic"}),
        ({"isomorphic": True, "global_pruning": False}, {"scope": "local"}),
        ({"block_size": 16}, {"multiple": 16}),
        ({"start_epoch": 2, "end_epoch": 9, "epoch_rate": 3}, {"start": 2, "end": 9, "every": 3}),
        ({"start_epoch": -1}, {"start": -1}),
        ({"end_epoch": ...}, {"end": None}),
        ({"mac_target": ...}, {"target": Target(sparsity=0.6)}),
        ({"mac_target": None}, {"target": Target(sparsity=0.6)}),
        ({"mac_target": 0.0}, {"target": Target(sparsity=0.6)}),
        ({"prune_at_target": True, "epochs_ft": 3, "bn_recalibration": True, "max_batches": 9}, {"name": "channels"}),
        ({"pruning_method": "NormNet"}, {"criterion": "variance_next"}),
        ({"pruning_method": "VBP", "importance_mode": "tp_variance"}, {"criterion": "variance_magnitude"}),
        (
            {"pruning_method": "VBP", "norm_per_layer": True},
            {"criterion": {"type": "variance", "normalize": "mean"}},
        ),
        (
            {"pruning_method": "GroupNormPruner", "norm_per_layer": False},
            {"criterion": {"type": "magnitude", "p": 2, "normalize": "none"}},
        ),
        ({"global_prune_rate": ...}, {"target": Target(macs=0.7), "final_sparsity": 1.0}),
        ({"global_prune_rate": 0}, {"target": Target(macs=0.7)}),
        ({"max_pruning_rate": ...}, {"max_sparsity": 1.0}),
        ({"schedule": "geometric"}, {"schedule": "exponential"}),
        ({"pruning_schedule": "cubic"}, {"schedule": "cubic"}),
        (
            {"prune_channels_at_init": True},
            {"application": "remove", "at_init": True, "schedule": "one_shot", "start": 5, "end": 5},
        ),
        ({"regularize": ...}, {"regularizer": None}),
        ({"regularize": {"reg": 0, "mac_reg": 0.1}}, {"regularizer": None}),
        (
            {"regularize": {"reg": 0.05}},
            {"regularizer": {"type": "growing_l2", "strength": 0.05, "gamma": 1.0, "alpha": 4.0, "mac_strength": 0.0}},
        ),
        (
            {"regularize": {"reg": 0.05, "gamma": 2, "alpha_shrinkage_reg": 3}, "pruning_method": "groupnormpruner"},
            {"regularizer": {"type": "growing_l2", "strength": 0.05, "gamma": 2.0, "alpha": 3.0, "mac_strength": 0.0}},
        ),
        (
            {"pruning_method": "BNScalePruner"},
            {"criterion": "bn_scale", "regularizer": {"type": "bn_scale", "strength": 5e-4}},
        ),
        ({"pruning_method": "VBP"}, {"criterion": "variance"}),
        ({"pruning_method": "LAMP"}, {"criterion": "lamp"}),
        ({"pruning_method": "Random"}, {"criterion": "random"}),
        ({"pruning_method": "MACAwareImportance"}, {"criterion": GROUP_NORM}),
        (
            {"pruning_method": "MACAwareImportance", "MAC_params": ...},
            {"criterion": {"type": "mac_aware", "base": GROUP_NORM, "mode": "sum"}},
        ),
        (
            {"pruning_method": "MACAwareImportance", "MAC_params": {"use_macs": True, "alpha": 0.3, "beta": 2}},
            {"criterion": {"type": "mac_aware", "base": GROUP_NORM, "mode": "sum", "alpha": 0.3, "beta": 2.0}},
        ),
        (
            {"pruning_method": "Random", "MAC_params": {"use_macs": True, "type": "Mul", "beta": 3}},
            {"criterion": {"type": "mac_aware", "base": "random", "mode": "mul", "beta": 3.0}},
        ),
        (
            {"MAC_params": {"use_macs": True, "type": "per_mac"}},
            {"criterion": {"type": "mac_aware", "base": GROUP_NORM, "mode": "per_mac"}},
        ),
    ],
)
def test_channel_keys(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    (rule,) = load_config(sirc(**changes)).rules
    assert {key: getattr(rule, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "shape", "container"),
    [
        ({"input_shape": [2, 3, 8, 8]}, [2, 3, 8, 8], None),
        ({"input_shape": [[1, 3, 8, 8], [1, 4]]}, [[1, 3, 8, 8], [1, 4]], None),
        ({"input_shape": [[1, 3, 8, 8], [1, 4]], "container": "tuple"}, [[1, 3, 8, 8], [1, 4]], "tuple"),
    ],
)
def test_input_shape(changes: dict[str, Any], shape: list[Any], container: str | None) -> None:
    assert load_config(sirc(**changes)).example_inputs == ExampleInputs(shape=shape, container=container)


def test_infer_and_no_input_shape() -> None:
    config = load_config(sirc(infer=True, input_shape=...))
    assert config.infer
    assert config.example_inputs is None


def test_state_in_the_file_is_ignored_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pruningawaretraining"):
        config = load_config(sirc(reach_mac_target=True, log_str={"pruned": [1]}, verbose=2))
    assert config.rules[0] == load_config(SIRC).rules[0]
    for key in ("reach_mac_target", "log_str", "verbose", "global_prune_rate"):
        assert f"channel_sparsity_args.{key} is ignored" in caplog.text


# --- what the keys of slice_sparsity_args mean ----------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"is_prune": False}, {"enabled": False}),
        ({"pruning_gradually": False}, {"schedule": "one_shot", "start": 52, "end": 60}),
        ({"pruning_mode": "Unprune"}, {"mode": "unprune", "enabled": True}),
        ({"pruning_mode": "unprune", "prune_rate": ...}, {"mode": "unprune", "target": Target()}),
        ({"reg": 0}, {"regularizer": None, "enabled": True}),
        ({"prune_rate": 1}, {"target": Target(sparsity=1.0)}),
        ({"prune_rate": 0}, {"target": Target(), "enabled": True}),
        ({"prune_rate": 0, "reg": 0}, {"target": Target(), "enabled": False}),
        ({"layers": ["module.conv1"]}, {"layers": ["conv1"]}),
        ({"start_epoch": 6, "end_epoch": 9, "epoch_rate": 3}, {"start": 6, "end": 9}),
        ({"start_epoch": 5, "end_epoch": 5, "epoch_rate": 3}, {"start": 6, "end": 6}),
        ({"start_epoch": 7, "end_epoch": 20, "epoch_rate": 5}, {"start": 10, "end": 20}),
        (
            {"block_size": 4, "depthwise_block_size": 1, "disable_first_index": False},
            {
                "pattern": {
                    "type": "slice",
                    "block_size": 4,
                    "depthwise_block_size": 1,
                    "first_tap": False,
                    "order": "interleaved",
                }
            },
        ),
    ],
)
def test_slice_keys(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    (rule,) = load_config(sirc("slice_sparsity_args", **changes)).rules
    assert {key: getattr(rule, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "target"),
    [
        ({"mac_target": ...}, Target(sparsity=0.5)),
        ({"global_sparsity": ...}, Target(macs=0.7)),
        ({}, Target(macs=0.7)),
        ({"mac_target": 0.0}, Target(sparsity=0.5)),
    ],
)
def test_flat_target(changes: dict[str, Any], target: Target) -> None:
    flat = {key: value for key, value in {**json.loads(FLAT.read_text()), **changes}.items() if value is not ...}
    assert load_config(flat).rules[0].target == target


def test_a_flat_form_without_any_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="global_sparsity: missing, and so is mac_target"):
        load_config({"mac_target": 0.0, "start_epoch": 1})


@pytest.mark.parametrize("form", [{"global_sparsity": 0.5}, {"channel_sparsity_args": {"global_prune_rate": 0.5}}])
def test_reset_optimizer_beside_foreign_keys(form: dict[str, Any]) -> None:
    assert load_config({**form, "reset_optimizer": True}).reset_optimizer
    assert not load_config(form).reset_optimizer
    with pytest.raises(ConfigError, match="no form has the keys 'reset_optimizer'"):
        load_config({"reset_optimizer": True})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"importance_mode": "weight_variance"},
            "importance_mode is ignored: it is of VBP, and pruning_method is Group",
        ),
        ({"importance_mode": "weight_variance", "pruning_method": "VBP"}, ""),
        ({"regularize": {"reg": 0, "mac_reg": 0.1}}, "mac_reg is ignored: without reg there is no penalty to weigh"),
        ({"regularize": {"mac_reg": 0.1}}, "mac_reg is ignored: without reg there is no penalty to weigh"),
        ({"regularize": {"reg": 0.1, "mac_reg": 0.1}}, ""),
        ({"regularize": {"reg": 0, "mac_reg": 0}}, ""),
    ],
)
def test_keys_of_another_method_are_said(changes: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture) -> None:
    load_config({"channel_sparsity_args": {"global_prune_rate": 0.5, **changes}})
    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert len(warnings) == bool(said) and all(said in one for one in warnings)


FIRINGS: list[tuple[str, dict[str, Any], dict[int, float]]] = [
    ("channel", {"start_epoch": 2, "end_epoch": 5}, {2: 0.15, 3: 0.3, 4: 0.45, 5: 0.6}),
    ("channel", {"start_epoch": 2, "end_epoch": 9, "epoch_rate": 3}, {2: 0.2, 5: 0.4, 8: 0.6}),
    ("channel", {"start_epoch": 1, "end_epoch": 4, "schedule": "geometric"},
     {1: 0.2047292711, 2: 0.3675444680, 3: 0.4970266279, 4: 0.6}),
    ("channel", {"start_epoch": 3}, {3: 0.6}),
    ("slice", {"start_epoch": 1, "end_epoch": 6, "epoch_rate": 2, "pruning_gradually": True}, {2: 0.2, 4: 0.4, 6: 0.6}),
    ("slice", {"start_epoch": 1, "end_epoch": 6, "epoch_rate": 2}, {2: 0.6, 4: 0.6, 6: 0.6}),
]  # fmt: skip


@pytest.mark.parametrize(("section", "keys", "expected"), FIRINGS, ids=range(len(FIRINGS)))
def test_sparsity_of_every_epoch_of_the_sections(
    section: str, keys: dict[str, Any], expected: dict[int, float]
) -> None:
    """The second version fires where e >= start and (e - start) % rate == 0; slices where e % rate == 0."""
    rate = {"global_prune_rate": 0.6} if section == "channel" else {"prune_rate": 0.6}
    (rule,) = load_config({f"{section}_sparsity_args": {**rate, **keys}}).rules
    times = rule.timeline()
    assert {now: times.sparsity(now) for now in times.events()} == pytest.approx(expected, abs=1e-6)


# --- mistakes -------------------------------------------------------------------------------------

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"target": {"sparsity": 0}}, "rules[0].target.sparsity: 0 is not allowed. Allowed: a number in (0, 1]"),
    ({"target": {"sparsity": 1.5}}, "rules[0].target.sparsity: 1.5 is not allowed. Allowed: a number in (0, 1]"),
    ({"target": {"macs": -0.5}}, "rules[0].target.macs: -0.5 is not allowed. Allowed: a number in (0, 1]"),
    ({"target": {"macs": float("nan")}}, "rules[0].target.macs: nan is not allowed"),
    ({"target": {"macs": "half"}}, "rules[0].target.macs: 'half' is not allowed. Allowed: a number"),
    ({"target": {"macs": "inf"}}, "rules[0].target.macs: 'inf' is not allowed. Allowed: a number"),
    ({"target": {"sparsity": True}}, "rules[0].target.sparsity: True is not allowed"),
    (
        {"target": {"mac": 0.5}},
        "rules[0].target.mac: 'mac' is not known; did you mean 'macs'? Allowed: batch, costs, latency, "
        "latency_ms, macs, parameters, peak_memory, runtime, sparsity",
    ),
    ({"target": {}}, "rules[0].target: nothing to reach. Allowed: sparsity, macs, parameters, latency"),
    ({"target": 0.5}, "rules[0].target: 0.5 is not a mapping"),
    ({"start": 9, "end": 3}, "rules[0].end: 3 is before start. Allowed: start (9) or later"),
    ({"end": -1}, "rules[0].end: -1 is before start"),
    ({"start": "soon"}, "rules[0].start: 'soon' is not allowed. Allowed: a number"),
    ({"start": 1.5, "end": 3, "unit": "step"}, "rules[0].start: 1.5 is not allowed. Allowed: a whole number of steps"),
    ({"initial": 0.6}, "rules[0].initial: 0.6 is above the final sparsity. Allowed: at most 0.5"),
    (
        {"initial": 0.1, "target": {"macs": 0.5}},
        "rules[0].initial: 0.1 requires target.sparsity. Allowed: leave it out",
    ),
    (
        {"start": 2, "phases": [{"start": 0, "end": 2, "sparsity": 0.5}]},
        "rules[0].start: 2 stands beside phases. Allowed: leave it out, each phase has its own",
    ),
    (
        {"phases": [{"start": 0, "end": 4, "sparsity": 0.3}, {"start": 3, "end": 6, "sparsity": 0.5}]},
        "rules[0].phases[1].start: 3 is before the end of the phase before, 4",
    ),
    (
        {"phases": [{"start": 0, "end": 4, "sparsity": 0.3}]},
        "rules[0].target.sparsity: 0.5 is not that of the last phase. Allowed: 0.3",
    ),
    (
        {"phases": [{"start": 0, "end": 1, "every": 0, "sparsity": 0.5}]},
        "rules[0].phases[0].every: 0 is not allowed. Allowed: a number above 0",
    ),
    (
        {"phases": [{"start": 3, "end": 1, "sparsity": 0.5}]},
        "rules[0].phases[0].end: 1 is before start. Allowed: start (3) or later",
    ),
    ({"every": 0}, "rules[0].every: 0 is not allowed. Allowed: a number above 0"),
    ({"multiple": 0}, "rules[0].multiple: 0 is not allowed. Allowed: a whole number of 1 or more"),
    ({"multiple": 2.5}, "rules[0].multiple: 2.5 is not allowed"),
    (
        {"min_sparsity": 0.6, "max_sparsity": 0.5},
        "rules[0].min_sparsity: 0.6 is above max_sparsity. Allowed: at most",
    ),
    ({"max_sparsity": 1.1}, "rules[0].max_sparsity: 1.1 is not allowed. Allowed: a number in [0, 1]"),
    ({"final_sparsity": 0}, "rules[0].final_sparsity: 0 is not allowed"),
    ({"unit": "epochs"}, "rules[0].unit: 'epochs' is not known; did you mean 'epoch'? Allowed: epoch, step"),
    ({"application": "zero"}, "rules[0].application: 'zero' is not known. Allowed: mask, remove"),
    ({"mode": "prun"}, "rules[0].mode: 'prun' is not known; did you mean 'prune'?"),
    ({"enabled": "maybe"}, "rules[0].enabled: 'maybe' is not true or false"),
    ({"layers": "conv1"}, "rules[0].layers: 'conv1' is not a list of layer names"),
    ({"layers": []}, "rules[0].layers: [] names no layer"),
    ({"layers": ["conv1", 5]}, "rules[0].layers[1]: 5 is not the name of a layer"),
    ({"layers": ["re:(conv"]}, "rules[0].layers[0]: 're:(conv' is not a regular expression: missing )"),
    ({"exclude": ["fc", "re:["]}, "rules[0].exclude[1]: 're:[' is not a regular expression"),
    ({"critereon": "magnitude"}, "rules[0].critereon: 'critereon' is not known; did you mean 'criterion'?"),
    ({"schedule": "cosin"}, "rules[0].schedule: 'cosin' is not known; did you mean 'cosine'?"),
    ({"schedule": {"type": "linear"}}, "rules[0].schedule: {'type': 'linear'} is not a name. Allowed: cosine, cube"),
    ({"scope": "globl"}, "rules[0].scope: 'globl' is not known; did you mean 'global'?"),
    ({"criterion": "magnitud"}, "rules[0].criterion: 'magnitud' is not known; did you mean 'magnitude'?"),
    ({"criterion": {"type": "magnitud"}}, "rules[0].criterion.type: 'magnitud' is not known"),
    ({"criterion": {"type": "magnitude", "q": 1}}, "rules[0].criterion.q: 'q' is not known"),
    ({"criterion": {"p": 1}}, "rules[0].criterion: {'p': 1} has no 'type'. Allowed: magnitude"),
    ({"criterion": {"type": 3}}, "rules[0].criterion: {'type': 3} has the 'type' 3, which is not a name"),
    ({"criterion": None}, "rules[0].criterion: None is not a name or a mapping with a 'type'. Allowed: magnitude"),
    ({"criterion": 3}, "rules[0].criterion: 3 is not a name or a mapping"),
    ({"pattern": "chanel"}, "rules[0].pattern: 'chanel' is not known; did you mean 'channel'?"),
    ({"regularizer": {"type": "gone", "strength": 0}}, "rules[0].regularizer: strength: 0 is not above 0"),
    ({"regularizer": "gone"}, "rules[0].regularizer: "),
]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("keys", "line"), MISTAKES)
def test_mistake_in_a_rule(keys: dict[str, Any], line: str) -> None:
    (problem,) = problems({"rules": [{**HALF, **keys}]})
    assert problem.startswith(line)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"rules": []}, "rules: [] prunes nothing. Allowed: one rule or more"),
        ({"rules": HALF}, "rules: {'target': {'sparsity': 0.5}} is not a list"),
        ({"rules": [5]}, "rules[0]: 5 is not a mapping of keys to values"),
        ({"rules": [HALF], "infre": True}, "infre: 'infre' is not known; did you mean 'infer'?"),
        ({"rules": [HALF], "example_inputs": {}}, "example_inputs.shape: missing, but needed"),
        ({"rules": [HALF], "example_inputs": {"shape": [1, 0]}}, "example_inputs.shape: [1, 0] is not a shape"),
        ({"rules": [HALF], "example_inputs": {"shape": [[1], []]}}, "example_inputs.shape: [[1], []] is not a shape"),
        (
            {"rules": [HALF], "example_inputs": {"shape": [1], "container": "tupel"}},
            "example_inputs.container: 'tupel' is not known; did you mean 'tuple'? Allowed: list, tuple",
        ),
        (
            {"rules": [{**HALF, "name": "a"}, HALF, {**HALF, "name": "a"}]},
            "rules[2].name: 'a' is the name of rules[0] already",
        ),
        ({}, "config: it is empty. Allowed: 'rules'"),
        ({"rule": []}, "config: no form has the keys 'rule'; did you mean 'rules' for 'rule'?"),
        (
            {"chanel_sparsity_args": {}, "lr": 1},
            "config: no form has the keys 'chanel_sparsity_args', 'lr'; did you mean 'channel_sparsity_args'",
        ),
    ],
)
def test_mistake_in_a_config(config: dict[str, Any], line: str) -> None:
    (problem,) = problems(config)
    assert problem.startswith(line)


@pytest.mark.parametrize(
    ("section", "changes", "line"),
    [
        ("channel", {"block_siz": 1}, "block_siz: 'block_siz' is not known; did you mean 'block_size'?"),
        ("channel", {"block_size": 0}, "block_size: 0 is not allowed. Allowed: a whole number of 1 or more"),
        ("channel", {"end_epoch": 1}, "end_epoch: 1 is before start_epoch. Allowed: start_epoch (5) or later"),
        ("channel", {"epoch_rate": 0}, "epoch_rate: 0 is not allowed"),
        ("channel", {"mac_target": 1.2}, "mac_target: 1.2 is not allowed. Allowed: a number in [0, 1]"),
        ("channel", {"mac_target": 0, "global_prune_rate": 0}, "global_prune_rate: 0.0 leaves nothing to reach"),
        ("channel", {"importance_mode": "combined"}, "importance_mode: 'combined' is not supported. Allowed: variance"),
        ("channel", {"group_reduction": "prod"}, "group_reduction: 'prod' is not supported. Allowed: mean, or sum"),
        ("channel", {"sparse_mode": "reparam"}, "sparse_mode: 'reparam' is not supported. Allowed: none"),
        ("channel", {"similarity_discount": True}, "similarity_discount: True is not known. Allowed: False"),
        ("channel", {"global_prune_rate": 2}, "global_prune_rate: 2 is not allowed. Allowed: a number in [0, 1]"),
        ("channel", {"mac_target": ..., "global_prune_rate": 0}, "global_prune_rate: 0.0 leaves nothing to reach"),
        ("channel", {"mac_target": ..., "global_prune_rate": ...}, "global_prune_rate: None leaves nothing to reach"),
        ("channel", {"layers": []}, "layers: [] names no layer"),
        ("channel", {"layers": "conv1"}, "layers: 'conv1' is not a list"),
        ("channel", {"layers": [3]}, "layers[0]: 3 is not the name of a layer"),
        (
            "channel",
            {"pruning_method": "GroupNormPrunner"},
            "pruning_method: 'GroupNormPrunner' is not known; did you mean 'GroupNormPruner'?",
        ),
        ("channel", {"schedule": "liner"}, "schedule: 'liner' is not known; did you mean 'linear'?"),
        ("channel", {"schedule": "linear", "pruning_schedule": "cube"}, "pruning_schedule: 'cube' is not the schedule"),
        ("channel", {"regularize": {"regg": 1}}, "regularize.regg: 'regg' is not known; did you mean 'reg'?"),
        ("channel", {"regularize": {"reg": -1}}, "regularize.reg: -1 is not allowed. Allowed: a number of 0 or more"),
        ("channel", {"regularize": 0.1}, "regularize: 0.1 is not a mapping"),
        ("channel", {"MAC_params": {"type": "Add"}}, "MAC_params.type: 'Add' is not known"),
        ("channel", {"MAC_params": {"beta": 0}}, "MAC_params.beta: 0 is not allowed"),
        ("channel", {"input_shape": [1, "3"]}, "input_shape: [1, '3'] is not a shape"),
        ("channel", {"container": "dict"}, "container: 'dict' is not known"),
        (
            "slice",
            {"disable_first": True},
            "disable_first: 'disable_first' is not known; did you mean 'disable_",
        ),
        ("slice", {"prune_rate": 1.01}, "prune_rate: 1.01 is not allowed. Allowed: a number in [0, 1]"),
        ("slice", {"prune_rate": ...}, "prune_rate: missing, but needed"),
        ("slice", {"pruning_mode": "Grow"}, "pruning_mode: 'Grow' is not known. Allowed: Prune, Unprune"),
        ("slice", {"pruning_method": "L3_norm"}, "pruning_method: 'L3_norm' is not known; did you mean 'L2_norm'?"),
        ("slice", {"end_epoch": 50}, "end_epoch: 50 is before start_epoch"),
    ],
)
def test_mistake_in_a_section(section: str, changes: dict[str, Any], line: str) -> None:
    (problem,) = problems(sirc(f"{section}_sparsity_args", **changes))
    assert problem.startswith(f"{section}_sparsity_args.{line}")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"intervall": 5}, "intervall: 'intervall' is not known; did you mean 'interval'?"),
        ({"interval": 0}, "interval: 0 is not allowed"),
        ({"end_epoch": 2}, "end_epoch: 2 is before start_epoch"),
        ({"global_sparsity": 0}, "global_sparsity: 0 is not allowed. Allowed: a number in (0, 1]"),
        ({"mac_target": None, "global_sparsity": None}, "global_sparsity: missing, and so is mac_target"),
        ({"layers_to_prune": "conv1"}, "layers_to_prune: 'conv1' is not a list"),
        ({"layers_to_prune": []}, "layers_to_prune: [] is not a list of one layer name or more"),
        ({"schedule": "liner"}, "schedule: 'liner' is not known; did you mean 'linear'?"),
    ],
)
def test_mistake_in_the_flat_form(changes: dict[str, Any], line: str) -> None:
    (problem,) = problems({**json.loads(FLAT.read_text()), **changes})
    assert problem.startswith(line)


def test_every_mistake_has_its_line() -> None:
    lines = problems({"rules": [{"every": 0, "target": {"macs": 2}}, {"start": "soon"}], "infre": True})
    assert [line.split(":")[0] for line in lines] == [
        "rules[0].every",
        "rules[0].target.macs",
        "rules[1].start",
        "infre",
    ]


def test_models_made_by_hand_raise_config_errors_too() -> None:
    with pytest.raises(ConfigError, match=r"^sparsity: 2 is not allowed"):
        Target(sparsity=2)
    with pytest.raises(ConfigError, match=r"^end: 1 is before start"):
        Rule(start=5, end=1, target=Target(sparsity=0.5))
    with pytest.raises(ConfigError, match=r"^rules\[0\]\.target\.macs: 3 is not allowed"):
        PruningConfig(rules=[{"target": {"macs": 3}}])  # type: ignore[list-item]


@pytest.mark.usefixtures("registered")
def test_aliases_are_resolved_in_the_native_form() -> None:
    rule = Rule(schedule="Geometric", criterion={"type": "L2", "p": 1}, target=Target(sparsity=0.5))
    assert (rule.schedule, rule.criterion) == ("exponential", {"type": "magnitude", "p": 1})
    assert Rule(criterion="l2", target=Target(sparsity=0.5)).criterion == "magnitude"


def test_a_rule_may_regularise_only_be_off_or_lift_masks() -> None:
    for keys in ({"regularizer": "growing_l2"}, {"enabled": False}, {"mode": "unprune", "pattern": "2:4"}):
        assert native([keys]).rules[0].target == Target()


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("c.json", '{"rules": [\n  {"start": 1,}\n]}', "line 2, column "),
        ("c.json", "", "it holds nothing. Allowed: a mapping"),
        ("c.json", "[1, 2]", "it holds a list. Allowed: a mapping"),
        ("c.json", '{"rules": [], "rules": [{}]}', "rules: given twice, with [] and [{}]"),
        ("c.json", '{"rules": [{"every": 0}]}', "line 1: rules[0].every: 0 is not allowed"),
        ("c.yaml", "rules:\n  - {start: 1\n", "line 3, column 1: "),
        ("c.yaml", "", "it holds nothing"),
        ("c.yml", "- 1", "it holds a list"),
        ("c.yaml", "rules: []\nrules: []\n", "line 2, column 1: rules: given twice"),
        ("c.yaml", "1: 2\n", "line 1, column 1: the key '1' is not text"),
        ("c.yaml", "rules: !Odd {a: 1}\n", "line 1, column 8: the tag '!Odd' is not known. Allowed: "),
        (
            "c.yaml",
            "rules: !!python/object/apply:os.getcwd []\n",
            "line 1, column 8: the tag 'tag:yaml.org,",
        ),
        ("c.yaml", "a: 1\n---\nb: 1\n", "line 2, column 1: "),
    ],
)
def test_file_that_cannot_be_used(name: str, text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    (problem,) = problems(path)
    assert problem.startswith(f"{path}: {line}")
    assert path.read_text() == text
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in problems(tmp_path / "c.json")[0]


def test_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + FLAT.read_bytes())
    assert load_config(tmp_path / "c.json") == load_config(FLAT)


def test_where_there_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "prune.json").write_text("{}")
    (tmp_path / "prune.toml").write_text("")
    assert "there is no " in problems(tmp_path / "prun.json")[0]
    assert "did you mean 'prune.json'?" in problems(tmp_path / "prun.json")[0]
    assert "there is no " in problems(tmp_path / "no" / "such.json")[0]
    assert "has the extension '.toml'. Allowed: .json, .yaml, .yml" in problems(tmp_path / "prune.toml")[0]
    assert "holds no config. Allowed: one of pruning_config.json, " in problems(tmp_path)[0]
    (tmp_path / "pruning_config.json").write_text("{}")
    (tmp_path / "pruning_config.yml").write_text("{}")
    assert "holds 2 configs" in problems(tmp_path)[0]
    assert problems(3) == ["config: 3 is neither a path, a mapping nor a PruningConfig"]


def test_yaml_merge_keys(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "rules:\n  - &first {every: 2, start: 1, target: {sparsity: 0.5}}\n  - {<<: *first, start: 0, name: second}\n"
    )
    first, second = load_config(path).rules
    assert (first.start, first.every, second.start, second.every) == (1, 2, 0, 2)


# --- dialects of others ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A form with a tag of its own."""

    keys: ClassVar[tuple[str, ...]] = ("recipe",)
    yaml_tags: ClassVar[tuple[str, ...]] = ("!Halve",)

    def recognises(self, mapping: Mapping[str, Any]) -> bool:
        return "recipe" in mapping

    def translate(self, mapping: Mapping[str, Any]) -> PruningConfig:
        return native([{"name": step[TAG], "target": {"sparsity": 0.5}, **step["rule"]} for step in mapping["recipe"]])


@pytest.mark.parametrize(
    ("mapping", "form"),
    [
        ({"interval": 1}, "flat"),
        ({"global_sparsity": 0.5, "intervall": 1}, "flat"),
        ({"start_epoch": 1, "modifiers": [{"a": 1}]}, None),
        ({"start_epoch": 1, "pruning": {"a": 1}}, None),
        ({"schedule": "linear"}, None),
        ({"slice_sparsity_args": {}, "start_epoch": 1}, "sirc"),
    ],
)
def test_which_form_recognises_it(mapping: dict[str, Any], form: str | None) -> None:
    forms = [name for name in ("flat", "intel", "sirc") if registry.build("dialect", name).recognises(mapping)]
    assert forms == ([form] if form else [])


@pytest.mark.usefixtures("registered")
def test_another_dialect_is_a_class_with_two_methods(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("recipe:\n  - !Halve {rule: {start: 1e0}}\n")
    assert "the tag '!Halve' is not known" in problems(path)[0]
    registry.register("dialect", "recipe")(Recipe)
    (rule,) = load_config(path).rules
    assert (rule.name, rule.start, rule.target) == ("!Halve", 1, Target(sparsity=0.5))
    path.write_text("recipe: !Halve [1]\n")
    assert "the tag '!Halve' must be on a mapping" in problems(path)[0]
    assert "another form (flat, intel, recipe, sirc, sparseml)" in problems({"recipes": 1})[0]


# --- the JSON schema ------------------------------------------------------------------------------


@pytest.mark.usefixtures("registered")
def test_json_schema_lists_what_is_registered() -> None:
    schema = json_schema()
    keys = ["$schema", "rules", "example_inputs", "infer", "reset_optimizer", "trace_limit", "distillation", "recovery"]
    assert list(schema["properties"]) == keys
    fields = schema["$defs"]["Rule"]["properties"]
    assert fields["schedule"]["enum"] == registry.names("schedule")
    assert fields["schedule"]["default"] == "linear"
    assert fields["criterion"]["anyOf"] == [
        {"enum": ["magnitude"]},
        {
            "title": "magnitude",
            "description": "Size of the weights, as in Size.",
            "type": "object",
            "properties": {
                "type": {"const": "magnitude"},
                "p": {"type": "integer", "default": 2, "description": "the power; 2 for L2."},
                "normalize": {
                    "enum": ["mean", "none"],
                    "type": "string",
                    "default": "none",
                    "description": "by what.",
                },
            },
            "required": ["type"],
            "additionalProperties": False,
        },
    ]
    assert fields["regularizer"]["anyOf"] == [
        {"enum": ["gone"]},
        {
            "title": "gone",
            "type": "object",
            "properties": {"type": {"const": "gone"}, "strength": {"type": "number"}},
            "required": ["type", "strength"],
            "additionalProperties": False,
        },
        {"type": "null"},
    ]


def test_json_schema_is_json_and_describes_every_field() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["additionalProperties"] is False
    for model in (schema, *schema["$defs"].values()):
        for name, field in model["properties"].items():
            assert field.get("description"), name
    sparsity = schema["$defs"]["Target"]["properties"]["sparsity"]["anyOf"][0]
    assert (sparsity["exclusiveMinimum"], sparsity["maximum"]) == (0, 1)
