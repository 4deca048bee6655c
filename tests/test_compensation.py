"""A rule's compensation: at every event of a training the layers that read masked channels make up for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruner, Pruning
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.session.one_shot import AfterPruning, one_shot


def doubled() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A hidden layer whose channels are there twice, one of them smaller, and data that shows it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.no_grad():
        for part in (model[0].weight, model[0].bias):
            part[6:] = 0.5 * part[:6]
    x = torch.randn(64, 8)
    return model, [(x, torch.randint(0, 4, (64,)))]


def rule(**more: Any) -> dict[str, Any]:
    target = {"target": {"sparsity": 0.5}, "layers": ["0"], "criterion": {"type": "magnitude", "normalize": "none"}}
    return {"rules": [{**target, **more}]}


def pruned(how: str, **more: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """The model after its events, and its outputs before and after."""
    model, data = doubled()
    with torch.no_grad():
        model[2].weight[:, 6:] *= 0.1  # so that the copies go
    before = model(data[0][0]).detach()
    pruner = Pruning(model, rule(compensation=how, **more), example_inputs=data[0][0])
    pruner.calibrate_with(data, functional.cross_entropy)
    for epoch in range(4):
        pruner.prune(model, epoch)
    return model, before, model(data[0][0]).detach()


@pytest.mark.parametrize("more", [{}, {"end": 2}, {"end": 2, "application": "remove"}], ids=["once", "steps", "remove"])
def test_least_squares_lets_doubled_channels_go_for_nothing(more: dict[str, Any]) -> None:
    model, before, after = pruned("least_squares", **more)
    plain = pruned("none", **more)[2]
    assert model[0].out_features == 6
    error, without = (float((one - before).square().mean()) for one in (after, plain))
    assert error < 1e-3 * without


def test_a_bias_takes_up_the_mean() -> None:
    _, before, after = pruned("bias")
    assert torch.allclose(before.mean(0), after.mean(0), atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)


def test_it_is_what_one_shot_does() -> None:
    model, before, after = pruned("least_squares")
    dense, data = doubled()
    with torch.no_grad():
        dense[2].weight[:, 6:] *= 0.1
    (options,) = rule(compensation="least_squares")["rules"]
    (by_rule,) = one_shot(dense, options, data, functional.cross_entropy).values()
    plain = {**options, "compensation": "none"}
    (by_after,) = one_shot(dense, plain, data, functional.cross_entropy, after=AfterPruning("least_squares")).values()
    x = data[0][0]
    assert torch.allclose(by_rule(x), by_after(x))
    assert torch.allclose(by_rule(x), after, atol=1e-5)


def test_masked_channels_stay_out_of_later_fits() -> None:
    """A weight that is masked stays 0, also when a later event fits its layer again."""
    model, data = doubled()
    pruner = Pruning(model, rule(compensation="least_squares", end=9), example_inputs=data[0][0])
    pruner.calibrate_with(data, functional.cross_entropy)
    for epoch in range(6):
        pruner.prune(model, epoch)
        keep = pruner.channel_pruner.keep_D
        assert bool((model[2].weight[:, ~keep] == 0).all())
        assert bool((model[0].weight[~keep] == 0).all())


def test_norms_are_measured_anew_and_nothing_else_moves() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    data = [(torch.randn(32, 3, 8, 8), torch.randint(0, 4, (32,))) for _ in range(4)]
    head = model[8].weight.detach().clone()
    state = torch.random.get_rng_state()
    spec = {"rules": [{"layers": ["0"], "target": {"sparsity": 0.5}, "compensation": "least_squares"}]}
    pruner = Pruning(model, spec, example_inputs=data[0][0])
    pruner.calibrate_with(data, functional.cross_entropy)
    pruner.prune(model, 0)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(head, model[8].weight)
    assert torch.equal(state, torch.random.get_rng_state())
    model.eval()
    seen = torch.cat([model[:4](x) for x, _ in data])
    assert torch.allclose(model[4].running_mean, seen.mean((0, 2, 3)), atol=0.1)
    assert not torch.equal(model[4].running_mean, torch.zeros(8))


def test_without_data_the_first_call_says_so() -> None:
    model, data = doubled()
    pruner = Pruning(model, rule(compensation="least_squares", start=5), example_inputs=data[0][0])
    with pytest.raises(ConfigError, match=r"rules\[0\].compensation: 'least_squares' needs data.*calibrate_with"):
        pruner.prune(model, 0)
    pruner.calibrate_with(data, functional.cross_entropy)
    pruner.prune(model, 0)


def test_autocast_around_an_event_changes_nothing() -> None:
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model, data = doubled()
        pruner = Pruning(
            model, rule(compensation="least_squares", criterion="reconstruction"), example_inputs=data[0][0]
        )
        pruner.calibrate_with(data, functional.cross_entropy)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(data[0][0])
            pruner.prune(model, 0)
        found.append(model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_the_three_line_form_takes_data() -> None:
    model, data = doubled()
    pruner = Pruner(model, 0.5, total_steps=1, compensation="bias", layers=["0"], example_inputs=data[0][0])
    with pytest.raises(ConfigError, match="needs data"):
        pruner.step()
    pruner.calibrate_with(data, functional.cross_entropy)
    pruner.step()
    assert model[0].out_features == 6


def test_at_init_has_no_data_yet() -> None:
    model, data = doubled()
    with pytest.raises(ConfigError, match=r"at_init: True.*Allowed: False, or start: 1"):
        Pruning(model, rule(compensation="bias", at_init=True), example_inputs=data[0][0])


@pytest.mark.parametrize(
    ("batch", "loss", "message"),
    [
        ({"images": torch.randn(4, 8)}, None, "does not run on its batches .images: a tensor of shape .4, 8"),
        ((torch.randn(4, 7), torch.zeros(4)), None, "does not run on its batches .a tensor of shape .4, 7"),
        ((torch.randn(4, 8), torch.zeros(4)), lambda outputs: outputs.sum(), "loss_fn: it does not work on a tensor"),
    ],
)
def test_data_that_does_not_fit_is_named(batch: Any, loss: Any, message: str) -> None:
    model, data = doubled()
    spec = rule(criterion={"type": "obs", "num_grads": 4}, compensation="least_squares")
    pruner = Pruning(model, spec, example_inputs=data[0][0])
    pruner.calibrate_with([batch], loss or functional.cross_entropy)
    with pytest.raises(ModelError, match=message):
        pruner.prune(model, 0)
    assert pruner.sparsity == 0


def test_labels_in_a_mapping_are_not_for_the_model() -> None:
    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model, data = doubled()
    net = Net(*model)
    pruner = Pruning(net, rule(compensation="bias", criterion="reconstruction"), example_inputs=data[0][0])
    pruner.calibrate_with([{"x": data[0][0], "labels": data[0][1]}], functional.cross_entropy)
    pruner.prune(net, 0)
    assert net[0].out_features == 6


def test_what_one_shot_and_calibration_refuse() -> None:
    model, data = doubled()
    (options,) = rule()["rules"]
    for after in ({"compensation": "bias"}, "bias", None):
        with pytest.raises(ConfigError, match="after: .*Allowed: AfterPruning"):
            one_shot(model, options, data, functional.cross_entropy, after=after)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="model"):
        one_shot("m", options, data, functional.cross_entropy)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"sparsities: \[\] asks for nothing"):
        one_shot(model, options, data, functional.cross_entropy, [])
    pruner = Pruning(model, rule(), example_inputs=data[0][0])
    with pytest.raises(ConfigError, match="loss_fn: 'ce' is not a function"):
        pruner.calibrate_with(data, "ce")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"compensation": "least_square"}, r"compensation: .*'least_square'.*did you mean 'least_squares'"),
        ({"compensation": "bias", "pattern": "4x1"}, "compensation: 'bias' is not supported by the pattern"),
        (
            {"compensation": "bias", "pattern": "depth", "criterion": "magnitude"},
            "compensation: 'bias' is not supported",
        ),
    ],
)
def test_what_is_refused(more: dict[str, Any], message: str) -> None:
    model, data = doubled()
    with pytest.raises(ConfigError, match=message):
        Pruning(model, rule(**more), example_inputs=data[0][0])
