"""The facade: loops as users write them, phases, firing, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from pruningawaretraining import Pruner, Pruning, count_macs, load_pruned, save_pruned
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.models.calling import outputs_of


class Net(nn.Module):
    """Two residual convolutions and a classifier; the smallest model with a coupled stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 16, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2, 3])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruning | None = None, steps: int = 1) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(X), Y).backward()
        if pruner is not None:
            pruner.channel_regularize(model)
        optimizer.step()


def rules(**rule: Any) -> dict[str, Any]:
    return {"rules": [rule]}


def test_the_loop_of_the_json_users_runs_unchanged(tmp_path: Path) -> None:
    config = {
        "channel_sparsity_args": {
            "is_prune": True, "global_pruning": True, "block_size": 1, "start_epoch": 1, "end_epoch": 6,
            "epoch_rate": 1,
            "global_prune_rate": 0.5, "mac_target": 0.6, "max_pruning_rate": 0.9, "pruning_method": "GroupNormPruner",
            "regularize": {"reg": 1e-3, "mac_reg": 0.0, "gamma": 1}, "layers": ["stem", "conv1", "conv2"],
            "input_shape": [1, 3, 8, 8],
        }
    }  # fmt: skip
    file = tmp_path / "pruning_config.json"
    file.write_text(json.dumps(config))
    before = file.read_bytes()
    model, lines = net(), []
    dense = count_macs(model, X[:1])
    pruner = Pruning(model, str(tmp_path), model.forward)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    phases = []
    for epoch in range(8):
        model.train()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(X), Y) + pruner.slice_regularize(model)
        loss.backward()
        pruner.channel_regularize(model)
        optimizer.step()
        pruner.prune(model, epoch, log=lines.append)
        phases.append(pruner.phase)
        if pruner.channel_pruner.reset_optimizer:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            pruner.channel_pruner.reset_optimizer = False
    assert phases[0] == "regularize"
    assert "prune" in phases
    assert phases[-1] == "finetune"
    assert count_macs(model, X[:1]) <= 0.6 * dense
    assert pruner.macs.kept == count_macs(model, X[:1])
    assert model.training
    assert len(lines) == phases.count("prune") + 2  # one a masking, and one for the removal
    assert file.read_bytes() == before


def test_masking_stops_and_removal_happens_in_the_call_that_meets_the_target() -> None:
    model = net()
    rule = rules(target={"macs": 0.6}, start=0, end=9, final_sparsity=1.0)
    pruner = Pruning(model, rule, example_inputs=X[:1])
    widths = []
    for epoch in range(10):
        pruner.prune(model, epoch)
        widths.append((model.conv1.out_channels, pruner.phase))
    first = next(index for index, (_, phase) in enumerate(widths) if phase == "finetune")
    assert all(width == 32 for width, _ in widths[:first])
    assert len({width for width, _ in widths[first:]}) == 1
    assert widths[first][0] < 32
    assert first < 9  # computed as if towards 100%, so it is met before the last event
    assert 0.5 < pruner.macs.fraction <= 0.6


@pytest.mark.parametrize("application", ["mask", "remove"])
@pytest.mark.parametrize("target", [{"macs": 0.4}, {"parameters": 0.4}, {"macs": 0.5, "parameters": 0.4}])
def test_events_share_the_cut_of_a_target_in_its_own_measure(target: dict[str, float], application: str) -> None:
    """At progress t at most 1 - t (1 - target) is left; no event takes much more, and the last one meets the target."""
    model = net()
    rule = rules(target=target, start=0, end=4, application=application)
    pruner = Pruning(model, rule, example_inputs=X[:1])
    for epoch in range(5):
        pruner.prune(model, epoch)
        left = {"macs": pruner.macs.fraction, "parameters": pruner.report().parameters["fraction"]}
        allowed = {name: 1 - (epoch + 1) / 5 * (1 - fraction) for name, fraction in target.items()}
        assert all(left[name] <= fraction + 1e-9 for name, fraction in allowed.items()), (epoch, left, allowed)
        assert any(left[name] > fraction - 0.08 for name, fraction in allowed.items()), (epoch, left, allowed)
        assert (pruner.phase == "finetune") == (epoch == 4)


@pytest.mark.parametrize(
    ("start", "end", "every", "fired"),
    [
        (0, 0, 1, [0]),
        (0, 4, 1, [0, 1, 2, 3, 4]),
        (2, 7, 2, [2, 4, 6]),
        (1, 9, 4, [1, 5, 9]),
        (3, None, 1, [3]),
        (20, 30, 1, []),
    ],
)
def test_firing(start: int, end: int | None, every: int, fired: list[int]) -> None:
    model = net()
    pruner = Pruning(model, rules(target={"sparsity": 0.5}, start=start, end=end, every=every), example_inputs=X[:1])
    seen = []
    for epoch in range(12):
        lines: list[str] = []
        pruner.prune(model, epoch, log=lines.append)
        pruner.prune(model, epoch, log=lines.append)  # a second call in an epoch does nothing
        if lines:
            seen.append(epoch)
    assert seen == fired
    assert pruner.phase == ("finetune" if fired else "regularize")


def test_linear_schedule_reaches_its_sparsity_in_equal_steps() -> None:
    model = net()
    pruner = Pruning(model, rules(target={"sparsity": 0.5}, end=3), example_inputs=X[:1])
    reached = []
    for epoch in range(4):
        pruner.prune(model, epoch)
        reached.append(round(pruner.sparsity * 48))
    assert reached == [6, 12, 18, 24]  # of 16 + 32 groups


@pytest.mark.parametrize("application", ["mask", "remove"])
def test_many_small_events_end_where_one_large_one_does(application: str) -> None:
    """Without training in between: what is masked must not change how layers compare."""
    widths = []
    for events in (1, 2, 5, 8):
        model = net()
        config = rules(target={"sparsity": 0.5}, end=events - 1, application=application)
        pruner = Pruning(model, config, example_inputs=X[:1])
        for epoch in range(events):
            pruner.prune(model, epoch)
        widths.append(model.stem.out_channels)
    assert max(widths) - min(widths) <= 2, widths


def test_a_skipped_last_event_is_made_up_for() -> None:
    model = net()
    pruner = Pruning(model, rules(target={"sparsity": 0.5}, end=3), example_inputs=X[:1])
    pruner.prune(model, 0)
    pruner.prune(model, 7)
    assert pruner.sparsity == 0.5
    assert pruner.phase == "finetune"


def test_application_remove_shrinks_at_every_event() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    config = rules(target={"sparsity": 0.5}, end=3, application="remove", scope="local")
    pruner = Pruning(model, config, example_inputs=X[:1], optimizer=optimizer)
    widths = []
    for epoch in range(4):
        train(model, optimizer, pruner, steps=2)
        pruner.prune(model, epoch)
        widths.append((model.stem.out_channels, model.conv1.out_channels))
    assert widths == [(14, 28), (12, 24), (10, 20), (8, 16)]
    assert {name: int(keep.sum()) for name, keep in pruner.masks.items()} == {"stem": 8, "conv1": 16}
    assert len(pruner.masks["conv1"]) == 32


def test_remove_at_construction() -> None:
    model = net()
    pruner = Pruning(model, rules(target={"macs": 0.5}, at_init=True, application="remove"), example_inputs=X[:1])
    assert pruner.phase == "finetune"
    assert pruner.macs.fraction <= 0.5
    assert model.conv1.out_channels < 32


def test_remove_now_whatever_the_schedule_says() -> None:
    model = net()
    pruner = Pruning(model, rules(target={"sparsity": 0.5}, end=3), example_inputs=X[:1])
    pruner.prune(model, 0)
    masked = outputs_of(model, X)[0]
    pruner.remove()
    assert torch.allclose(outputs_of(model, X)[0], masked, atol=1e-5)
    assert model.stem.out_channels + model.conv1.out_channels == 48 - 6
    pruner.prune(model, 3)
    assert pruner.sparsity == 0.5


def test_infer_and_disabled_rules_do_nothing() -> None:
    for config in (
        {**rules(target={"sparsity": 0.5}), "infer": True},
        rules(target={"sparsity": 0.5}, enabled=False),
    ):
        model = net()
        before = copy.deepcopy(model.state_dict())
        pruner = Pruning(model, config, example_inputs=X[:1])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        train(model, optimizer, pruner)
        pruner.prune(model, 0)
        assert pruner.sparsity == 0
        assert pruner.phase == "finetune"
        assert model.conv1.weight.equal(before["conv1.weight"])


def test_three_line_form_infers_its_input_and_ends_removed() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruner(model, target_sparsity=0.5, schedule="linear", total_steps=4)
    reached = []
    for _ in range(6):
        train(model, optimizer)
        pruner.step()
        reached.append(pruner.sparsity)
    assert reached == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert model.stem.out_channels + model.conv1.out_channels == 24
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert known == {id(parameter) for parameter in model.parameters()}  # found at its first step
    assert pruner.report().to_dict()["phase"] == "finetune"


def test_inputs_are_seen_in_every_form() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, image: torch.Tensor, *, scale: torch.Tensor) -> dict[str, Any]:
            return {"out": self.second(torch.relu(self.first(image))) * scale.view(-1, 1, 1, 1), "extra": None}

    given = {"image": X, "scale": torch.ones(4)}
    for how in ("keyword", "seen", "function"):
        model = Two()
        inputs = None if how == "seen" else given
        forward_fn = (lambda m, x: m(x["image"], scale=x["scale"])) if how == "function" else None
        pruner = Pruning(model, rules(target={"sparsity": 0.5}), forward_fn, example_inputs=inputs)
        if how == "seen":
            with pytest.raises(ValueError, match="has not been run yet"):
                pruner.prune(model, 0)
            model(X, scale=torch.ones(4))
        pruner.prune(model, 0)
        assert model.first.out_channels == 4, how
        assert model.second.out_channels == 4, how


def test_a_reloaded_pruned_model_is_not_pruned_again(tmp_path: Path) -> None:
    model = net()
    config = rules(target={"macs": 0.6}, end=3)
    pruner = Pruning(model, config, example_inputs=X[:1])
    for epoch in range(4):
        pruner.prune(model, epoch)
    save_pruned(model, tmp_path / "m.safetensors")
    again = load_pruned(net(), tmp_path / "m.safetensors")
    second = Pruning(again, config, example_inputs=X[:1])
    for epoch in range(4):
        second.prune(again, epoch)
    assert second.phase == "finetune"
    assert second.macs == pruner.macs
    assert second.sparsity == pruner.sparsity
    assert torch.equal(outputs_of(model, X)[0], outputs_of(again, X)[0])


def test_wrapped_models_save_files_for_plain_ones(tmp_path: Path) -> None:
    model = net()
    pruner = Pruning(nn.DataParallel(model), rules(target={"macs": 0.6}), example_inputs=X[:1])
    pruner.prune(epoch=0)
    save_pruned(nn.DataParallel(model), tmp_path / "m.safetensors")
    again = load_pruned(net(), tmp_path / "m.safetensors")
    assert torch.equal(outputs_of(model, X)[0], outputs_of(again, X)[0])


@pytest.mark.parametrize("stop", [0, 2, 5])
def test_state_resumes_masks_phase_and_architecture(stop: int) -> None:
    def start() -> tuple[Net, torch.optim.Optimizer, Pruning]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        config = rules(target={"macs": 0.6}, start=1, end=6, regularizer="growing_l2")
        return model, optimizer, Pruning(model, config, example_inputs=X[:1], optimizer=optimizer)

    def epochs(first: int, last: int, model: Net, optimizer: torch.optim.Optimizer, pruner: Pruning) -> None:
        for epoch in range(first, last):
            train(model, optimizer, pruner, steps=2)
            pruner.prune(model, epoch)

    straight = start()
    epochs(0, 8, *straight)
    broken = start()
    epochs(0, stop, *broken)
    states = [copy.deepcopy(part.state_dict()) for part in broken]
    model, optimizer, pruner = start()
    pruner.load_state_dict(states[2], generators=True)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    epochs(stop, 8, model, optimizer, pruner)
    assert pruner.phase == straight[2].phase == "finetune"
    for name, keep in pruner.masks.items():
        assert torch.equal(keep, straight[2].masks[name])
    for mine, theirs in zip(model.parameters(), straight[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_report_says_what_is_true() -> None:
    model = net()
    pruner = Pruning(model, rules(target={"macs": 0.6}, end=3), example_inputs=X[:1])
    pruner.prune(model, 0)
    masked = pruner.report().to_dict()
    assert masked["parameters"]["dense"] == sum(p.numel() for p in net().parameters())
    assert masked["macs"]["dense"] == count_macs(net(), X[:1])
    for epoch in range(1, 4):
        pruner.prune(model, epoch)
    report = pruner.report().to_dict()
    assert report["macs"]["kept"] == count_macs(model, X[:1])
    assert report["parameters"]["kept"] == sum(p.numel() for p in model.parameters())
    rows = {row["name"]: row for row in report["layers"]}
    assert (rows["conv1"]["kept_out"], rows["conv1"]["kept_in"]) == (model.conv1.out_channels, model.conv1.in_channels)
    assert rows["fc"]["kept_in"] == model.fc.in_features
    assert sum(row["kept_macs"] for row in report["layers"]) == report["macs"]["kept"]
    assert [(group["source"], group["dependencies"]) for group in report["groups"]] == [
        ("stem", ["conv1", "conv2", "fc"]),
        ("conv1", ["conv2"]),
    ]
    assert "conv1" in str(pruner.report())


def test_a_logger_or_a_function_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = net()
        pruner = Pruning(model, rules(target={"sparsity": 0.5}), example_inputs=X[:1])
        pruner.prune(model, 0, log=logging.getLogger("mine"))
    assert any(record.name == "mine" and "removed" in record.message for record in caplog.records)


class Unprunable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only(x)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"layers": ["conv3"]}, r"layers: 'conv3' is not known; did you mean 'conv\d'"),
        ({"layers": ["re:.*attn.*"]}, "matches no module"),
        ({"layers": ["fc"]}, "no prunable channel group"),
        ({"layers": ["bn"]}, "no prunable channel group"),
        ({"criterion": "magnitud"}, "did you mean 'magnitude'"),
        ({"schedule": "liner"}, "did you mean 'linear'"),
        ({"target": {"macs": 1.5}}, "macs"),
        ({"target": {"macs": 0.0005}}, r"leave at least 0\.\d+"),
        ({"target": {"macs": 0.3}, "max_sparsity": 0.1}, "out of reach"),
        ({"target": {"sparsity": 0.9}, "max_sparsity": 0.3}, r"target.sparsity: 0.9 is out of reach.*at most 0\.2708"),
        ({"mode": "unprune"}, "mode: 'unprune' is not supported by the pattern 'channel'"),
        (
            {"regularizer": "block_lasso"},
            "regularizer: 'block_lasso' is not supported by .*Allowed: bn_scale, group_lasso, growing_l2",
        ),
        ({"progressive": 4}, "progressive: 4 is not supported by the pattern 'channel'"),
        ({"start": 5, "end": 2}, "end: 2 is before start"),
        ({"typo": 1}, "typo"),
    ],
)
def test_bad_rules_are_refused_by_name(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruning(net(), rules(**{"target": {"macs": 0.6}, **rule}), example_inputs=X[:1])


def test_bad_models_and_inputs_are_refused_by_name() -> None:
    config = rules(target={"macs": 0.6})
    with pytest.raises(ValueError, match="Unprunable has no prunable channel group.*output of the model"):
        Pruning(Unprunable(), config, example_inputs=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"Net rejects inputs of shape \[\(1, 5, 8, 8\)\]"):
        Pruning(net(), config, example_inputs=torch.ones(1, 5, 8, 8))
    pruner = Pruning(net(), config, example_inputs=X[:1])
    with pytest.raises(ValueError, match="is not the Net that the pruner was made for"):
        pruner.prune(net(), 0)
    with pytest.raises(ValueError, match=r"rules\[1\]\.layers: 'stem' is pruned by rules\[0\] already"):
        Pruning(net(), {"rules": [rules(target={"macs": 0.9})["rules"][0]] * 2}, example_inputs=X[:1])


class Ranks(nn.Module):
    """Weighs each channel by its number, from some day on: removing one renumbers the others."""

    def __init__(self, weighs: bool) -> None:
        super().__init__()
        self.weighs, self.a, self.b = weighs, nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).mean((2, 3))
        return self.b(x * torch.arange(x.shape[1]) if self.weighs else x)


def test_a_removal_that_would_change_the_outputs_is_undone() -> None:
    model = Ranks(weighs=False)
    pruner = Pruning(model, rules(target={"sparsity": 0.5}, end=1), example_inputs=X[:1])
    model.weighs = True
    pruner.prune(model, 0)
    masked = outputs_of(model, X)[0]
    with pytest.raises(ValueError, match="removal: the removed model's outputs differ"):
        pruner.remove()
    assert model.a.out_channels == 8
    assert torch.equal(outputs_of(model, X)[0], masked)


def test_layers_whose_removal_would_change_the_outputs_are_left_out_by_name() -> None:
    model = Ranks(weighs=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="a: removed, some of it would leave another model than masked"):
        Pruning(model, rules(target={"sparsity": 0.5}), example_inputs=X[:1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.a._forward_hooks and not model.a.weight._backward_hooks


def test_several_rules_share_one_model() -> None:
    model = net()
    config = {
        "rules": [
            {"name": "wide", "layers": ["conv1"], "target": {"sparsity": 0.75}, "criterion": "l1"},
            {"name": "stream", "layers": ["stem", "conv2"], "target": {"sparsity": 0.25}, "start": 1},
        ]
    }
    pruner = Pruning(model, config, example_inputs=X[:1])
    pruner.prune(model, 0)
    assert (model.conv1.out_channels, model.stem.out_channels, pruner.phase) == (8, 16, "regularize")
    pruner.prune(model, 1)
    assert (model.conv1.out_channels, model.stem.out_channels, pruner.phase) == (8, 12, "finetune")


@pytest.mark.parametrize(
    "config",
    [
        {"rules": [{"pattern": "unstructured", "target": {"sparsity": 0.5}}]},
        {"rules": [{"target": {"sparsity": 0.5}}], "infer": True},
        {"rules": [{"target": {"sparsity": 0.5}, "enabled": False}]},
    ],
)
def test_loops_read_the_flag_of_a_removal_where_no_channels_are_pruned(config: dict[str, Any]) -> None:
    model = net()
    pruner = Pruning(model, config, example_inputs=X[:1])
    pruner.prune(model, 0)
    assert not pruner.channel_pruner.reset_optimizer
    pruner.channel_pruner.reset_optimizer = False


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.safetensors"])
def test_files_of_others_are_led_to_the_shapes(tmp_path: Path, name: str) -> None:
    model, path = net(), tmp_path / name
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    message = "was not written by save_pruned; .*load_state_dict_pruned"
    with pytest.raises(CheckpointError, match=message):
        load_pruned(model, path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
