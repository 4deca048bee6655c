"""Messages about configs of other systems name the user's own key, as it is written, and its line in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from pruningawaretraining import Pruning, load_config
from pruningawaretraining.config.recipe import load_recipe
from pruningawaretraining.errors import PruningError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(),
                         nn.Linear(512, 4))  # fmt: skip


def modifier(name: str = "GMPruningModifier", **keys: Any) -> dict[str, Any]:
    times = {"init_sparsity": 0.1, "final_sparsity": 0.5, "start_epoch": 0, "end_epoch": 2}
    return {"!tag": f"!{name}", **times, **keys}


def steps(**keys: Any) -> dict[str, Any]:
    return {"target_sparsity": 0.5, "pattern": "1x1", **keys}


def epochs(**keys: Any) -> dict[str, Any]:
    return {"pruning": {"approach": {"weight_compression": {"pruners": [{"target_sparsity": 0.5, **keys}]}}}}


CHANNELS = {"global_prune_rate": 0.5, "start_epoch": 0}
SECTION = "pruning.approach.weight_compression"
MESSAGES: list[tuple[dict[str, Any], str]] = [
    ({"modifiers": [modifier(params=["re:conv.*"])]}, "modifiers[0].params: 're:conv.*' matches no parameter"),
    ({"modifiers": [modifier(params=["7.weight"])]}, "modifiers[0].params: '7' is not known"),
    ({"a_modifiers": {"MagnitudePruningModifier": {"targets": ["re:x"], "init_sparsity": 0.5, "final_sparsity": 0.5,
                                                  "start": 0.0, "end": 2.0}}},
     "a_modifiers.MagnitudePruningModifier.targets: 're:x' matches no parameter"),
    ({"modifiers": [modifier(params=["0.weight"]),
                    modifier(params=["re:conv.*"], init_sparsity=0.5, final_sparsity=0.6, start_epoch=2, end_epoch=3)]},
     "modifiers[1].params: 're:conv.*' matches no parameter"),
    ({"modifiers": [{"!tag": "!WandaPruningModifier", "sparsity": 0.5, "targets": ["re:conv.*"]}]},
     "modifiers[0].targets: 're:conv.*' matches no module"),
    ({"modifiers": [modifier("ACDCPruningModifier", compression_sparsity=0.8, mask_type="2:4", update_frequency=1)]},
     "modifiers[0] (ACDCPruningModifier): init_sparsity: 'init_sparsity' is not known"),
    ({"channel_sparsity_args": {**CHANNELS, "layers": ["conv7"]}},
     "channel_sparsity_args.layers: 'conv7' is not known"),
    ({"channel_sparsity_args": {**CHANNELS, "max_pruning_rate": 0.5, "mac_target": 0.01, "layers": ["0"]}},
     "channel_sparsity_args.mac_target: "),
    ({"slice_sparsity_args": {"prune_rate": 0.5, "layers": ["conv7"]}}, "slice_sparsity_args.layers: 'conv7' is not"),
    ({"global_sparsity": 0.5, "layers_to_prune": ["conv7"]}, "layers_to_prune: 'conv7' is not known"),
    ({"mac_target": 0.001, "layers_to_prune": ["0"]}, "mac_target: "),
    (steps(op_names=["conv7"]), "op_names: 'conv7' matches no module"),
    ({"pruning_configs": [steps(names=["conv7"])]}, "pruning_configs[0].names: 'conv7' matches no module"),
    (steps(op_names=["conv7"], pruning_configs=[{"pattern": "2:4"}]), "op_names: 'conv7' matches no module"),
    ({"pruning_configs": [steps(names=["0"]), steps(prune_type="magnitude", names=["2", "0"])]},
     "pruning_configs[1].names: '0' is pruned by pruning_configs[0]"),
    (steps(pattern="mha", resume_from_pruned_checkpoint=True), "resume_from_pruned_checkpoint: True is not supported"),
    (steps(min_sparsity_ratio_per_layer=0.9), "min_sparsity_ratio_per_layer: 0.9 is above"),
    (epochs(names=["conv7.weight"]), f"{SECTION}.pruners[0].names: 'conv7.weight' is not known"),
    (epochs(names=["conv*.weight"]), f"{SECTION}.pruners[0].names: 'conv*.weight' matches no module"),
    (epochs(initial_sparsity=0.6), f"{SECTION}.pruners[0].initial_sparsity: 0.6 is above target_sparsity"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "expected"), MESSAGES, ids=[row[1][:50] for row in MESSAGES])
def test_errors_name_the_users_key(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(PruningError) as caught:
        pruner = Pruning(net(), config, example_inputs=torch.randn(2, 3, 8, 8))
        pruner.prune(pruner.model, 0)
    assert str(caught.value).startswith(expected)


def test_a_changed_config_keeps_its_names() -> None:
    pruner = Pruning(net(), steps(end_step=20))
    with pytest.raises(PruningError, match=r"^min_sparsity_ratio_per_op: 0.9 is above max_sparsity_ratio_per_op"):
        pruner.update_items_for_all_pruners(min_sparsity_ratio_per_op=0.9, max_sparsity_ratio_per_op=0.6)
    with pytest.raises(PruningError, match=r"^op_names: 'conv7' matches no module"):
        pruner.update_items_for_all_pruners(op_names=["conv7"])


LINES: list[tuple[str, str, str]] = [
    ("a.yaml", "a: 1\nmodifiers:\n  - !EpochRangeModifier {end_epoch: 2}\n  - !GMPruningModifier\n    start_epoch: 3\n"
               "    final_sparsity: 0.5\n    end_epoch: 2\n",
     "line 7: modifiers[1] (GMPruningModifier): end_epoch: 2 is before start_epoch"),
    ("a.yaml", "modifiers:\n  - !GMPruningModifier\n    mask_type: block8\n    final_sparsity: 0.5\n",
     "line 3: modifiers[0].mask_type: 'block8' is not known"),
    ("a.md", "---\nmodifiers:\n  - !GMPruningModifier\n    inter_func: linea\n---\n# A page\n",
     "line 4: modifiers[0] (GMPruningModifier): inter_func: 'linea' is not known"),
    ("a.yaml", "some_stage:\n  pruning_modifiers:\n    ConstantPruningModifier:\n      start: 2\n      end: 1\n",
     "line 5: some_stage.pruning_modifiers.ConstantPruningModifier (ConstantPruningModifier): end: 1 is before"),
    ("a.json", '{\n\t"channel_sparsity_args": {\n\t\t"start_epoch": 3,\n\t\t"end_epoch": 2\n\t}\n}',
     "line 4: channel_sparsity_args.end_epoch: 2 is before start_epoch"),
    ("a.yaml", "pattern: 4x1\npruning_configs:\n  - target_sparsity: 0.5\n    pruning_type: snipp\n",
     "line 4: pruning_configs[0].pruning_type: 'snipp' is not known"),
    ("a.yaml", "rules:\n  - start: 0\n    target: {sparsity: 2}\n", "line 3: rules[0].target.sparsity: 2 is not"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), LINES, ids=[row[2][:40] for row in LINES])
def test_errors_of_files_name_the_line(name: str, text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    readers = [load_config, load_recipe] if "modifiers" in text else [load_config]
    for reader in readers:
        with pytest.raises(PruningError) as caught:
            reader(path)
        assert str(caught.value).startswith(f"{path}: {expected}")


def test_a_config_from_elsewhere_equals_the_native_one(tmp_path: Path) -> None:
    config = load_config(steps(end_step=20))
    path = tmp_path / "native.json"
    path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    assert load_config(path) == config and load_config(path).origin.rules == {}
    assert yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))) == config.model_dump(mode="json")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pruning": {"approach": {"weight_compression_pytorch": {"pruners": [
            {"prune_layer_type": ["Linearr"], "target_sparsity": 0.5}]}}}},
         "pruning.approach.weight_compression_pytorch.pruners[0].prune_layer_type: 'Linearr' is not known"),
        (steps(pruning_op_types=["Linearr"]), "pruning_op_types: 'Linearr' is not known"),
        ({"channel_sparsity_args": {**CHANNELS, "schedule": "linear", "pruning_schedule": "geometric"}},
         "channel_sparsity_args.pruning_schedule: 'geometric' is not the schedule 'linear'"),
        ({"aa": "rand", "amp": True, "batch_size": 4, "lr": 0.1, "opt": "sgd", "sched": "cosine", "model": "deit"},
         "config: 'aa', 'amp', 'opt', 'sched' are settings of a training, and there is no pruning config. Allowed: "),
    ],
)  # fmt: skip
def test_values_are_called_as_the_user_has_written_them(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(PruningError) as error:
        Pruning(net(), config)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_mfac_is_not_said_to_be_ignored(caplog: pytest.LogCaptureFixture) -> None:
    load_config({"modifiers": [modifier("MFACPruningModifier")]})
    assert [one.getMessage() for one in caplog.records] == [
        "modifiers[0]: the inverse Fisher in blocks (obs) stands for M-FAC's, which approximates the same matrix"
    ]


def test_a_key_is_said_to_be_ignored_for_one_reason(caplog: pytest.LogCaptureFixture) -> None:
    load_config({"channel_sparsity_args": {**CHANNELS, "mac_target": 0.5, "max_pruning_rate": 0.3}})
    (said,) = [one.getMessage() for one in caplog.records]
    assert said == "channel_sparsity_args.global_prune_rate is ignored: mac_target decides how far to prune"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (steps(excluded_op_names=["foo"]), "excluded_op_names: 'foo' matches no module"),
        (steps(pruning_configs=[{"excluded_op_names": ["foo", "0"]}]),
         "pruning_configs[0].excluded_op_names: 'foo' matches no module"),
        ({"modifiers": [{"!tag": "!WandaPruningModifier", "sparsity": 0.5, "ignore": ["re:foo"]}]},
         "modifiers[0].ignore: 're:foo' matches no module"),
        ({"rules": [{"pattern": "unstructured", "exclude": ["?foo"], "target": {"sparsity": 0.5}}]},
         "rules[0].exclude: 'foo' is not known"),
    ],
)  # fmt: skip
def test_what_may_match_nothing_is_called_as_it_is_written(
    config: dict[str, Any], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    Pruning(net(), config)
    said = [one.getMessage() for one in caplog.records if "may match nothing" in one.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(expected)
