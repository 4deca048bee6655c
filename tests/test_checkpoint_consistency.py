"""Files and weights that are whole and yet wrong: what they say of layers is compared with their tensors, and a model
that ran must run afterwards; whatever is refused has changed nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from test_checkpoint import assert_unchanged, contents, dense, pruned
from torch import Tensor, nn

from pruningawaretraining import Pruning, load_pruned, load_state_dict_pruned, save_pruned
from pruningawaretraining.checkpoint.consistency import disagreements
from pruningawaretraining.checkpoint.files import KEY, read_file
from pruningawaretraining.errors import LONGEST, CheckpointError, ModelError
from pruningawaretraining.models.trial import Trial


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 6, 2), nn.PReLU(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 5), nn.LayerNorm(5),
    )  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_pruned(net(), tmp_path / "m.safetensors")


def rewritten(
    path: Path, widths: dict[str, dict[str, Any]] | None = None, tensors: dict[str, Tensor] | None = None
) -> None:
    description = read_file(path)[1]
    for name, changes in (widths or {}).items():
        description["modules"][name].update(changes)
    save_file({**load_file(path), **(tensors or {})}, path, {KEY: json.dumps(description)})


WIDTHS: list[tuple[str, dict[str, Any]]] = [
    ("0", {"groups": 2}),
    ("0", {"groups": 0}),
    ("0", {"out_channels": -1}),
    ("0", {"out_channels": 10**30}),
    ("0", {"out_channels": 4}),
    ("0", {"in_channels": 2}),
    ("0", {"out_channels": [8]}),
    ("0", {"out_channels": []}),
    ("0", {"out_channels": True}),
    ("1", {"num_features": 10**30}),
    ("1", {"num_features": 7}),
    ("3", {"groups": 4}),
    ("3", {"groups": 4, "in_channels": 4, "out_channels": 4}),
    ("4", {"num_groups": 3}),
    ("4", {"num_channels": 6}),
    ("5", {"in_channels": 6, "out_channels": 8}),
    ("6", {"num_parameters": 1}),
    ("9", {"in_features": 5}),
    ("9", {"out_features": 0}),
    ("10", {"normalized_shape": [4]}),
    ("10", {"normalized_shape": [5, 1]}),
]


@pytest.mark.parametrize(("layer", "widths"), WIDTHS)
def test_widths_that_are_not_those_of_the_tensors(layer: str, widths: dict[str, Any], file: Path) -> None:
    if "num_groups" in widths:
        pytest.skip("a file does not say it") if "num_groups" not in read_file(file)[1]["modules"]["4"] else None
    rewritten(file, {layer: widths})
    model = net()
    before = contents(model)
    with pytest.raises(CheckpointError) as caught:
        load_pruned(model, file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= LONGEST
    assert_unchanged(model, before)


TENSORS: dict[str, dict[str, Tensor]] = {
    "a bias of another layer": {"0.bias": torch.zeros(5)},
    "fewer outputs": {"0.weight": torch.zeros(5, 3, 3, 3), "0.bias": torch.zeros(5)},
    "no outputs": {"0.weight": torch.zeros(0, 3, 3, 3), "0.bias": torch.zeros(0)},
    "statistics of another width": {"1.running_mean": torch.zeros(3)},
    "a larger layer": {"9.weight": torch.zeros(5, 600)},
    "another kernel": {"0.weight": torch.zeros(8, 3, 3)},
    "whole numbers": {"0.weight": torch.zeros(8, 3, 3, 3, dtype=torch.int64)},
    "whole numbers in a bias": {"9.bias": torch.zeros(5, dtype=torch.int64)},
    "fractions of batches": {"1.num_batches_tracked": torch.tensor(0.5)},
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_fit_each_other(kind: str, file: Path) -> None:
    rewritten(file, tensors=TENSORS[kind])
    model = net()
    before = contents(model)
    with pytest.raises(CheckpointError):
        load_pruned(model, file)
    assert_unchanged(model, before)


def narrower(model: nn.Sequential, first: int, second: int) -> dict[str, Tensor]:
    """Weights whose first convolution gives so many channels where the second takes so many."""
    state = dict(model.state_dict())
    state.update({"0.weight": torch.zeros(first, 3, 3, 3), "0.bias": torch.zeros(first)})
    state["2.weight"] = torch.zeros(8, second, 3, 3)
    return state


def two() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


@pytest.mark.parametrize(("first", "second"), [(5, 7), (5, 8), (8, 5), (1, 2)])
def test_weights_with_which_a_model_cannot_run_are_refused(first: int, second: int, tmp_path: Path) -> None:
    model = two()
    before = contents(model)
    with pytest.raises(CheckpointError, match=r"^weights: Sequential does not run with them: "):
        load_state_dict_pruned(model, narrower(model, first, second))
    assert_unchanged(model, before)
    load_state_dict_pruned(model, narrower(model, 5, 5))
    assert model(torch.zeros(1, 3, 6, 6)).shape == (1, 8, 6, 6)
    other = two()
    path = save_pruned(load_state_dict_pruned(other, narrower(other, 5, 5))[0], tmp_path / "m.safetensors")
    wrong = 4 if second == 5 else second
    rewritten(path, {"2": {"in_channels": wrong}}, {"2.weight": torch.zeros(8, wrong, 3, 3)})
    model = two()
    before = contents(model)
    with pytest.raises(CheckpointError, match=r"^path: Sequential does not run with the tensors of the file: "):
        load_pruned(model, path)
    assert_unchanged(model, before)


def test_what_is_missing_is_said() -> None:
    model = two()
    weights = narrower(model, 5, 5)
    del weights["2.weight"]
    with pytest.raises(CheckpointError, match=r"does not run with them: .*; they lack '2.weight' \(1 in all\)"):
        load_state_dict_pruned(model, weights)


@pytest.mark.parametrize("name", [*zoo.SMALL, "resnet18", "mobilenet_v2", "convnext_tiny", "vit_tiny"])
def test_models_are_tried_and_what_is_right_is_let_through(name: str, tmp_path: Path) -> None:
    if name == "vit_tiny":
        timm = pytest.importorskip("timm")
        model, again = (timm.create_model("vit_tiny_patch16_224") for _ in range(2))
    else:
        model, again = pruned(name)[0], dense(name)
    assert disagreements(model) == {}
    trial = Trial(model)
    assert trial.inputs is not None and trial.failure() is None
    assert load_pruned(again, save_pruned(model, tmp_path / "m.safetensors")) is again


class Counting(nn.Module):
    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.calls = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.calls(x))


def test_a_trial_computes_nothing_and_calls_no_hooks() -> None:
    seen: list[Tensor] = []
    model = Counting(lambda x: seen.append(x) or x)  # type: ignore[func-returns-value]
    state = torch.get_rng_state()
    assert Trial(model).failure() is None
    assert {one.device.type for one in seen} == {"meta"} and torch.equal(torch.get_rng_state(), state)
    hooked: list[int] = []
    model.one.register_forward_hook(lambda *_: hooked.append(1))
    assert Trial(model).inputs is None and hooked == []
    assert Trial(Counting(lambda x: x if float(x.sum()) else -x)).inputs is None  # it wants values: not tried


RECORDS: list[tuple[str, Any]] = [
    *((key, value) for key in ("macs", "parameters", "kept_macs") for value in (None, -1, "x", [], {}, True, 1e400)),
    *(("groups", value) for value in (-1, "x", [["q"]], {"0": 1}, {"0": [4]}, {"0": [4, 8]}, {"0": [4, -1]})),
    *(("elements", value) for value in (None, -1, "x", [["q"]], {"a": 1})),
    *(("rules", value) for value in (-1, "x", [], {"a": 1}, {"a": {"pattern": "channel"}})),
    *(("phase", value) for value in (None, -1, [])),
    *(("sparsity", value) for value in (None, -1, "x", 2)),
]


@pytest.mark.parametrize(("key", "value"), [*RECORDS, ("macs", ...), ("parameters", ...)])
def test_a_record_that_no_pruner_writes_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    model = net()
    rules = [{"target": {"macs": 0.7}}]
    Pruning(model, {"rules": rules}, example_inputs=torch.randn(1, 3, 8, 8)).prune()
    path = save_pruned(model, tmp_path / "m.safetensors")
    description = read_file(path)[1]
    description["record"][key] = value
    if value is ...:
        del description["record"][key]
    save_file(load_file(path), path, {KEY: json.dumps(description)})
    fresh = net()
    before = contents(fresh)
    with pytest.raises(CheckpointError, match=f"record.*{key}"):
        load_pruned(fresh, path)
    assert_unchanged(fresh, before)


class TwoInputs(nn.Module):
    """Inputs that nobody can guess: two, of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 8), nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        out: Tensor = self.head(self.left(one) + self.right(other))
        return out


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_a_model_whose_inputs_cannot_be_guessed_is_run_on_those_that_are_given(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair = (torch.randn(2, 3), torch.randn(2, 5))
    inputs = pair if form == "tuple" else dict(zip(("one", "other"), pair, strict=True))
    dense = {name: one.clone() for name, one in TwoInputs().state_dict().items()}
    fits = {name: one[:6] if name.startswith(("left", "right")) else one for name, one in dense.items()}
    fits["head.weight"] = dense["head.weight"][:, :6]
    broken = {**fits, "left.weight": dense["left.weight"][:4], "left.bias": dense["left.bias"][:4]}

    small, _, _ = load_state_dict_pruned(TwoInputs(), fits, example_inputs=inputs)
    assert small(*pair).shape == (2, 2) and small.left.out_features == 6
    assert caplog.text == ""
    model = TwoInputs()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="weights: TwoInputs does not run with them: .*size"):
        load_state_dict_pruned(model, broken, example_inputs=inputs)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert model(*pair).shape == (2, 2)
    with pytest.raises(ModelError, match="example_inputs: TwoInputs rejects"):
        load_state_dict_pruned(model, fits, example_inputs=pair[0])
    assert caplog.text == ""
    load_state_dict_pruned(TwoInputs(), fits)
    assert "whether TwoInputs runs with its new shapes was not tried" in caplog.text


class WithDummies(TwoInputs):
    """Says what it takes, as models of transformers do."""

    dummy_inputs = {"one": torch.zeros(2, 3), "other": torch.zeros(2, 5)}


def test_a_model_that_says_what_it_takes_is_tried_on_it(caplog: pytest.LogCaptureFixture) -> None:
    weights = TwoInputs().state_dict()
    broken = {**weights, "left.weight": weights["left.weight"][:4], "left.bias": weights["left.bias"][:4]}
    with pytest.raises(CheckpointError, match="WithDummies does not run with them"):
        load_state_dict_pruned(WithDummies(), broken)
    load_state_dict_pruned(WithDummies(), weights)
    assert caplog.text == ""
