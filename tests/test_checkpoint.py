"""save_pruned and load_pruned: what a file keeps, what a model keeps, and files that are not whole."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pruningawaretraining import Pruning, load_pruned, save_pruned
from pruningawaretraining.checkpoint.files import KEY, read_file
from pruningawaretraining.checkpoint.records import record_of
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.files import write_atomically
from pruningawaretraining.models.calling import outputs_of


def pruned(name: str, removed: bool = True) -> tuple[nn.Module, Tensor]:
    model, inputs = zoo.architecture(name)
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.4}, "end": 1}]}, example_inputs=inputs)
    pruner.prune(model, 0)
    if removed:
        pruner.prune(model, 1)
    return model, inputs


def dense(name: str) -> nn.Module:
    return zoo.architecture(name)[0]


def contents(model: nn.Module) -> dict[str, Any]:
    """Everything that a failed load must not change."""
    widths = {f"{name}.{key}": value for name, one in model.named_modules() for key, value in vars(one).items()
              if isinstance(value, (int, tuple))}  # fmt: skip
    return {**widths, **{key: value.clone() for key, value in model.state_dict().items()}}


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    now = contents(model)
    assert now.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(now[key], value) if isinstance(value, Tensor) else now[key] == value, key


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "masked"])
@pytest.mark.parametrize("name", [*zoo.SMALL, "mobilenet_v2", "convnext_tiny"])
def test_a_file_brings_the_dense_class_to_the_same_outputs(name: str, removed: bool, tmp_path: Path) -> None:
    model, inputs = pruned(name, removed)
    again = load_pruned(dense(name), save_pruned(model, tmp_path / "new" / "m.safetensors"))
    assert all(torch.equal(*pair) for pair in zip(outputs_of(again, inputs), outputs_of(model, inputs), strict=True))
    assert [str(one) for one in again.modules() if not list(one.children())] == [
        str(one) for one in model.modules() if not list(one.children())
    ]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_the_model_keeps_what_is_its_own(tmp_path: Path) -> None:
    path = save_pruned(pruned("shapes")[0], tmp_path / "m.safetensors")
    model = dense("shapes").train().to(memory_format=torch.channels_last)
    model.stem.eval()
    model.merge.weight.requires_grad_(False)
    seen: list[str] = []
    model.merge.register_forward_hook(lambda *_: seen.append("module"))
    model.stem.weight.register_hook(lambda gradient: seen.append("tensor"))
    assert load_pruned(model, path) is model
    assert (model.training, model.stem.training, model.merge.weight.requires_grad) == (True, False, False)
    assert model.grouped.weight.is_contiguous(memory_format=torch.channels_last)
    model(zoo.images(8)).sum().backward()
    assert sorted(seen) == ["module", "tensor"]


class Attention(nn.Module):
    """What removal of heads leaves behind: attributes that no shape tells, and a tied weight."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, 4
        self.qkv, self.proj = nn.Linear(16, 3 * 4 * heads), nn.Linear(4 * heads, 16)
        self.embed, self.out = nn.Embedding(11, 16), nn.Linear(16, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(x + self.proj(y))


def test_heads_and_tied_weights_are_kept(tmp_path: Path) -> None:
    small, tokens = Attention(heads=3), torch.arange(10).view(2, 5)
    again = load_pruned(Attention(), save_pruned(small, tmp_path / "m.safetensors"))
    assert (again.num_heads, again.qkv.out_features, again.proj.in_features) == (3, 36, 12)
    assert again.out.weight is again.embed.weight
    assert torch.equal(again(tokens), small(tokens))
    assert "out.weight" not in load_file(tmp_path / "m.safetensors") or "embed.weight" not in load_file(
        tmp_path / "m.safetensors"
    )


@pytest.mark.parametrize("part", [0, 1, 7, 8, 9, 200, -4000, -1])
def test_a_truncated_file_is_refused(part: int, tmp_path: Path) -> None:
    path = save_pruned(pruned("groupnorm")[0], tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:part])
    model = dense("groupnorm")
    before = contents(model)
    with pytest.raises(CheckpointError, match=r"m.safetensors' cannot be read: .* Allowed: a whole file of save_pr"):
        load_pruned(model, path)
    assert_unchanged(model, before)


DAMAGE: list[tuple[str, Any, str]] = [
    ("not json", "{", "its description: .* cannot be read: not JSON"),
    ("no object", "[1]", "is damaged: TypeError"),
    ("nothing in it", "{}", "is damaged: KeyError: 'aliases'"),
    ("unknown alias", {"aliases": {"a": "b"}}, "is damaged: KeyError: 'b'"),
    ("a list", {"modules": []}, "is damaged: AttributeError"),
    ("another attribute", {"modules": {"conv1": {"forward": 3}}}, "are no widths"),
    ("no number", {"modules": {"conv1": {"out_channels": "3"}}}, "are no widths"),
    ("another layer", {"modules": {"conv9": {"out_channels": 3}}}, "does not fit GroupNormNet: 'conv9'"),
    ("not its attribute", {"modules": {"conv1": {"num_heads": 3}}}, "does not fit GroupNormNet: .*num_heads"),
    ("no record", {"record": None}, "is damaged: AttributeError"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_a_damaged_description_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    path = save_pruned(pruned("groupnorm")[0], tmp_path / "m.safetensors")
    text = change if isinstance(change, str) else json.dumps({**read_file(path)[1], **change})
    save_file(load_file(path), path, {KEY: text})
    model = dense("groupnorm")
    before = contents(model)
    with pytest.raises(CheckpointError, match=message):
        load_pruned(model, path)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"conv1.weight": None}, "the file does not have 'conv1.weight'"),
        ({"more": torch.ones(2)}, "the model does not have 'more'"),
        ({"conv1.weight": torch.ones(3)}, "'conv1.weight' has 4 dimensions, in the file 1: another architecture"),
    ],
)
def test_other_tensors_are_refused(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = save_pruned(pruned("groupnorm")[0], tmp_path / "m.safetensors")
    text = json.dumps(read_file(path)[1])
    changed = {key: value for key, value in {**load_file(path), **tensors}.items() if value is not None}
    save_file(changed, path, {KEY: text})
    model = dense("groupnorm")
    before = contents(model)
    with pytest.raises(CheckpointError, match=message):
        load_pruned(model, path)
    assert_unchanged(model, before)


def test_what_is_no_model_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model: OrderedDict is not a model"):
        save_pruned(dense("groupnorm").state_dict(), tmp_path / "m.safetensors")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is a folder"):
        save_pruned(dense("groupnorm"), tmp_path)
    with pytest.raises(CheckpointError, match="model: NoneType is not a model"):
        load_pruned(None, save_pruned(dense("groupnorm"), tmp_path / "m.safetensors"))  # type: ignore[arg-type]
    assert [one.name for one in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = save_pruned(pruned("groupnorm")[0], tmp_path / "m.safetensors")
    before = path.read_bytes()

    def fail(temporary: str) -> None:
        Path(temporary).write_bytes(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["m.safetensors"]
    save_pruned(copy.deepcopy(dense("groupnorm")), path)
    assert path.read_bytes() != before
    with pytest.raises(CheckpointError, match="there is no file"):
        load_pruned(dense("groupnorm"), tmp_path / "n.safetensors")


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    found = {save_pruned(model, tmp_path / f"{number}.safetensors").read_bytes() for number in range(8)}
    assert len(found) == 1
    assert sorted(load_pruned(model, tmp_path / "0.safetensors").state_dict()) == sorted(model.state_dict())


def test_what_a_pruner_did_is_saved_after_the_pruner_is_gone(tmp_path: Path) -> None:
    def pruned() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=torch.randn(1, 4))
        pruner.prune(model, 0)
        return model

    model = pruned()
    gc.collect()
    save_pruned(model, tmp_path / "p.safetensors")
    again = load_pruned(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), tmp_path / "p.safetensors")
    pruner = Pruning(again, {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=torch.randn(1, 4))
    assert (pruner.phase, pruner.sparsity, pruner.macs.dense) == ("finetune", 0.5, 48)


def test_copies_averages_and_pickles_take_the_record_along(tmp_path: Path) -> None:
    model, _ = pruned("shapes")
    save_pruned(model, tmp_path / "m.safetensors")
    loaded = load_pruned(dense("shapes"), tmp_path / "m.safetensors")
    known = record_of(loaded)
    assert known is not None and known["phase"] == "finetune" and record_of(model) == known
    average = torch.optim.swa_utils.AveragedModel(loaded)
    torch.save(loaded, tmp_path / "whole.pt")
    unpickled = torch.load(tmp_path / "whole.pt", weights_only=False)
    for number, copied in enumerate((copy.deepcopy(loaded), average.module, unpickled)):
        assert record_of(copied) == known
        save_pruned(copied, tmp_path / f"{number}.safetensors")
        assert read_file(tmp_path / f"{number}.safetensors")[1]["record"] == known


class Scaled(nn.Module):
    """Divides by a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)
        self.register_buffer("std", torch.linspace(0.5, 1.5, 12), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() / self.std)


def test_a_buffer_that_no_state_dict_has_is_kept_as_it_was_sliced(tmp_path: Path) -> None:
    model, inputs = Scaled(), torch.randn(3, 6)
    Pruning(model, {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=inputs).prune()
    assert len(model.std) == 6
    path = save_pruned(model, tmp_path / "m.safetensors", standalone=True)
    again = load_pruned(Scaled(), path)
    assert torch.equal(again(inputs), model(inputs)) and torch.equal(again.std, model.std)
    assert "std" not in again.state_dict()
    twice = load_pruned(Scaled(), save_pruned(again, tmp_path / "n.safetensors"))
    assert torch.equal(twice(inputs), model(inputs))


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def test_a_model_that_was_saved_masked_goes_on(tmp_path: Path) -> None:
    model, inputs = normed(), torch.randn(64, 8)
    rules = {"rules": [{"layers": ["0"], "target": {"sparsity": 0.5}, "end": 1}]}
    Pruning(model, rules, example_inputs=inputs).prune(model, 0)
    expected = model(inputs)
    again = load_pruned(normed(), save_pruned(model, tmp_path / "m.safetensors"))
    assert torch.equal(again(inputs), expected) and torch.equal(copy.deepcopy(again)(inputs), expected)
    assert torch.equal(load_pruned(normed(), save_pruned(again, tmp_path / "n.safetensors"))(inputs), expected)
    masked = [number for number in range(16) if not bool(again[0].weight[number].any())]
    pruner = Pruning(again, {"rules": [{"target": {"sparsity": 0.5}, "start": 9}]}, example_inputs=inputs)
    assert torch.equal(again(inputs), expected)
    pruner.remove_channels({"0": masked})
    assert again[1].normalized_shape == (16 - len(masked),)
    assert torch.allclose(again(inputs), expected, atol=1e-5)


def test_loading_takes_no_step_of_a_spectral_norm(tmp_path: Path) -> None:
    def build() -> nn.Module:
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        return nn.Sequential(layer, nn.ReLU(), nn.Linear(6, 8), nn.Linear(8, 3))

    model, inputs = build(), torch.randn(3, 6)
    Pruning(model, {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=inputs).prune()
    again = load_pruned(build().train(), save_pruned(model, tmp_path / "m.safetensors"))
    assert again.training and all(torch.equal(one, model.state_dict()[key]) for key, one in again.state_dict().items())
