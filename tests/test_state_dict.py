"""``load_state_dict_pruned``: the widths of every kind of layer, read from the shapes of a plain state dict."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import zoo
from torch import nn

from pruningawaretraining import Pruning, load_state_dict_pruned
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.models.calling import outputs_of


def pruned(name: str, sparsity: float = 0.5) -> tuple[nn.Module, torch.Tensor]:
    model, inputs = zoo.architecture(name)
    Pruning(model, {"rules": [{"target": {"sparsity": sparsity}, "scope": "local"}]}, example_inputs=inputs).prune()
    return model, inputs


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_architecture_of_the_zoo_loads_from_shapes_alone(name: str) -> None:
    source, inputs = pruned(name)
    model, missing, unexpected = load_state_dict_pruned(zoo.architecture(name)[0], source.state_dict())
    assert (missing, unexpected) == ([], [])
    for mine, theirs in zip(outputs_of(model, inputs), outputs_of(source, inputs), strict=True):
        assert torch.equal(mine, theirs)
    widths = [vars(module).get("out_channels") for module in source.modules()]
    assert [vars(module).get("out_channels") for module in model.modules()] == widths


LAYERS: list[tuple[str, nn.Module, nn.Module, dict[str, Any]]] = [
    ("conv", nn.Conv1d(6, 8, 3), nn.Conv1d(4, 5, 3), {"in_channels": 4, "out_channels": 5}),
    ("conv3d", nn.Conv3d(6, 8, 1, bias=False), nn.Conv3d(6, 5, 1, bias=False), {"in_channels": 6, "out_channels": 5}),
    ("transposed", nn.ConvTranspose2d(6, 8, 3), nn.ConvTranspose2d(4, 5, 3), {"in_channels": 4, "out_channels": 5}),
    (
        "transposed grouped", nn.ConvTranspose2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 4, 3, groups=4),
        {"groups": 4, "in_channels": 8, "out_channels": 4},
    ),
    (
        "transposed depthwise", nn.ConvTranspose2d(8, 8, 3, groups=8), nn.ConvTranspose2d(5, 5, 3, groups=5),
        {"groups": 5, "in_channels": 5, "out_channels": 5},
    ),
    ("depthwise", nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(5, 5, 3, groups=5), {"groups": 5, "in_channels": 5}),
    ("multiplier", nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(5, 10, 3, groups=5), {"groups": 5, "in_channels": 5}),
    ("inputs of groups", nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(4, 6, 3, groups=2), {"groups": 2, "in_channels": 4}),
    ("whole groups", nn.Conv2d(12, 12, 3, groups=4), nn.Conv2d(9, 9, 3, groups=3), {"groups": 3, "in_channels": 9}),
    ("linear", nn.Linear(6, 8), nn.Linear(4, 5), {"in_features": 4, "out_features": 5}),
    ("batch norm 1d", nn.BatchNorm1d(8), nn.BatchNorm1d(5), {"num_features": 5}),
    ("batch norm 2d", nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(5, affine=False), {"num_features": 5}),
    ("batch norm 3d", nn.BatchNorm3d(8, track_running_stats=False), nn.BatchNorm3d(5, track_running_stats=False),
     {"num_features": 5}),
    ("sync", nn.SyncBatchNorm(8), nn.SyncBatchNorm(5), {"num_features": 5}),
    ("instance norm", nn.InstanceNorm2d(8, affine=True), nn.InstanceNorm2d(5, affine=True), {"num_features": 5}),
    ("layer norm", nn.LayerNorm(8), nn.LayerNorm(5), {"normalized_shape": (5,)}),
    ("layer norm 2", nn.LayerNorm((8, 4), bias=False), nn.LayerNorm((5, 4), bias=False), {"normalized_shape": (5, 4)}),
    ("rms norm", nn.RMSNorm(8), nn.RMSNorm(5), {"normalized_shape": (5,)}),
    ("group norm", nn.GroupNorm(2, 8), nn.GroupNorm(2, 6), {"num_channels": 6, "num_groups": 2}),
    ("norm by groups of 2", nn.GroupNorm(4, 8), nn.GroupNorm(3, 6), {"num_channels": 6, "num_groups": 3}),
    ("prelu", nn.PReLU(8), nn.PReLU(5), {"num_parameters": 5}),
    ("embedding", nn.Embedding(9, 8, padding_idx=1), nn.Embedding(7, 5, padding_idx=1),
     {"num_embeddings": 7, "embedding_dim": 5}),
    ("parameters", nn.ParameterList([torch.ones(8, 1)]), nn.ParameterList([torch.ones(5, 1)]), {}),
]  # fmt: skip


@pytest.mark.parametrize(("dense", "small", "widths"), [row[1:] for row in LAYERS], ids=[row[0] for row in LAYERS])
def test_widths_of(dense: nn.Module, small: nn.Module, widths: dict[str, Any]) -> None:
    model = copy.deepcopy(dense)
    _, missing, unexpected = load_state_dict_pruned(model, small.state_dict())
    assert (missing, unexpected) == ([], [])
    assert {key: getattr(model, key) for key in widths} == widths
    assert {key: getattr(small, key) for key in widths} == widths
    for key, value in small.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


class Front(nn.Sequential):
    """A convolution in front of a grouped one: it tells which of two readings is right."""

    def __init__(self, middle: int, groups: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(3, middle, 1), nn.Conv2d(middle, outputs, 3, groups=groups))


@pytest.mark.parametrize(("middle", "groups", "outputs"), [(16, 4, 8), (8, 2, 8)])
def test_the_layer_in_front_decides_between_two_readings(middle: int, groups: int, outputs: int) -> None:
    model, _, _ = load_state_dict_pruned(Front(16, 4, 16), Front(middle, groups, outputs).state_dict())
    assert (model[1].groups, model[1].in_channels, model[1].out_channels) == (groups, middle, outputs)
    assert model(torch.ones(1, 3, 4, 4)).shape[1] == outputs


def test_the_model_keeps_everything_but_values_and_widths() -> None:
    model = zoo.architecture("shapes")[0].double().to(memory_format=torch.channels_last)
    source, _ = pruned("shapes")
    model.train()
    model.stem.eval()
    model.merge.weight.requires_grad_(False)
    model.merge.weight.decay = False
    seen: list[str] = []
    model.merge.register_forward_hook(lambda *_: seen.append("module"))
    model.stem.weight.register_hook(lambda gradient: seen.append("tensor"))
    model.up.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    model.head.register_buffer("extra", torch.ones(2), persistent=False)
    load_state_dict_pruned(model, source.state_dict())
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float64}
    assert model.training
    assert not model.stem.training
    assert not model.merge.weight.requires_grad
    assert model.merge.weight.decay is False
    assert model.grouped.weight.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(model.scale, nn.Parameter)
    model(torch.ones(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    assert sorted(seen) == ["accumulated", "module", "tensor"]


class Tied(nn.Module):
    """A language model's head that shares the embedding's weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("left_out", [None, "head.weight", "embed.weight"])
def test_tied_weights_stay_tied(left_out: str | None) -> None:
    weights = {key: value for key, value in Tied(5).state_dict().items() if key != left_out}
    model, missing, unexpected = load_state_dict_pruned(Tied(), weights)
    assert (missing, unexpected) == ([], [])
    assert model.head.weight is model.embed.weight
    assert (model.head.in_features, model.embed.embedding_dim) == (5, 5)
    assert torch.equal(model.head.weight, next(iter(weights.values())))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", ""])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, lambda model: torch.compile(model)])
def test_wrappers_in_names_are_passed_over(prefix: str, wrap: Any) -> None:
    source, inputs = pruned("groupnorm")
    weights = {prefix + key: value for key, value in source.state_dict().items()}
    model = zoo.architecture("groupnorm")[0]
    _, missing, unexpected = load_state_dict_pruned(wrap(model), weights)
    assert (missing, unexpected) == ([], [])
    assert torch.equal(outputs_of(model, inputs)[0], outputs_of(source, inputs)[0])


def test_a_submodule_that_is_called_module_is_no_wrapper() -> None:
    average = torch.optim.swa_utils.AveragedModel(nn.Linear(4, 8))
    source = torch.optim.swa_utils.AveragedModel(nn.Linear(3, 5))
    assert load_state_dict_pruned(average, source.state_dict())[1:] == ([], [])
    assert average.module.in_features == 3
    plain = nn.Linear(4, 8)
    assert load_state_dict_pruned(plain, source.state_dict())[1:] == ([], ["n_averaged"])
    assert torch.equal(plain.weight, source.module.weight)


def test_missing_and_unexpected_names_are_told() -> None:
    weights = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).state_dict()
    weights["extra"] = torch.ones(1)
    del weights["1.bias"]
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    kept = model[1].bias.detach().clone()
    _, missing, unexpected = load_state_dict_pruned(model, weights)
    assert (missing, unexpected) == (["1.bias"], ["extra"])
    assert torch.equal(model[1].bias, kept)
    assert model(torch.ones(1, 4)).shape == (1, 2)


class Attention(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(16, 3 * width), nn.Linear(width, 16)


class BareNorm(nn.Sequential):
    def __init__(self, width: int = 8) -> None:
        super().__init__(nn.Linear(4, width), nn.Linear(width, 8), nn.Linear(8, 3))
        self.norm = nn.LayerNorm(8, elementwise_affine=False)


class Broken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.good, self.bad = nn.Linear(3, width), nn.Linear(width, 4)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a hook of the user failed")


REFUSED: list[tuple[str, nn.Module, Any, str]] = [
    ("heads", Attention(), Attention(8).state_dict(), "qkv do not tell num_heads.*load_pruned"),
    ("attention", nn.MultiheadAttention(8, 2), nn.MultiheadAttention(4, 2).state_dict(), "cannot be read.*load_pruned"),
    ("recurrent", nn.LSTM(4, 8), nn.LSTM(4, 6).state_dict(), "LSTM.*load_pruned"),
    ("groups", nn.Sequential(nn.Identity(), nn.Conv2d(16, 16, 1, groups=4)),
     {"1.weight": torch.ones(6, 4, 1, 1), "1.bias": torch.ones(6)}, "how many groups.*load_pruned"),
    ("bare norm", BareNorm(), BareNorm(6).state_dict(), "norm.*whether its width is still 8.*load_pruned"),
    ("padding", nn.Embedding(9, 4, padding_idx=8), nn.Embedding(5, 4).state_dict(), "padding index 8.*load_pruned"),
    ("bias", nn.Linear(4, 8), {"weight": torch.ones(5, 4)}, "bias has 8 entries, its layer 5 outputs"),
    ("dimensions", nn.Linear(4, 8), {"weight": torch.ones(5, 4, 1)}, "another architecture"),
    ("names", nn.Linear(4, 8), {"conv.weigth": torch.ones(5, 4)}, "none of their names"),
    ("nested", nn.Linear(4, 8), {"model": nn.Linear(4, 8).state_dict()}, r"pass weights\['model'\]"),
    ("type", nn.Linear(4, 8), [torch.ones(2)], "a list is not a state dict"),
    ("a number", nn.Linear(4, 8), {0: torch.ones(2)}, "0 is not a name"),
    ("empty", nn.Linear(4, 8), {"epoch": 3}, "no tensor is in it"),
    ("tied", Tied(), {"embed.weight": torch.ones(11, 5), "head.weight": torch.ones(11, 6)}, "shares its tensor"),
    ("hook", Broken(8), {"good.weight": torch.ones(5, 3), "good.bias": torch.ones(5), "bad.weight": torch.ones(4, 5),
                         "bad.bias": torch.ones(4)}, "a hook of the user failed"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "weights", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_read_is_refused_and_changes_nothing(model: nn.Module, weights: Any, message: str) -> None:
    tensors = dict(model.named_parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    described = repr(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_state_dict_pruned(model, weights)
    assert "\n" not in str(caught.value)
    assert all(value is tensors[key] for key, value in model.named_parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert repr(model) == described


def test_two_readings_of_a_group_norm_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model, _, _ = load_state_dict_pruned(nn.GroupNorm(4, 16), nn.GroupNorm(4, 12).state_dict())
    assert (model.num_groups, model.num_channels) == (4, 12)
    assert "12 channels are read as 4 groups; 3 groups of 4 would have the same shapes" in caplog.text
    assert "load_pruned" in caplog.text


def test_a_norm_without_tensors_follows_the_layer_in_front() -> None:
    def build(width: int) -> nn.Sequential:
        norms = [nn.LayerNorm(width, elementwise_affine=False), nn.GroupNorm(2, width, affine=False)]
        return nn.Sequential(nn.Linear(4, width), *norms, nn.Linear(width, 3))

    model, _, _ = load_state_dict_pruned(build(8), build(6).state_dict())
    assert (model[1].normalized_shape, model[2].num_channels, model[2].num_groups) == ((6,), 6, 2)
    assert model(torch.ones(2, 4)).shape == (2, 3)
