"""One-shot pruning: every criterion with every pattern, exact counts, and nothing left behind in the user's model."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from second_order_fixture import batches, cross_entropy, layer_weights, rule, small_net, total, zeros
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pruningawaretraining import count_macs
from pruningawaretraining.criteria.second_order.bank import Bank
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.engine.compensation import WeightPruner, put
from pruningawaretraining.errors import ConfigError, ModelError, PruningError, TargetError
from pruningawaretraining.session.one_shot import AfterPruning, accuracy, one_shot

CRITERIA = {
    "magnitude": "magnitude",
    "obs": {"type": "obs", "num_grads": 24, "micro_batch": 2},
    "obs-joint": {"type": "obs", "num_grads": 64, "micro_batch": 1, "compensation": "joint"},
    "cap": {"type": "cap", "num_grads": 24, "micro_batch": 2},
    "cap-cumulative": {"type": "cap", "num_grads": 64, "micro_batch": 1, "merge": "cumulative"},
    "fast_cap": {"type": "fast_cap", "num_grads": 24},
    "sparse_gpt": {"type": "sparse_gpt", "num_grads": 4},
}
SECOND_ORDER = [name for name in CRITERIA if name != "magnitude"]
UNIFORM = ("fast_cap", "sparse_gpt")


def pruned_at(sparsities, pattern="unstructured", criterion="cap", **others):
    model = small_net()
    spec = rule(pattern, CRITERIA[criterion] if isinstance(criterion, str) else criterion, **others)
    return one_shot(model, spec, batches(), cross_entropy, sparsities)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_unstructured_counts_are_exact_at_every_sparsity(criterion):
    wanted = [0.0, 0.1, 0.5, 0.77, 1.0]
    models = pruned_at(wanted, criterion=criterion)
    assert list(models) == wanted
    for sparsity, model in models.items():
        if criterion in UNIFORM:
            for weight in layer_weights(model).values():
                assert int((weight == 0).sum()) == int(sparsity * weight.numel() + 1e-6)
        assert abs(zeros(model) - int(sparsity * total(model) + 1e-6)) <= (4 if criterion in UNIFORM else 0)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("criterion", ["magnitude", "obs", "cap"])
def test_counts_are_exact_under_ties(criterion, scope):
    """The off-by-one and the flipped ties of the old system: here every weight is the same."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    nn.init.ones_(model[0].weight)
    data = [(torch.ones(4, 64), torch.zeros(4, dtype=torch.long))] * 3
    for sparsity in (0.5, 0.3, 1.0):
        out = one_shot(model, rule("unstructured", CRITERIA[criterion], scope=scope), data, cross_entropy, [sparsity])
        assert zeros(out[sparsity]) == int(sparsity * 2048 + 1e-6)


@pytest.mark.parametrize("window", ["1:2", "2:4", "1:4", "3:4", "5:8", "2:3", "1:5"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_n_of_m_is_valid_in_every_window(criterion, window):
    drop, of = (int(part) for part in window.split(":"))
    model = pruned_at([drop / of], window, criterion)[drop / of]
    for weight in layer_weights(model).values():
        along = weight.movedim(1, -1)
        for start in range(0, along.shape[-1], of):
            kept = (along[..., start : start + of] != 0).sum(-1)
            assert (kept == min(of - drop, along.shape[-1] - start)).all()


def test_n_of_m_refuses_another_sparsity_than_its_own():
    with pytest.raises(TargetError, match=r"sparsities: 0.6 .* Allowed: 0.5"):
        pruned_at([0.6], "2:4")


@pytest.mark.parametrize("pattern", ["2x2", "4x1", "1x4", "3x1", "1xchannel", "channelx1"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_tiles_live_or_die_together(criterion, pattern):
    rows, columns = pattern.split("x")
    # Seven filters in each group of conv2: a tile over both has no one input Hessian.
    spared = ["conv2"] if criterion == "sparse_gpt" and rows in ("2", "3", "4", "channel") else []
    model = pruned_at([0.5], pattern, criterion, exclude=spared)[0.5]
    for name, weight in layer_weights(model).items():
        if name.removesuffix(".weight") in spared:
            continue
        matrix = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
        matrix = matrix.transpose(1, 2)  # outputs, kernel positions, inputs
        if columns == "channel":
            matrix = matrix.flatten(1)[:, None]
        height = matrix.shape[0] if rows == "channel" else int(rows)
        width = matrix.shape[2] if columns == "channel" else int(columns)
        groups = dead = 0
        for top in range(0, matrix.shape[0], height):
            for left in range(0, matrix.shape[2], width):
                tile = (matrix[top : top + height, :, left : left + width] == 0).movedim(1, 0).flatten(1)
                assert (tile.all(1) | ~tile.any(1)).all(), name
                groups, dead = groups + len(tile), dead + int(tile.all(1).sum())
        if criterion in UNIFORM:
            assert dead == groups // 2


@pytest.mark.parametrize("criterion", ["obs", "obs-joint", "cap", "fast_cap", "sparse_gpt"])
def test_what_stays_is_compensated(criterion):
    before, after = layer_weights(small_net()), layer_weights(pruned_at([0.5], criterion=criterion)[0.5])
    moved = sum(int(((after[name] != 0) & (after[name] != weight)).sum()) for name, weight in before.items())
    assert moved > 0.25 * sum(weight.numel() for weight in before.values())


def test_magnitude_moves_nothing_and_keeps_the_largest():
    before, after = (
        layer_weights(small_net()),
        layer_weights(pruned_at([0.5], criterion={"type": "magnitude", "normalize": "none"})[0.5]),
    )
    kept = torch.cat([before[name][weight != 0].abs() for name, weight in after.items()])
    gone = torch.cat([before[name][weight == 0].abs() for name, weight in after.items()])
    assert kept.min() >= gone.max()
    assert all(torch.equal(weight[weight != 0], before[name][weight != 0]) for name, weight in after.items())


def test_layers_bounds_and_exclusions_are_honoured():
    model = pruned_at([0.6], layers=["re:conv.*", "hidden"], exclude=["conv1"], max_sparsity=0.7, min_sparsity=0.4)[0.6]
    shares = {name: float((weight == 0).float().mean()) for name, weight in layer_weights(model).items()}
    assert shares["conv1.weight"] == shares["head.weight"] == 0
    assert all(0.39 <= shares[name] <= 0.7 for name in ("conv2.weight", "hidden.weight"))


# --- the user's model and random states are as they were ---------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
def test_the_given_model_is_unchanged(criterion, pattern):
    if pattern == "channel" and criterion in ("obs-joint", "cap-cumulative"):
        pytest.skip("the same scores as obs and cap")
    model = small_net()
    model.train()
    model.drop.eval()
    model.conv1.weight.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, 3.0)
    before, gradient = copy.deepcopy(model.state_dict()), model.head.weight.grad
    modes = [module.training for module in model.modules()]
    data = TensorDataset(torch.randn(32, 3, 8, 8), torch.randint(0, 5, (32,)))
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(data, 8, shuffle=True, generator=generator)
    states = torch.get_rng_state(), generator.get_state(), random.getstate(), np.random.get_state()[1].tolist()
    out = one_shot(model, rule(pattern, CRITERIA[criterion]), loader, cross_entropy, [0.5])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.head.weight.grad is gradient and bool((gradient == 3.0).all())
    assert [one.grad for one in model.parameters() if one is not model.head.weight] == [None] * 8
    assert [module.training for module in model.modules()] == modes
    assert not model.conv1.weight.requires_grad and not out[0.5].conv1.weight.requires_grad
    assert not model._forward_pre_hooks and not model.conv1._forward_pre_hooks
    after = torch.get_rng_state(), generator.get_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(states[0], after[0]) and torch.equal(states[1], after[1]) and states[2:] == after[2:]
    assert [module.training for module in out[0.5].modules()] == modes


def test_pruning_in_the_middle_of_accumulation_keeps_the_gradients():
    model = small_net()
    cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    before = {name: one.grad.clone() for name, one in model.named_parameters()}
    one_shot(model, rule("unstructured", CRITERIA["cap"]), batches(), cross_entropy)
    assert all(torch.equal(one.grad, before[name]) for name, one in model.named_parameters())


# --- data -----------------------------------------------------------------------------------------------------


def test_all_sparsities_come_from_one_collection_of_gradients(monkeypatch):
    seen = []
    model, data = small_net(), batches()

    def counting(outputs, targets):
        seen.append(len(targets))
        return cross_entropy(outputs, targets)

    one_shot(model, rule("unstructured", CRITERIA["cap"]), data, counting, [0.5, 0.6, 0.7, 0.8, 0.9])
    assert seen == [2] * 24


def test_the_loader_is_read_over_and_over_and_an_iterator_ends(caplog):
    """The old sampler hung on an exhausted iterator."""
    model = small_net()
    calibration = Calibration(model, batches(2), cross_entropy)
    found = []
    assert calibration.each_gradient([model.head.weight], 5, found.append) == 5
    assert torch.equal(found[0][0], found[2][0]) and not torch.equal(found[0][0], found[1][0])
    once = Calibration(model, iter(batches(3)), cross_entropy)
    assert once.each_gradient([model.head.weight], 5, found.append) == 3
    assert "5 were asked for, the data gave 3" in caplog.text


@pytest.mark.parametrize(
    ("data", "loss", "message"),
    [
        ([], cross_entropy, "dataloader: it is empty"),
        ([torch.zeros(2, 3, 8, 8)], cross_entropy, "dataloader: a batch is a tensor"),
        (None, cross_entropy, "dataloader: a NoneType cannot be iterated"),
        (batches, cross_entropy, "dataloader: a function cannot be iterated"),
        (iter([]), cross_entropy, "dataloader: it has been read to its end"),
        (batches(1), None, "loss_fn: a NoneType is not a function"),
        (batches(1), lambda outputs, targets: outputs.detach().sum(), "loss_fn: the loss does not depend"),
        (batches(1), lambda outputs, targets: outputs, "loss_fn: it gives a tensor of shape"),
        (batches(1), lambda outputs, targets: 3.0, "loss_fn: it gives a float"),
        (batches(1), lambda outputs, targets: outputs.sum() / 0, "loss_fn: the loss is"),
    ],
)
def test_bad_data_and_losses_are_refused(data, loss, message):
    with pytest.raises(PruningError, match=message):
        one_shot(small_net(), rule("unstructured", {"type": "cap", "num_grads": 2}), data, loss)


def test_mappings_of_keyword_inputs_and_several_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor, labels: object = None) -> torch.Tensor:
            return self.layer(a + b)

    a, b, labels = torch.randn(4, 6), torch.randn(4, 6), torch.randint(0, 3, (4,))
    spec = rule("unstructured", {"type": "cap", "num_grads": 8, "micro_batch": 1})
    torch.manual_seed(0)
    model = Two()
    forms = [[{"a": a, "b": b, "labels": labels}], [(a, b, labels)], [([a, b], labels)]]
    out = [one_shot(model, spec, data, cross_entropy)[0.5].layer.weight for data in forms]
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    assert int((out[0] == 0).sum()) == 9


@pytest.mark.parametrize(
    ("others", "sparsities", "error", "message"),
    [
        ({}, [1.5], ConfigError, "sparsities: 1.5"),
        ({}, [True], ConfigError, "sparsities: True"),
        ({}, 0.5, ConfigError, "sparsities: 0.5 is not allowed. Allowed: a list"),
        ({"mode": "unprune"}, [0.5], ConfigError, "mode: 'unprune'"),
        ({"enabled": False}, [0.5], ConfigError, "enabled: False"),
        ({"criterion": {"type": "cap", "fisher_inv_device": "cudaa"}}, [0.5], ConfigError, "'cudaa' is not a device"),
        ({"criterion": {"type": "cap", "traces_backup_dir": 3}}, [0.5], ConfigError, "traces_backup_dir: 3"),
        ({"layers": ["conv3"]}, [0.5], ConfigError, "did you mean 'conv"),
        ({"layers": ["norm"]}, [0.5], ModelError, "selects none"),
        (
            {"pattern": "slice", "criterion": "obs"},
            [0.5],
            ConfigError,
            "'obs' scores channels and heads and single weights, NxM and N:M, not the groups of 'slice'",
        ),
        ({"criterion": {"type": "cap", "num_grads": 0}}, [0.5], ConfigError, "num_grads: 0"),
        ({"criterion": {"type": "cap", "damp": 0.0}}, [0.5], ConfigError, "damp: 0.0"),
        ({"criterion": {"type": "cap", "merge": "maximum"}}, [0.5], ConfigError, "running_max"),
        ({"criterion": {"type": "obs", "compensation": "join"}}, [0.5], ConfigError, "did you mean 'joint'"),
    ],
)
def test_bad_rules_are_refused_with_the_key(others, sparsities, error, message):
    with pytest.raises(error, match=message):
        one_shot(small_net(), {**rule("unstructured", "magnitude"), **others}, batches(), cross_entropy, sparsities)


def test_a_rule_needs_a_target_only_where_no_sparsities_are_given():
    spec = {"criterion": "magnitude", "pattern": "unstructured"}
    model = one_shot(small_net(), spec, batches(), cross_entropy, [0.5])[0.5]
    assert zeros(model) == total(model) // 2
    with pytest.raises(ConfigError, match="target: nothing to reach"):
        one_shot(small_net(), spec, batches(), cross_entropy)


@pytest.mark.parametrize(("key", "value"), [("norm_batches", -1), ("input_batches", 0), ("norm_batches", 1.5)])
def test_bad_counts_of_what_follows_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key}: {value}"):
        AfterPruning(**{key: value})


def test_a_rule_is_a_mapping_or_a_rule():
    with pytest.raises(ConfigError, match="rule: a str is not allowed"):
        one_shot(small_net(), "cap", batches(), cross_entropy, [0.5])


def test_the_accuracy_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="it is empty"):
        accuracy(small_net(), [])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(mode):
    model, data = small_net(), batches()
    with mode():
        pruned = one_shot(model, rule("unstructured", CRITERIA["cap"]), data, cross_entropy)[0.5]
    assert zeros(pruned) == total(model) // 2


# --- criteria that listen to training ---------------------------------------------------------------------------


def test_snip_in_one_shot_is_the_gradient_times_the_weight():
    model, data = small_net(), batches(1)
    spec = rule("unstructured", {"type": "snip"}, layers=["head"])
    pruned = one_shot(model, spec, data, cross_entropy)[0.5]
    model.eval()
    (gradient,) = torch.autograd.grad(cross_entropy(model(data[0][0]), data[0][1]), [model.head.weight])
    scores = (gradient * model.head.weight).abs().flatten()
    expected = torch.zeros_like(scores, dtype=torch.bool)
    expected[scores.argsort(stable=True)[: len(scores) // 2]] = True
    assert torch.equal((pruned.head.weight == 0).flatten(), expected)
    assert all(one.grad is None for one in [*model.parameters(), *pruned.parameters()])


def test_wanda_in_one_shot_weighs_by_the_norms_of_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    inputs = torch.randn(64, 6) * torch.tensor([0.01, 1.0, 1.0, 1.0, 1.0, 100.0])
    data = [(inputs, torch.zeros(64, dtype=torch.long))]
    pruned = one_shot(model, rule("unstructured", "wanda"), data, cross_entropy)[0.5]
    scores = model[0].weight.detach().abs() * inputs.norm(dim=0)
    expected = torch.zeros(4, 6, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :3], True)
    assert torch.equal(pruned[0].weight == 0, expected)


@pytest.mark.parametrize("criterion", ["taylor", "variance", "variance_next"])
def test_channels_by_criteria_that_listen(criterion):
    model = small_net()
    spec = rule("channel", criterion, layers=["hidden"])
    pruned = one_shot(model, spec, batches(), cross_entropy, [0.4])[0.4]
    assert pruned.hidden.out_features == 9 and model.hidden.out_features == 15
    assert not model.head._forward_pre_hooks and not model.hidden._forward_hooks


# --- recomputation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cubic"])
@pytest.mark.parametrize("criterion", ["obs", "cap", "fast_cap", "sparse_gpt"])
def test_recomputation_reaches_the_target_and_never_zeroes_everything(criterion, schedule):
    """A second call returned all-zero weights in the old system."""
    spec = {**CRITERIA[criterion], "num_recomputations": 3, "recomputation_schedule": schedule}
    models = pruned_at([0.4, 0.8], criterion=spec)
    for sparsity, model in models.items():
        assert abs(zeros(model) - int(sparsity * total(model))) <= 4
        assert all((weight != 0).any() for weight in layer_weights(model).values())


def test_what_an_earlier_round_pruned_stays_pruned():
    model = small_net()
    calibration = Calibration(model, batches(), cross_entropy, 2)
    from pruningawaretraining.config.schema import Rule
    from pruningawaretraining.registry import build

    parsed = Rule.model_validate(rule("unstructured", CRITERIA["cap"]))
    pruner = WeightPruner(calibration, parsed, build("pattern", "unstructured"), build("criterion", CRITERIA["cap"]))
    first = pruner.prune([0.3])[0.3]
    keep = {name: one.keep_W for name, one in first.items()}
    put(model, first)
    second = pruner.prune([0.3, 0.6], keep)
    assert all(torch.equal(one.keep_W, keep[name]) for name, one in second[0.3].items())
    assert all(torch.equal(one.weight_W, first[name].weight_W) for name, one in second[0.3].items())
    for name, one in second[0.6].items():
        assert not (one.keep_W & ~keep[name]).any() and not one.weight_W[~one.keep_W].any()


def test_gradients_collected_count_the_rounds():
    seen = []

    def counting(outputs, targets):
        seen.append(1)
        return cross_entropy(outputs, targets)

    spec = {**CRITERIA["cap"], "num_recomputations": 4}
    one_shot(small_net(), rule("unstructured", spec), batches(), counting, [0.5, 0.8])
    assert len(seen) == 24 * (1 + 2 * 3)  # the first round serves both


# --- memory ---------------------------------------------------------------------------------------------------


def same_weights(first: nn.Module, second: nn.Module, tolerance: float = 1e-5) -> bool:
    pairs = zip(layer_weights(first).values(), layer_weights(second).values(), strict=True)
    return all(torch.allclose(a, b, atol=tolerance) and torch.equal(a == 0, b == 0) for a, b in pairs)


@pytest.mark.parametrize("criterion", ["obs", "cap"])
@pytest.mark.parametrize("num_grads", [20, 70])
def test_streaming_and_spooling_change_nothing(criterion, num_grads, tmp_path, monkeypatch):
    base = {"type": criterion, "num_grads": num_grads, "micro_batch": 1, "damp": 1e-4}
    banks = []
    collect = Bank.collect
    monkeypatch.setattr(Bank, "collect", lambda self, data: (banks.append(self), collect(self, data))[1])
    whole = pruned_at([0.5, 0.8], criterion=base)
    assert len(banks) == 1
    streamed = pruned_at([0.5, 0.8], criterion={**base, "max_memory": 90_000})
    assert len(banks) > 4
    spooled = pruned_at([0.5, 0.8], criterion={**base, "traces_backup_dir": str(tmp_path / "traces")})
    narrow = pruned_at([0.5, 0.8], criterion={**base, "blocks_in_parallel": 1, "fisher_inv_device": "cpu"})
    for sparsity, model in whole.items():
        for other in (streamed, spooled, narrow):
            assert same_weights(model, other[sparsity])
    assert (tmp_path / "traces").is_dir() and not list((tmp_path / "traces").iterdir())


def test_a_pass_keeps_to_max_memory():
    model = small_net()
    from pruningawaretraining.criteria.second_order.bank import Budget, plan_passes
    from pruningawaretraining.criteria.second_order.weights import prunable_weights
    from pruningawaretraining.registry import build

    weights = prunable_weights(model, build("pattern", "unstructured"), 32)
    for limit in (10_000, 50_000, 10**9):
        budget = Budget(64, 1e-7, limit)
        passes = plan_passes(weights, budget)
        covered = sorted((span.weight, block) for spans in passes for span in spans for block in range(*span.bounds))
        assert covered == [(n, block) for n, one in enumerate(weights) for block in range(one.layout.blocks)]
        for spans in passes:
            size = sum(len(span) * budget.bytes_per_block(weights[span.weight].layout.width) for span in spans)
            assert size <= limit or sum(len(span) for span in spans) == 1


def test_an_unwritable_traces_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="traces_backup_dir"):
        pruned_at([0.5], criterion={**CRITERIA["cap"], "traces_backup_dir": str(file)})


@pytest.mark.parametrize("size", [1, 7, 50, 10**6])
def test_the_block_size_is_what_was_asked_for(size):
    """The old search for a block size that divides the layer blew it up."""
    from pruningawaretraining.criteria.second_order.weights import prunable_weights
    from pruningawaretraining.registry import build

    for pattern, unit in (("unstructured", 1), ("2:4", 4), ("1x4", 4), ("2x2", 4)):
        for one in prunable_weights(small_net(), build("pattern", pattern), size):
            width = one.layout.width
            assert width % unit == 0 or one.layout.shape[1] < unit
            assert width < min(size, one.layout.length) + unit
            assert (one.layout.blocks - 1) * width < one.layout.length


# --- channels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["obs", "cap", "magnitude"])
@pytest.mark.parametrize("compensation", ["none", "bias", "bias_variance", "least_squares"])
def test_channels_are_removed(criterion, compensation):
    model = small_net()
    spec = rule("channel", CRITERIA[criterion], layers=["conv1", "conv2", "hidden"])
    after = AfterPruning(compensation, norm_batches=3)
    out = one_shot(model, spec, batches(), cross_entropy, [0.2, 0.4], after=after)
    widths = {s: (one.hidden.out_features, one.conv1.out_channels) for s, one in out.items()}
    assert sum(widths[0.4]) < sum(widths[0.2]) < 25
    assert all(torch.isfinite(one(batches()[0][0])).all() for one in out.values())


def correlated_pair(copies: int = 2) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A hidden layer each of whose channels is there twice, so that half of them can go for nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6 * copies), nn.ReLU(), nn.Linear(6 * copies, 4))
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[:6].repeat(copies, 1))
        model[0].bias.copy_(model[0].bias[:6].repeat(copies))
    x = torch.randn(256, 8)
    return model, [(x, model(x).detach())]


def test_obs_and_least_squares_find_that_doubled_channels_can_go():
    model, data = correlated_pair()
    spec = rule("channel", {"type": "obs", "num_grads": 128, "micro_batch": 2}, layers=["0"])
    x, expected = data[0]

    def noisy(outputs, targets):  # a loss whose gradient does not vanish at the model
        return ((outputs - targets - 1) ** 2).mean()

    errors = {}
    for compensation in ("none", "bias", "bias_variance", "least_squares"):
        out = one_shot(model, spec, data, noisy, [0.5], after=AfterPruning(compensation))[0.5]
        assert out[0].out_features == 6
        errors[compensation] = float((out(x) - expected).square().mean())
    assert errors["least_squares"] < 0.05 * errors["none"]
    assert errors["bias"] < errors["none"]


def test_bias_compensation_puts_back_the_mean():
    model, data = correlated_pair(1)
    x, expected = data[0]
    spec = rule("channel", "magnitude", layers=["0"])
    loss = nn.functional.mse_loss
    for compensation, exact in (("none", False), ("bias", True), ("bias_variance", True), ("least_squares", True)):
        out = one_shot(model, spec, data, loss, [0.5], after=AfterPruning(compensation))[0.5]
        same = torch.allclose(out(x).mean(0), expected.mean(0), atol=1e-3)
        assert same == exact, compensation


def test_norms_are_measured_again_as_plain_averages():
    model = small_net().eval()
    data = batches(4)
    out = one_shot(model, rule("unstructured", "magnitude"), data, cross_entropy, after=AfterPruning(norm_batches=4))[
        0.5
    ]
    seen = [out.conv1(x).transpose(0, 1).flatten(1) for x, _ in data]
    mean = torch.stack([one.mean(1) for one in seen]).mean(0)
    variance = torch.stack([one.var(1) for one in seen]).mean(0)
    assert torch.allclose(out.norm.running_mean, mean, atol=1e-5)
    assert torch.allclose(out.norm.running_var, variance, atol=1e-4)
    assert out.norm.momentum == 0.1 and not out.norm.training


def test_accuracy_counts_and_leaves_the_model_alone():
    model = small_net().train()
    data = batches(3)
    right = sum(int((model.eval()(x).argmax(1) == y).sum()) for x, y in data)
    model.train()
    assert accuracy(model, data) == right / 24
    assert model.training


# --- targets of a cost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["ranking", "macs"])
@pytest.mark.parametrize("criterion", ["magnitude", "obs"])
def test_channels_go_at_once_until_the_macs_are_met(criterion, allocation):
    model, example = small_net(), next(iter(batches()))[0][:1]
    spec = rule("channel", CRITERIA[criterion], allocation=allocation, target={"macs": 0.6})
    ((sparsity, pruned),) = one_shot(model, spec, batches(), cross_entropy).items()
    dense = count_macs(model, example)
    assert 0.4 * dense < count_macs(pruned, example) <= 0.6 * dense
    ((less, wider),) = one_shot(model, {**spec, "target": {"macs": 0.9}}, batches(), cross_entropy).items()
    assert 0 < less < sparsity < 1
    assert count_macs(pruned, example) < count_macs(wider, example) <= 0.9 * dense


def test_several_costs_at_once_must_all_hold():
    model, example = small_net(), next(iter(batches()))[0][:1]
    spec = rule("channel", "magnitude", target={"macs": 0.95, "parameters": 0.5})
    (pruned,) = one_shot(model, spec, batches(), cross_entropy).values()
    assert count_macs(pruned, example) <= 0.95 * count_macs(model, example)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in pruned.parameters()) <= 0.5 * count


def test_a_cost_that_cannot_be_met_is_refused():
    spec = rule("channel", "magnitude", target={"macs": 0.001})
    with pytest.raises(TargetError, match="macs"):
        one_shot(small_net(), spec, batches(), cross_entropy)
