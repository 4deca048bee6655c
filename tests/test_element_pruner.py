"""Slices, blocks, N:M and single weights in training: the loops and configs that users have, masks, resumed runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pruningawaretraining import Pruning, load_pruned, save_pruned
from pruningawaretraining.errors import ConfigError, ModelError, TargetError

STEP_WISE = """
version: 1.0
model:
  name: "bert-mini"
  framework: "pytorch"
pruning:
  approach:
    weight_compression_pytorch:
      start_step: 0
      end_step: 0
      not_to_prune_names: ["classifier", "pooler", ".*embeddings*"]
      prune_layer_type: ["Linear"]
      target_sparsity: 0.9
      max_sparsity_ratio_per_layer: 0.98
      pruners:
        - !Pruner
            exclude_names: [".*query", ".*key", ".*value"]
            pattern: "1x1"
            update_frequency_on_step: 2
            prune_domain: "global"
            prune_type: "snip_momentum"
            sparsity_decay_type: "exp"
        - !Pruner
            exclude_names: [".*output", ".*intermediate"]
            pattern: "4x1"
            update_frequency_on_step: 2
            prune_domain: "global"
            prune_type: "snip_momentum"
            sparsity_decay_type: "exp"
"""


class Layer(nn.Module):
    """One encoder layer with the names that BERT gives its linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
                "output": nn.ModuleDict({"dense": nn.Linear(width, width)}),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 2 * width)})
        self.output = nn.ModuleDict({"dense": nn.Linear(2 * width, width)})
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        names = self.attention["self"]
        mixed = functional.scaled_dot_product_attention(names["query"](x), names["key"](x), names["value"](x))
        x = self.norm(x + self.attention["output"]["dense"](mixed))
        return x + self.output["dense"](functional.gelu(self.intermediate["dense"](x)))


class Bert(nn.Module):
    """Embeddings, two encoder layers, a pooler and a classifier."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(20, width)
        self.layer = nn.ModuleList(Layer(width) for _ in range(2))
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, 2)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(ids)
        for layer in self.layer:
            x = layer(x)
        return functional.cross_entropy(self.classifier(torch.tanh(self.pooler(x[:, 0]))), labels)


def bert() -> Bert:
    torch.manual_seed(0)
    return Bert()


def batches(count: int = 5) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 20, (count, 4, 6), generator=generator)
    return [{"ids": one, "labels": one[:, 0] % 2} for one in ids]


def zeros(weight: torch.Tensor) -> float:
    return float((weight == 0).double().mean())


def step_wise_file(tmp_path: Path) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(STEP_WISE)
    return str(file)


def run_template(file: str, epochs: int, do_prune: bool = True) -> tuple[Pruning, Bert]:
    """The template of the step-wise system, with the import changed."""
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_dataloader = batches()
    num_iterations, total_iterations = len(train_dataloader), epochs * len(train_dataloader)
    pruner = Pruning(file)
    if do_prune:
        pruner.update_items_for_all_pruners(start_step=int(0.4 * num_iterations), end_step=int(total_iterations))
    else:
        pruner.update_items_for_all_pruners(start_step=total_iterations + 1, end_step=total_iterations + 1)
    pruner.model = model
    pruner.on_train_begin()
    for _ in range(epochs):
        model.train()
        for step, batch in enumerate(train_dataloader):
            pruner.on_step_begin(step)
            loss = model(**batch)
            loss.backward()
            pruner.on_before_optimizer_step()
            optimizer.step()
            pruner.on_after_optimizer_step()
            optimizer.zero_grad()
    return pruner, model


def test_the_template_of_the_step_wise_users_runs(tmp_path: Path) -> None:
    pruner, model = run_template(step_wise_file(tmp_path), epochs=4)
    assert pruner.steps == 20
    assert pruner.sparsity == pytest.approx(0.9, abs=1e-3)
    assert pruner.phase == "finetune"
    attention = model.layer[0].attention
    in_blocks = (attention["self"]["query"].weight != 0).view(4, 4, 16).float().mean(1)
    assert set(in_blocks.flatten().tolist()) <= {0.0, 1.0}
    single = [layer.output["dense"].weight for layer in model.layer] + [
        layer.intermediate["dense"].weight for layer in model.layer
    ]
    single += [layer.attention["output"]["dense"].weight for layer in model.layer]
    weights = torch.cat([weight.flatten() for weight in single])
    assert int((weights == 0).sum()) == int(0.9 * len(weights))
    for untouched in (model.classifier, model.pooler, model.embeddings):
        assert zeros(untouched.weight) == 0


def test_the_template_without_pruning_leaves_the_model_dense(tmp_path: Path) -> None:
    pruner, model = run_template(step_wise_file(tmp_path), epochs=1, do_prune=False)
    assert pruner.sparsity == 0
    assert all(zeros(weight) == 0 for name, weight in model.named_parameters() if name.endswith("dense.weight"))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip


X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(8) % 4


def rules(*given: dict[str, Any]) -> dict[str, Any]:
    return {"rules": list(given)}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruning | None = None) -> None:
    model.train()
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(X), Y)
    if pruner is not None:
        loss = loss + pruner.slice_regularize(model)
    loss.backward()
    optimizer.step()


def test_channels_and_slices_of_one_file(tmp_path: Path) -> None:
    config = {
        "channel_sparsity_args": {
            "is_prune": True, "global_pruning": False, "block_size": 1, "start_epoch": 0, "end_epoch": 2,
            "epoch_rate": 1, "global_prune_rate": 0.5, "mac_target": None, "max_pruning_rate": 0.9,
            "pruning_method": "GroupNormPruner", "regularize": {"reg": 1e-3, "mac_reg": 0.0, "gamma": 1},
            "layers": ["0"], "input_shape": [1, 3, 6, 6],
        },
        "slice_sparsity_args": {
            "is_prune": True, "start_epoch": 1, "end_epoch": 4, "epoch_rate": 1, "prune_rate": 0.5,
            "pruning_gradually": True, "pruning_mode": "Prune", "pruning_method": "L2_norm", "block_size": 4,
            "reg": 1e-3, "layers": ["3"],
        },
    }  # fmt: skip
    (tmp_path / "pruning_config.json").write_text(json.dumps(config))
    model = small()
    pruner = Pruning(model, str(tmp_path), model.forward)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    reached, phases = [], []
    for epoch in range(6):
        model.train()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(X), Y)
        penalty = pruner.slice_regularize(model)
        assert (float(penalty.detach()) > 0) == (epoch < 5)
        (loss + penalty).backward()
        pruner.channel_regularize(model)
        optimizer.step()
        pruner.prune(model, epoch)
        reached.append((model[3].in_channels, round(float((~pruner.masks["3.weight"]).double().mean()), 3)))
        phases.append(pruner.phase)
    assert [width for width, _ in reached] == [16, 16, 8, 8, 8, 8]
    slices = 2 * 8 * 9
    assert reached[-1][1] == 0.5
    assert int((~pruner.masks["3.weight"]).sum()) == slices // 2
    assert phases[-1] == "finetune"
    by_slice = (model[3].weight.detach() != 0).view(4, 2, 8, 3, 3).float().mean(0)  # block b: filters b, b + 2 ...
    assert set(by_slice.flatten().tolist()) == {0.0, 1.0}


PATTERNS: list[Any] = [
    "4x1", "1x4", "3x2", "channelx1", "1xchannel", "2:4", "1x1", {"type": "slice", "block_size": 4},
]  # fmt: skip
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
}


def dead(pruner: Pruning, model: nn.Module) -> int:
    """How many weights are masked; they and nothing of them may be anything but 0."""
    total = 0
    for one in pruner.engine.weights.rules if pruner.engine.weights is not None else ():
        for member, keep in one.grouping.expand(one.masks.keep_G.float(), outside=1.0):
            gone = keep.expand(member.parameter.shape) == 0
            assert (member.parameter[gone] == 0).all()
            total += int(gone.sum())
    return total


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_masked_weight_is_zero_after_every_step(pattern: Any, optimizer: str) -> None:
    model = small()
    made = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(3):  # momentum before the first mask
        train(model, made)
    rule = {"pattern": pattern, "unit": "step", "end": 4, "every": 2, "target": {"sparsity": 0.5}}
    pruner = Pruning(model, rules(rule), optimizer=made)
    counts = []
    for _ in range(7):
        train(model, made, pruner)
        counts.append(dead(pruner, model))
    assert counts == sorted(counts)
    assert counts[-1] > 0
    assert pruner.sparsity == pytest.approx(0.5, abs=0.05)  # windows over 3 inputs keep 2 of them
    for parameter, state in made.state.items():
        for value in state.values():
            if torch.is_tensor(value) and value.shape == parameter.shape and parameter.dim() > 1:
                assert (value[parameter == 0] == 0).all()


@pytest.mark.parametrize("criterion", ["snip_momentum", "taylor", "wanda", "retrain_free", "weight"])
@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_equals_an_uninterrupted_one(criterion: str, stop: int) -> None:
    rule = {"pattern": "4x1", "criterion": criterion, "unit": "step", "end": 6, "every": 3, "progressive": 3,
            "target": {"sparsity": 0.6}, "regularizer": {"type": "block_lasso", "strength": 1e-3}}  # fmt: skip

    def build() -> tuple[nn.Module, torch.optim.Optimizer, Pruning]:
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        return model, optimizer, Pruning(model, rules(rule), optimizer=optimizer)

    model, optimizer, pruner = build()
    saved: dict[str, Any] = {}
    for step in range(10):
        if step == stop:
            saved = copy.deepcopy(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}
            )
        pruner.on_step_begin(step)
        train(model, optimizer, pruner)
    again, second, resumed = build()
    resumed.load_state_dict(saved["pruner"])
    again.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    for step in range(stop, 10):
        resumed.on_step_begin(step)
        train(again, second, resumed)
    assert {name: mask.tolist() for name, mask in pruner.masks.items()} == {
        name: mask.tolist() for name, mask in resumed.masks.items()
    }
    assert pruner.sparsity == pytest.approx(0.6, abs=0.02)
    for first, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(first, other)


def test_hooks_called_twice_act_once() -> None:
    rule = {"pattern": "1x1", "criterion": "snip_momentum", "unit": "step", "start": 1, "end": 7, "every": 2,
            "progressive": 2, "target": {"sparsity": 0.8}}  # fmt: skip

    def run(times: int) -> tuple[list[float], nn.Module]:
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        pruner = Pruning(model, rules(rule))
        reached = []
        for step in range(9):
            for _ in range(times):
                pruner.on_train_begin() if step == 0 else None
                pruner.on_step_begin(step)
            optimizer.zero_grad()
            functional.cross_entropy(model(X), Y).backward()
            for _ in range(times):
                pruner.on_before_optimizer_step()
            optimizer.step()
            for _ in range(times):
                pruner.on_after_optimizer_step()
            reached.append(round(pruner.sparsity, 3))
        for _ in range(times):
            pruner.on_train_end()
        return reached, model

    once, model = run(1)
    twice, other = run(2)
    assert once == twice
    assert once == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.7, 0.8]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_an_event_waits_for_the_first_gradients() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruning(model, rules({"pattern": "1x1", "criterion": "snip", "unit": "step", "target": {"sparsity": 0.5}}))
    pruner.on_step_begin(0)
    assert pruner.sparsity == 0
    functional.cross_entropy(model(X), Y).backward()
    names = ["0.weight", "3.weight", "7.weight", "9.weight"]
    weights = dict(model.named_parameters())
    scores = torch.cat([(weights[name] * weights[name].grad).abs().flatten().detach() for name in names])
    optimizer.step()
    masks = torch.cat([pruner.masks[name] for name in names])
    assert float(scores[masks].min()) >= float(scores[~masks].max())
    assert int((~masks).sum()) == len(scores) // 2


def test_zeros_are_kept_or_locked() -> None:
    for option, expected in (({"keep_zeros": True, "target": {"sparsity": 0.5}}, 0.5), ({"mode": "lock"}, 0.25)):
        model = small()
        with torch.no_grad():
            model[3].weight[:2] = 0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rule = {"pattern": "1x1", "layers": ["3"], "unit": "step", "criterion": "weight", **option}
        pruner = Pruning(model, rules(rule), optimizer=optimizer)
        for step in range(3):
            pruner.on_step_begin(step)
            train(model, optimizer, pruner)
        assert zeros(model[3].weight) == expected
        assert zeros(model[3].weight[:2]) == 1
        assert pruner.sparsity == expected


def test_masks_are_lifted() -> None:
    model = small()
    config = {"pattern": "4x1", "layers": ["3"], "target": {"sparsity": 0.5}}
    pruner = Pruning(model, rules(config))
    pruner.prune(model, 0)
    lifted = Pruning(model, rules({**config, "mode": "unprune", "start": 1}))
    lifted.load_state_dict({**pruner.state_dict()})
    assert lifted.sparsity == 0.5 and lifted.prune(model, 0) is None
    assert lifted.prune(model, 1) == "masked" and lifted.sparsity == 0
    assert lifted.phase == "finetune" and zeros(model[3].weight) == 0.5  # until training moves them
    again = Pruning(model, rules({**config, "mode": "unprune", "start": 1}))
    again.load_state_dict(lifted.state_dict())
    assert again.phase == "finetune" and again.prune(model, 2) is None


@pytest.mark.parametrize("layers", [["3"], None])
def test_lifting_the_masks_of_another_rule_is_refused_by_its_key(layers: list[str] | None) -> None:
    pruned = {"name": "pruned", "pattern": "4x1", "layers": ["3"], "target": {"sparsity": 0.5}}
    lifted = {"name": "lifted", "pattern": "4x1", "layers": layers, "mode": "unprune", "start": 4}
    with pytest.raises(
        ConfigError, match=r"lifted.mode: 'unprune' lifts .* pruned prunes '3' .*release: true in pruned"
    ):
        Pruning(small(), rules(pruned, lifted))
    released = Pruning(small(), rules({**pruned, "release": True}))
    released.prune(released.model, 0)
    assert released.sparsity == 0 and zeros(released.model[3].weight) == 0.5


def test_a_removal_of_channels_leaves_slices_their_share() -> None:
    model = small()
    slices = {"name": "slices", "pattern": {"type": "slice", "block_size": 4}, "layers": ["3"], "scope": "local",
              "target": {"sparsity": 0.5}}  # fmt: skip
    channels = {"name": "channels", "layers": ["0"], "start": 1, "target": {"sparsity": 0.5}}
    pruner = Pruning(model, rules(channels, slices), example_inputs=X[:1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(3):
        train(model, optimizer, pruner)
        pruner.prune(model, epoch)
    assert model[3].in_channels == 8
    assert zeros(model[3].weight) == 0.5
    again = small()
    resumed = Pruning(again, rules(channels, slices), example_inputs=X[:1])
    resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
    again.load_state_dict(model.state_dict())
    assert resumed.phase == pruner.phase == "finetune"
    assert torch.equal(resumed.masks["3.weight"], pruner.masks["3.weight"])


def test_a_saved_pruned_model_keeps_its_zeros(tmp_path: Path) -> None:
    config = rules({"pattern": "2:4", "target": {"sparsity": 0.5}})
    model = small()
    pruner = Pruning(model, config, example_inputs=X[:1])
    pruner.prune(model, 0)
    save_pruned(model, tmp_path / "model.safetensors")
    loaded = load_pruned(small(), tmp_path / "model.safetensors")
    again = Pruning(loaded, config, example_inputs=X[:1])
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    train(loaded, optimizer, again)
    again.prune(loaded, 0)
    assert again.phase == "finetune"
    assert all(torch.equal(again.masks[name], mask) for name, mask in pruner.masks.items())
    dead(again, loaded)


def test_the_report_counts_masked_weights() -> None:
    model = small()
    pruner = Pruning(model, rules({"pattern": "1x1", "layers": ["7"], "target": {"sparsity": 0.5}}))
    pruner.prune(model, 0)
    report = pruner.report().to_dict()
    assert report["sparsity"] == 0.5
    assert report["parameters"]["dense"] - report["parameters"]["kept"] == 32
    assert report["groups"] == [{"number": 1, "source": "7.weight", "dependencies": [], "size": 64, "kept": 32}]
    assert [row["name"] for row in report["layers"]] == ["0", "3", "7", "9"]


def test_block_lasso_shrinks_blocks_after_the_step() -> None:
    model = small()
    rule = {"pattern": "4x1", "layers": ["7"], "regularizer": {"type": "block_lasso", "strength": 0.5}}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Pruning_ = Pruning(model, rules(rule), optimizer=optimizer)
    before = model[7].weight.detach().clone()
    optimizer.zero_grad()
    functional.cross_entropy(model(X), Y).backward()
    moved = before - 0.1 * model[7].weight.grad
    optimizer.step()
    norm = moved.view(2, 4, 8).norm(dim=1, keepdim=True)
    expected = (moved.view(2, 4, 8) * (1 - 0.05 / norm).clamp(min=0)).view(8, 8)
    assert torch.allclose(model[7].weight, expected, atol=1e-7)
    assert Pruning_.phase == "regularize"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([{"name": "a", "pattern": "4x1"}, {"name": "b", "pattern": "2:4", "layers": ["3"]}], ConfigError,
         "b.layers: '3' is pruned by a"),
        ([{"pattern": "2:4", "target": {"sparsity": 0.6}}], TargetError, "at most 0.5"),
        ([{"pattern": "4x1", "target": {"macs": 0.5}}], ConfigError, "target.macs"),
        ([{"pattern": "4x1", "application": "remove"}], ConfigError, "application"),
        ([{"pattern": "4x1", "layers": ["33"]}], ConfigError, "'33'"),
        ([{"pattern": "4x1", "regularizer": "growing_l2"}], ConfigError, "block_lasso, slice_penalty"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be(given: list[dict[str, Any]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Pruning(small(), rules(*[{"target": {"sparsity": 0.5}, **one} for one in given]))


def test_settings_change_before_training_only(tmp_path: Path) -> None:
    pruner = Pruning(step_wise_file(tmp_path))
    with pytest.raises(ModelError, match="assign it first"):
        pruner.on_train_begin()
    with pytest.raises(ConfigError, match="did you mean 'start_step'"):
        pruner.update_items_for_all_pruners(start_stp=3)
    with pytest.raises(ConfigError, match="end_step: 0 is before start_step"):
        pruner.update_items_for_all_pruners(start_step=3)
    pruner.update_items_for_all_pruners(end_step=8, target_sparsity=0.5, pattern="2:4", prune_type="magnitude")
    assert [rule.pattern["type"] for rule in pruner.config.rules] == ["n_of_m", "n_of_m"]  # type: ignore[index]
    pruner.model = bert()
    pruner.on_train_begin()
    with pytest.raises(ConfigError, match="training has begun"):
        pruner.update_items_for_all_pruners(end_step=9)
    with pytest.raises(ModelError, match="is not the Bert"):
        pruner.model = bert()


def test_the_flat_form_trains() -> None:
    config = {
        "target_sparsity": 0.5, "pattern": "4x1", "pruning_frequency": 2, "start_step": 0, "end_step": 4,
        "pruning_type": "snip_momentum_progressive",
        "pruning_configs": [{"op_names": ["layer.0"]}, {"op_names": ["layer.1"], "pattern": "2:4"}],
    }  # fmt: skip
    model = bert()
    pruner = Pruning(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches(7):
        optimizer.zero_grad()
        model(**batch).backward()
        optimizer.step()
    query = model.layer[1].attention["self"]["query"].weight
    assert ((query == 0).view(16, 4, 4).sum(-1) == 2).all()
    assert pruner.sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_removal_elsewhere_leaves_what_a_rule_has_gathered() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    channels = {"layers": ["0"], "target": {"sparsity": 0.5}, "start": 0, "end": 1, "application": "remove"}
    finer = {"pattern": "2:4", "layers": ["4"], "criterion": "snip_momentum", "target": {"sparsity": 0.5}, "start": 9}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    example = torch.randn(4, 6)
    pruner = Pruning(model, {"rules": [channels, finer]}, example_inputs=example, optimizer=optimizer)
    model(example).square().sum().backward()
    optimizer.step()
    gathered = pruner.state_dict()["elements"]["rules"][0]["collector"]
    pruner.prune(model, 0)
    assert model[0].out_features == 6
    kept = pruner.state_dict()["elements"]["rules"][0]["collector"]
    assert kept["steps"] == gathered["steps"] == 1
    assert all(torch.equal(a, b) for a, b in zip(kept["scores"], gathered["scores"], strict=True))


def test_layers_that_a_pattern_does_not_fit_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Others are pruned, and one warning says which stay, and why."""
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3))
    with caplog.at_level("WARNING"):
        Pruning(model, {"rules": [{"pattern": "2:4", "target": {"sparsity": 0.5}}]})
    (line,) = (one.message for one in caplog.records if "as they are" in one.message)
    assert line.startswith("rules[0]: '2:4' leaves 1 layers as they are: 0: its 2 inputs")


@pytest.mark.parametrize("pattern", ["channel", "unstructured"])
def test_an_event_leaves_the_hooks_of_criteria_where_they_are(pattern: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    rule = {"pattern": pattern, "criterion": "wanda", "target": {"sparsity": 0.5}, "end": 3}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=torch.randn(2, 6))
    model(torch.randn(4, 6))
    hooks = {
        name: list(module._forward_hooks) + list(module._forward_pre_hooks) for name, module in model.named_modules()
    }
    assert any(hooks.values())
    assert pruner.prune(model, 0) == "masked"
    after = {
        name: list(module._forward_hooks) + list(module._forward_pre_hooks) for name, module in model.named_modules()
    }
    assert after == hooks, "a compiled model would be compiled again"


@pytest.mark.parametrize("pattern", ["slice", "4x1", "2x3", "2:4", "unstructured"])
def test_masks_of_whole_weights_keep_what_is_in_no_group(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """11 rows and 9 columns are no multiple of any block; memory that is not written is taken to be 0."""
    torch.manual_seed(0)
    model = nn.Conv2d(9, 11, 3) if pattern == "slice" else nn.Linear(9, 11)
    pruner = Pruning(nn.Sequential(model), rules({"pattern": pattern, "target": {"sparsity": 0.5}}))
    pruner.prune()
    (masks,) = pruner.engine.masks
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", torch.zeros_like)
        ((weight, keep_W),) = masks._writer.factors()
    assert weight is model.weight and bool((weight == 0).any())
    assert torch.equal(keep_W.bool(), weight != 0)
    ((_, expected),) = masks.grouping.expand(masks.keep_G.float(), outside=1.0)
    assert torch.equal(keep_W.bool(), expected.expand_as(weight).bool())
