"""Pruning configs of the proximal optimizer: which parameters a key gets, and what is said about wrong ones."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining.config.dialects.pat import prune_param_groups
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.proximal import CoupledChannelGrouper, PruneOptimizer

ROWS = {"group_type": "pat.group.Dim0Grouper", "prox_type": "pat.prox.ProxGroupLasso", "reg_lambda": 2e-4}


def test_the_optimizer_only_interface_is_imported_as_from_pat() -> None:
    group, optim, prox = (
        importlib.import_module(f"pruningawaretraining.{name}") for name in ("group", "optim", "prox")
    )
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    weights = [weight for name, weight in model.named_parameters() if name.endswith("weight")]
    others = [weight for name, weight in model.named_parameters() if not name.endswith("weight")]
    groups = [
        {
            "params": weights,
            "group_type": "pruningawaretraining.group.Dim0Grouper",
            "prox_type": prox.ProxGroupLasso,
            "reg_lambda": 1e3,
        },
        {"params": others},
    ]
    optimizer = optim.PruneOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-4))
    assert optim.prune_param_groups is prune_param_groups
    assert optim.PruneOptimizer is PruneOptimizer and group.CoupledChannelGrouper is CoupledChannelGrouper
    for _ in range(2):
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    assert all(not weight.any() for weight in weights)


class MyLinear(nn.Linear):
    """A linear layer of the user's own."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(4, 12)
        self.attn.proj = MyLinear(4, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)


WEIGHTS = [
    *(f"blocks.{number}.attn.{layer}.weight" for number in (0, 1) for layer in ("qkv", "proj")),
    "head.weight",
]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["blocks.0.attn.qkv.weight"], [["blocks.0.attn.qkv.weight"]]),
        ([r":.*attn\.qkv\.weight"], [["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"]]),
        ([(nn.Linear, "weight")], [WEIGHTS]),
        (["torch.nn.Linear::weight"], [WEIGHTS]),
        (["torch.nn.modules.linear.Linear::weight"], [WEIGHTS]),
        ([(MyLinear, "weight")], [["blocks.0.attn.proj.weight", "blocks.1.attn.proj.weight"]]),
        ([(Block, "attn.qkv.bias")], [["blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"]]),
        (
            [(nn.Conv2d, "weight"), (nn.Linear, "bias")],
            [["conv.weight"], [name.replace("weight", "bias") for name in WEIGHTS]],
        ),
        # a name before a regular expression before a class, wherever they stand
        (
            [(nn.Linear, "weight"), r":blocks\.0\..*weight", "blocks.0.attn.qkv.weight"],
            [[*WEIGHTS[2:]], ["blocks.0.attn.proj.weight"], ["blocks.0.attn.qkv.weight"]],
        ),
        # the first of a kind
        ([":head.*", ":.*weight"], [["head.weight", "head.bias"], [*WEIGHTS[:4], "conv.weight"]]),
        ([":.*", "head.bias"], [[..., "all but head.bias"], ["head.bias"]]),
    ],
)
def test_a_key_gets_its_parameters(keys: list[Any], expected: list[list[Any]]) -> None:
    model = Net()
    names = dict(model.named_parameters())
    config = {key: {**ROWS, "number": number} for number, key in enumerate(keys)}
    before = copy.deepcopy({str(key): dict(value) for key, value in config.items()})
    groups = prune_param_groups(model, config)
    for number, wanted in enumerate(expected):
        wanted = [name for name in names if name != "head.bias"] if ... in wanted else wanted
        assert sorted(groups[number]["param_names"]) == sorted(wanted)
        assert {id(p) for p in groups[number]["params"]} == {id(names[name]) for name in wanted}
        assert groups[number]["group_type"] == ROWS["group_type"]
        assert groups[number]["number"] == number
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert {str(key): value for key, value in config.items()} == before


def test_a_key_whose_parameters_all_went_to_another_makes_no_group() -> None:
    groups = prune_param_groups(Net(), {"conv.weight": ROWS, (nn.Conv2d, "weight"): {"number": 1}})
    assert [group.get("number") for group in groups] == [None, None]


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_configs_are_read_from_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"prune{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps({"torch.nn.Linear::weight": ROWS, ":conv.*": {**ROWS, "reg_lambda": 1}}))
    else:
        path.write_text(
            "torch.nn.Linear::weight:\n  group_type: Dim0Grouper\n  prox_type: ProxGroupLasso\n  reg_lambda: 2e-4\n"
            "':conv.*':\n  group_type: Dim0Grouper\n  prox_type: ProxGroupLasso\n  reg_lambda: 1\n"
        )
    groups = prune_param_groups(Net(), path)
    assert groups[0]["param_names"] == WEIGHTS
    assert [group.get("reg_lambda") for group in groups] == [2e-4, 1, None]
    optimizer = PruneOptimizer(torch.optim.SGD(groups, lr=0.1))
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert set(optimizer.parameter_sparsity()) == {*WEIGHTS, "conv.weight", "conv.bias"}


def test_biases_without_a_key_may_go_without_weight_decay() -> None:
    groups = prune_param_groups(Net(), {"conv.weight": ROWS}, no_weight_decay=("bias",))
    assert [group.get("weight_decay") for group in groups] == [None, None, 0.0]
    assert all(name.endswith("bias") for name in groups[2]["param_names"])


def test_shared_parameters_have_several_names() -> None:
    model = Net()
    model.blocks[1].attn.qkv = model.blocks[0].attn.qkv
    (group, _) = prune_param_groups(model, {"blocks.1.attn.qkv.weight": ROWS})
    assert group["params"][0] is model.blocks[0].attn.qkv.weight


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"blocks.0.attn.qvk.weight": ROWS}, "did you mean 'blocks.0.attn.qkv.weight'"),
        ({r":attn\.qkv\.weight": ROWS}, "no parameter matches"),
        ({(nn.Conv3d, "weight"): ROWS}, "Conv3d::weight.*no parameter matches"),
        ({(nn.Linear, "wieght"): ROWS}, "no parameter matches"),
        ({"torch.nn.Linaer::weight": ROWS}, "did you mean 'torch.nn.Linear'"),
        ({"os.system::weight": ROWS}, "no class of this name"),
        ({"not.loaded.Thing::weight": ROWS}, "no class of this name"),
        ({":(": ROWS}, "no regular expression"),
        ({3: ROWS}, "is not a key"),
        ({(nn.Linear, "weight", "x"): ROWS}, "is not a key"),
        ({"conv.weight": 3}, "is not a mapping"),
        ({"conv.weight": {"params": []}}, "params: not allowed"),
        ({(nn.Linear, "weight"): ROWS, "torch.nn.Linear::weight": ROWS}, "given twice"),
        ({"conv.weight": {**ROWS, "group_type": "CoupledChannelGrouper"}}, "needs example_inputs"),
    ],
)
def test_wrong_keys_are_refused(config: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune_param_groups(Net(), config)


def small_net() -> nn.Sequential:
    first = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))


def test_coupled_channels_bring_their_norms_along() -> None:
    model = small_net()
    options = {"group_type": "CoupledChannelGrouper", "prox_type": "ProxGroupLasso", "reg_lambda": 0.1}
    groups = prune_param_groups(model, {"0.weight": options}, example_inputs=torch.zeros(1, 3, 8, 8))
    assert sorted(groups[0]["param_names"]) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert isinstance(groups[0]["group_type"], CoupledChannelGrouper)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    PruneOptimizer(torch.optim.SGD(groups, lr=0.1))


def test_a_norm_with_a_key_of_its_own_cannot_be_coupled() -> None:
    options = {"group_type": "CoupledChannelGrouper", "prox_type": "ProxGroupLasso"}
    config = {"0.weight": options, "1.weight": ROWS}
    with pytest.raises(ConfigError, match="1.weight: coupled"):
        prune_param_groups(small_net(), config, example_inputs=torch.zeros(1, 3, 8, 8))
