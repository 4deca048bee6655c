"""PruneOptimizer: its semantics step by step against a plain reading of them, and how it behaves as an optimizer.

Shape suffixes: ``_W`` any weight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.proximal import Dim0Grouper, ProxGroupLasso, PruneOptimizer
from pruningawaretraining.registry import names

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "sgd plain": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "sgd foreach": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.02),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, lr=0.02, fused=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.02),
    "tensor lr": lambda groups: torch.optim.Adam(groups, lr=torch.tensor(0.02)),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.02),
}


class Foreign(torch.optim.Optimizer):
    """An optimizer of another library, that keeps the parameters it was given and never looks at its groups."""

    def __init__(self, groups: list[dict[str, Any]], lr: float = 0.1) -> None:
        super().__init__(groups, {"lr": lr})
        self.kept = [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for parameter in self.kept:
            if parameter.grad is not None:
                state = self.state[parameter]
                if len(state) == 0:
                    state["steps"] = torch.zeros(())
                state["steps"] += 1
                parameter.sub_(parameter.grad, alpha=0.1)


class ScheduleFree(torch.optim.Optimizer):
    """Steps z, trains at a mix y of z and its average x, and puts x into the weights to evaluate them; counts in "k".

    As schedulefree's SGD does, with beta = 0.9.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float = 0.1) -> None:
        super().__init__(groups, {"lr": lr, "k": 0})

    @torch.no_grad()
    def move(self, weight: float) -> None:
        for group in self.param_groups:
            for one in group["params"]:
                one.lerp_(self.state[one]["z"], weight)

    def eval(self) -> None:
        self.move(1 - 1 / 0.9)

    def train(self) -> None:
        self.move(1 - 0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            for one in group["params"]:
                z = self.state[one].setdefault("z", one.detach().clone())
                one.lerp_(z, 1 / group["k"])
                one.add_(one.grad, alpha=group["lr"] * (0.9 * (1 - 1 / group["k"]) - 1))
                z.sub_(one.grad, alpha=group["lr"])


def weights(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def group(params: list[nn.Parameter], **options: Any) -> dict[str, Any]:
    return {
        "params": params,
        "group_type": "Dim0Grouper",
        "prox_type": "ProxGroupLasso",
        "reg_lambda": 0.05,
        **options,
    }


def pull(params: list[nn.Parameter], step: int) -> None:
    """Gradients that depend on where the weights are."""
    for index, parameter in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + index)
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = (0.1 * parameter.detach() + noise).to(parameter.dtype)


def row_lasso(weight_W: Tensor, threshold: float) -> Tensor:
    """The map as it is defined."""
    rows = weight_W.flatten(1)
    out = torch.zeros_like(rows)
    for index, row in enumerate(rows):
        norm = row.norm()
        if norm > 0:
            out[index] = row * max(0.0, 1 - threshold * math.sqrt(row.numel()) / float(norm))
    return out.view_as(weight_W)


class Plain:
    """The five rules of the method, written down without a thought for speed."""

    def __init__(self, base: torch.optim.Optimizer, warmup: int, healing: float, reg_lambda: float) -> None:
        self.base, self.warmup, self.healing, self.reg_lambda = base, warmup, healing, reg_lambda
        self.n, self.gamma = 0, 0.0
        self.params = base.param_groups[0]["params"]
        self.latent: list[Tensor] = []
        self.masks: list[Tensor] = []

    @torch.no_grad()
    def step(self) -> None:
        if self.n >= self.healing:
            self.masks = self.masks or [p != 0 for p in self.params]
            for p, mask in zip(self.params, self.masks, strict=True):
                p.grad.mul_(mask)
            self.base.step()
            for p, mask in zip(self.params, self.masks, strict=True):
                p.mul_(mask)
        elif self.n < self.warmup:
            self.base.step()
        else:
            for p, latent in zip(self.params, self.latent, strict=False):
                p.copy_(latent)
            self.base.step()
            self.gamma += float(self.base.param_groups[0]["lr"])
            self.latent = [p.clone() for p in self.params]
            for p in self.params:
                p.copy_(row_lasso(p, self.reg_lambda * self.gamma))
        self.n += 1


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("warmup", "healing"), [(0, None), (2, None), (2, 6), (0, 3)])
def test_every_step_is_as_the_rules_say(name: str, warmup: int, healing: int | None) -> None:
    ours, plain = weights((6, 4), (5, 3, 2, 2)), weights((6, 4), (5, 3, 2, 2))
    strength = 1.5 if name.startswith("sgd") else 8.0
    optimizer = PruneOptimizer(BASES[name]([group(ours, reg_lambda=strength)]), warmup, healing)
    reference = Plain(BASES[name]([{"params": plain}]), warmup, math.inf if healing is None else healing, strength)
    for step in range(9):
        pull(ours, step)
        pull(plain, step)
        optimizer.step()
        reference.step()
        for mine, theirs in zip(ours, plain, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert any(bool((p == 0).any()) for p in ours)


@pytest.mark.parametrize("redirect", [True, False])
def test_both_ways_to_the_latents_agree(redirect: bool) -> None:
    ours, plain = weights((6, 4)), weights((6, 4))
    optimizer = PruneOptimizer(BASES["adamw"]([group(ours, reg_lambda=8.0)]), redirect=redirect)
    reference = Plain(BASES["adamw"]([{"params": plain}]), 0, math.inf, 8.0)
    for step in range(5):
        pull(ours, step)
        pull(plain, step)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours[0], plain[0])


def test_an_optimizer_that_holds_its_own_parameters_works() -> None:
    ours, plain = weights((6, 4)), weights((6, 4))
    optimizer = PruneOptimizer(Foreign([group(ours, reg_lambda=1.5)]))
    reference = Plain(Foreign([{"params": plain}]), 0, math.inf, 1.5)
    for step in range(5):
        pull(ours, step)
        pull(plain, step)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours[0], plain[0])
    assert float(optimizer.state[ours[0]]["steps"]) == 5


def test_unregularised_groups_are_the_base_optimizers_alone() -> None:
    (one, other), (alone,) = weights((6, 4), (3,)), weights((3,), seed=5)
    alone.data.copy_(other)
    optimizer = PruneOptimizer(BASES["adam"]([group([one]), {"params": [other]}]))
    base = BASES["adam"]([alone])
    for step in range(4):
        pull([one, other], step)
        alone.grad = other.grad.clone() if other.grad is not None else None
        optimizer.step()
        base.step()
    torch.testing.assert_close(other, alone, rtol=0, atol=0)
    assert set(optimizer.state[other]) == set(base.state[alone])


def test_zero_lambda_changes_nothing() -> None:
    ours, plain = weights((6, 4)), weights((6, 4))
    optimizer, base = PruneOptimizer(BASES["adamw"]([group(ours, reg_lambda=0.0)])), BASES["adamw"](plain)
    for step in range(5):
        pull(ours, step)
        pull(plain, step)
        optimizer.step()
        base.step()
    torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=0)


def test_gamma_is_the_sum_of_learning_rates_since_the_warm_up() -> None:
    ours = weights((4, 4))
    optimizer = PruneOptimizer(torch.optim.SGD([group(ours)], lr=0.1), warmup_steps=2, healing_start_step=6)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    seen = []
    for step in range(8):
        pull(ours, step)
        optimizer.step()
        seen.append(optimizer.param_groups[0]["gamma"])
        scheduler.step()
    rates = [0.1 * 0.5**step for step in range(8)]
    assert seen[:2] == [0.0, 0.0]
    assert seen[2:6] == pytest.approx([sum(rates[2 : 3 + k]) for k in range(4)])
    assert seen[6:] == [seen[5]] * 2


@pytest.mark.parametrize(
    ("freq", "healing", "prox", "runs"),
    [
        (1, None, {"prox_type": "ProxGroupLasso", "reg_lambda": 1e3}, [2, 3, 4, 5, 6, 7, 8]),
        (3, None, {"prox_type": "ProxGroupLasso", "reg_lambda": 1e3}, [2, 5, 8]),
        (4, 9, {"prox_type": "MinSparsityConstraint", "min_sparsity": 0.5}, [2, 6, 8]),
        (4, 9, {"prox_type": "ProxGroupLasso", "reg_lambda": 1e3}, [2, 6]),
    ],
)
def test_the_map_runs_every_prox_freq_steps_and_a_hard_one_before_healing(
    freq: int, healing: int | None, prox: dict[str, Any], runs: list[int]
) -> None:
    ours = weights((6, 4))
    optimizer = PruneOptimizer(torch.optim.SGD([group(ours, prox_freq=freq, **prox)], lr=0.1), 2, healing)
    pruned = []
    for step in range(9):
        pull(ours, step)
        optimizer.step()
        if bool((ours[0] == 0).any()):
            pruned.append(step)
    assert pruned == runs


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (True, [0, 0, 0, *(math.ceil(0.8 * (1 - (1 - k / 8) ** 3) * 100 - 1e-6) for k in range(1, 7)), 80]),
        ("linear", [0, 0, 0, *(math.ceil(0.8 * k / 8 * 100 - 1e-6) for k in range(1, 7)), 80]),
        (None, [0, 0, *[80] * 8]),
    ],
)
def test_a_hard_target_follows_its_ramp(schedule: Any, expected: list[int]) -> None:
    ours = weights((100, 3))
    options = {"prox_type": "MinSparsityConstraint", "min_sparsity": 0.8, "min_sparsity_schedule": schedule}
    optimizer = PruneOptimizer(torch.optim.SGD([group(ours, **options)], lr=0.01), 2, 10)
    counts = []
    for step in range(10):
        pull(ours, step)
        optimizer.step()
        counts.append(int((ours[0] == 0).all(1).sum()))
    assert counts == expected


def test_healing_freezes_zeros_and_trains_the_rest() -> None:
    ours = weights((6, 4))
    optimizer = PruneOptimizer(BASES["sgd"]([group(ours, prox_type="MinSparsityConstraint", min_sparsity=0.5)]), 0, 3)
    for step in range(3):
        pull(ours, step)
        optimizer.step()
    zero, before = ours[0].detach() == 0, ours[0].detach().clone()
    assert int(zero.all(1).sum()) == 3
    for step in range(3, 8):
        pull(ours, step)
        optimizer.step()
        assert torch.equal(ours[0] == 0, zero)
        assert bool((ours[0].grad[zero] == 0).all())
    assert bool((ours[0] != before)[~zero].all())
    assert "latent" not in optimizer.state[ours[0]]


# As an optimizer


def test_it_is_an_optimizer_and_shares_the_bases_groups() -> None:
    ours = weights((4, 4))
    base = BASES["sgd"]([group(ours)])
    optimizer = PruneOptimizer(base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults == base.defaults
    assert "SGD" in repr(optimizer)


@pytest.mark.parametrize("name", ["sgd", "adamw", "tensor lr", "adafactor"])
@pytest.mark.parametrize("stop", [1, 3, 5, 7])
def test_resumed_equals_uninterrupted(name: str, stop: int, tmp_path: Any) -> None:
    def start() -> tuple[list[nn.Parameter], PruneOptimizer]:
        params = weights((6, 4), (5, 3, 2, 2))
        return params, PruneOptimizer(BASES[name]([group(params)]), 2, 6)

    def train(params: list[nn.Parameter], optimizer: PruneOptimizer, steps: range) -> None:
        for step in steps:
            pull(params, step)
            optimizer.step()

    whole, optimizer = start()
    train(whole, optimizer, range(9))
    first, before = start()
    train(first, before, range(stop))
    torch.save({"model": [p.detach() for p in first], "optimizer": before.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    second, _ = start()
    with torch.no_grad():
        for parameter, value in zip(second, saved["model"], strict=True):
            parameter.copy_(value)
    after = PruneOptimizer(BASES[name]([group(second)]))  # other phases than in the state, which counts
    after.load_state_dict(saved["optimizer"])
    assert (after.num_steps, after.warmup_steps, after.healing_start_step) == (stop, 2, 6)
    train(second, after, range(stop, 9))
    for mine, theirs in zip(second, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_plain_state_of_the_base_optimizer_can_be_loaded() -> None:
    first, second = weights((4, 4)), weights((4, 4))
    base = BASES["adam"](first)
    pull(first, 0)
    base.step()
    optimizer = PruneOptimizer(BASES["adam"]([group(second)]))
    optimizer.load_state_dict(base.state_dict())
    assert torch.equal(optimizer.state[second[0]]["exp_avg"], base.state[first[0]]["exp_avg"])
    assert optimizer.param_groups[0]["reg_lambda"] == 0.05
    pull(second, 1)
    optimizer.step()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"group_type": "Dim1Grouper"}, "Dim1Grouper"), ({"prox_type": "ProxLasso"}, "ProxLasso")],
)
def test_a_state_of_other_types_is_refused(change: dict[str, Any], message: str) -> None:
    one, other = weights((4, 4)), weights((4, 4))
    state = PruneOptimizer(BASES["sgd"]([group(one)])).state_dict()
    with pytest.raises(CheckpointError, match=message):
        PruneOptimizer(BASES["sgd"]([group(other, **change)])).load_state_dict(state)


def test_types_in_the_state_are_names() -> None:
    one, other = weights((4, 4)), weights((4, 4))
    optimizer = PruneOptimizer(BASES["sgd"]([group(one, group_type=Dim0Grouper, prox_type=ProxGroupLasso)]))
    saved = optimizer.state_dict()["param_groups"][0]
    assert (saved["group_type"], saved["prox_type"]) == ("Dim0Grouper", "ProxGroupLasso")
    PruneOptimizer(BASES["sgd"]([group(other, group_type="pat.group.Dim0Grouper")])).load_state_dict(
        optimizer.state_dict()
    )
    assert optimizer.param_groups[0]["group_type"] is Dim0Grouper


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_grad_scaler_skips_a_step_with_infinities(base: str) -> None:
    ours = weights((4, 4))
    optimizer = PruneOptimizer(BASES[base]([group(ours)]))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step, bad in enumerate((False, True, False)):
        optimizer.zero_grad()
        scaler.scale((ours[0] * (math.inf if bad else 1.0)).sum()).backward()
        before = ours[0].detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(ours[0], before) == bad, step
    assert optimizer.num_steps == 2


def test_line_search_over_the_pruned_weights() -> None:
    """LBFGS calls its closure several times in a step, and each time the model must hold the image of the latents."""
    (weight,) = weights((4, 3))
    target = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    seen = []
    options = group([weight], prox_type="NMSparseConstraint", group_type="KElementGrouper", k=3, n_nonzero=1)
    base = torch.optim.LBFGS([weight], lr=1, max_iter=5, line_search_fn="strong_wolfe")
    base.param_groups[0].update({key: value for key, value in options.items() if key != "params"})
    optimizer = PruneOptimizer(base)

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(int((weight != 0).sum(1).max()))
        loss = (weight - target).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert len(seen) > 6
    assert seen[0] == 3
    assert set(seen[1:]) == {1}
    assert losses[2] < losses[0]
    assert optimizer.param_groups[0]["params"][0] is weight


@pytest.mark.parametrize("phase", ["warmup", "proximal", "healing"])
def test_closures_work_in_every_phase(phase: str) -> None:
    one, other = weights((6, 4)), weights((6, 4))
    options = {"prox_type": "MinSparsityConstraint", "min_sparsity": 0.5}
    phases = {"warmup": (9, None), "proximal": (0, None), "healing": (0, 2)}[phase]
    first = PruneOptimizer(BASES["sgd"]([group(one, **options)]), *phases)
    second = PruneOptimizer(BASES["sgd"]([group(other, **options)]), *phases)
    for step in range(5):

        def closure(step: int = step) -> Tensor:
            pull(one, step)
            return one[0].detach().sum()

        before = one[0].detach().sum()
        assert torch.equal(first.step(closure), before)
        pull(other, step)
        assert second.step() is None
        torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    assert int((one[0] == 0).all(1).sum()) == (0 if phase == "warmup" else 3)


def test_subclasses_of_pytorchs_optimizers_take_the_short_way() -> None:
    class Mine(torch.optim.SGD):
        pass

    class Other(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)

    (weight,) = weights((4, 4))
    assert PruneOptimizer(Mine([group([weight])], lr=0.1)).redirect
    assert not PruneOptimizer(Other([group([weight])], lr=0.1)).redirect
    assert not PruneOptimizer(Foreign([group([weight])])).redirect


def test_a_failing_step_leaves_everything_in_its_place() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise RuntimeError("no")

    ours = weights((4, 4))
    optimizer = PruneOptimizer(Broken([group(ours)], lr=0.1), redirect=True)
    pull(ours, 0)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    assert optimizer.param_groups[0]["params"][0] is ours[0]
    assert list(optimizer.state) == [ours[0]]
    assert optimizer.num_steps == 0


def test_memory_stays_where_it_is() -> None:
    """Views of a weight (buckets, captured graphs) must see its new values."""
    ours = weights((4, 4))
    view, where = ours[0].detach().view(-1), ours[0].data_ptr()
    optimizer = PruneOptimizer(BASES["sgd"]([group(ours)]))
    for step in range(3):
        pull(ours, step)
        optimizer.step()
    assert ours[0].data_ptr() == where
    assert torch.equal(view.view(4, 4), ours[0])


# Errors at construction


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_type": "Dim0Groper"}, r"group_type: 'Dim0Groper' is not known; did you mean 'Dim0Grouper'"),
        ({"prox_type": "pat.prox.ProxGrupLasso"}, r"did you mean 'ProxGroupLasso'"),
        ({"prox_type": 3}, "prox_type"),
        ({"group_type": None}, "group_type: missing"),
        ({"group_type": "KElementGrouper"}, r"param_groups\[0\].k: missing"),
        ({"group_type": "KElementGrouper", "k": 0}, "k: 0 is not allowed"),
        ({"group_type": "KElementGrouper", "k": "four"}, "k: 'four' is not a number"),
        ({"group_type": "ConvFilterGrouper"}, "3 dimensions or more"),
        ({"group_type": "AttentionHeadGrouperDim0", "num_heads": 4}, "num_heads=4"),
        ({"prox_type": "MinSparsityConstraint"}, "min_sparsity: missing"),
        ({"prox_type": "MinSparsityConstraint", "min_sparsity": 1.5}, "min_sparsity: 1.5 is not allowed"),
        ({"prox_type": "NMSparseConstraint", "n_nonzero": 9}, "n_nonzero=9 is more than the 4 elements"),
        ({"prox_type": "GlobalMinSparsityConstraint", "min_sparsity": 0.5, "score_type": "l1"}, "score_type: 'l1'"),
        ({"prox_type": "ProxNuclearNorm"}, "does not go with ProxNuclearNorm"),
        ({"group_type": "SVDGrouper"}, "SVDGrouper does not go with ProxGroupLasso"),
        ({"prox_freq": 0}, "prox_freq: 0"),
        ({"reg_lambda": -1.0}, "reg_lambda: -1.0"),
        ({"reg_lamda": 1.0}, "did you mean 'reg_lambda'"),
        ({"gamma_index_slope": -0.1}, "gamma_index_slope"),
        ({"prox_through_heal": True}, "SVD groupers only"),
        (
            {"prox_type": "MinSparsityConstraint", "min_sparsity": 0.5, "min_sparsity_schedule": True},
            "needs a healing_start_step",
        ),
        ({"group_type": "CoupledChannelGrouper"}, "instance"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneOptimizer(BASES["sgd"]([group(weights((6, 4)), **options)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps: -1"),
        ({"warmup_steps": 5, "healing_start_step": 5}, "healing_start_step: 5"),
        ({"warmup_steps": 1.5}, "warmup_steps: 1.5"),
        ({"reg_lambda": -1}, "reg_lambda: -1"),
    ],
)
def test_wrong_phases_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneOptimizer(BASES["sgd"](weights((4, 4))), **options)


def test_only_optimizers_are_wrapped() -> None:
    with pytest.raises(ConfigError, match="base_optimizer"):
        PruneOptimizer(nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["Dim0Grouper", "pat.group.Dim0Grouper", "any.where.Dim0Grouper", Dim0Grouper])
def test_types_are_names_paths_and_classes(spec: Any) -> None:
    ours = weights((6, 4))
    optimizer = PruneOptimizer(BASES["sgd"]([group(ours, group_type=spec, reg_lambda=1e3)]))
    pull(ours, 0)
    optimizer.step()
    assert optimizer.relative_sparsity == 1.0


def test_every_grouper_and_map_is_known_by_its_name() -> None:
    assert set(names("grouper")) >= {
        "Dim0Grouper",
        "Dim1Grouper",
        "ElemGrouper",
        "LayerGrouper",
        "KElementGrouper",
        "ConvFilterGrouper",
        "AttentionHeadGrouperDim0",
        "AttentionHeadGrouperDim1",
        "SVDGrouper",
        "PackedSVDGrouper",
        "CoupledChannelGrouper",
    }
    assert set(names("prox")) >= {
        "ProxLasso",
        "ProxGroupLasso",
        "ProxNuclearNorm",
        "MinSparsityConstraint",
        "GlobalMinSparsityConstraint",
        "MinRankConstraint",
        "NMSparseConstraint",
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_sparsity", 0.7),
        ("prox_type", "ProxGroupLasso"),
        ("prox_type", None),
        ("group_type", "Dim1Grouper"),
        ("prox_freq", 3),
        ("gamma_index_slope", 0.5),
        ("min_sparsity_schedule", True),
        ("prox_min_sparsity", 0.7),
    ],
)
def test_options_are_frozen_once_the_optimizer_is_made(key: str, value: Any) -> None:
    ours = weights((10, 4))
    options = group(ours, prox_type="MinSparsityConstraint", min_sparsity=0.2)
    optimizer = PruneOptimizer(torch.optim.SGD([options], lr=0.01), 0, 10)
    pull(ours, 0)
    optimizer.step()
    before, was = ours[0].detach().clone(), optimizer.param_groups[0].get(key)
    optimizer.param_groups[0][key] = value
    pull(ours, 1)
    with pytest.raises(ConfigError, match=rf"param_groups\[0\].{key}: .*{value!r} was {was!r} .* options stay"):
        optimizer.step()
    assert torch.equal(ours[0], before) and optimizer.num_steps == 1
    optimizer.param_groups[0][key] = was
    optimizer.step()
    assert int((ours[0] == 0).all(1).sum()) == 2


def test_what_schedulers_change_may_change() -> None:
    """Learning rates, weight decay and the strength of the regularisation; groups may be added."""
    ours, more = weights((10, 4)), weights((4, 4))
    optimizer = PruneOptimizer(torch.optim.SGD([group(ours, reg_lambda=0.0)], lr=0.1, momentum=0.9))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)  # changes momentum as well
    rates = []
    for step in range(5):
        pull(ours, step)
        optimizer.param_groups[0]["reg_lambda"] = 10.0 * (step == 4)
        optimizer.param_groups[0]["weight_decay"] = 1e-4 * step
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        assert bool((ours[0] == 0).all()) == (step == 4)
    assert optimizer.param_groups[0]["gamma"] == pytest.approx(sum(rates)) and len(set(rates)) == 5
    optimizer.add_param_group(group(more, reg_lambda=1e3))
    pull(more, 0)
    optimizer.step()
    assert not bool(more[0].any())


def test_zeros_hold_in_what_a_schedule_free_optimizer_evaluates() -> None:
    (weight,) = weights((6, 8))
    options = group([weight], group_type="KElementGrouper", prox_type="NMSparseConstraint", n_nonzero=2, prox_k=4)
    base = ScheduleFree([options])
    optimizer = PruneOptimizer(base, 0, 6)
    for step in range(10):
        pull([weight], step)
        optimizer.step()
    gone = weight == 0
    assert int(gone.sum()) == 24 and base.param_groups[0]["k"] == 10
    base.eval()
    assert torch.equal(weight == 0, gone)
    assert not bool(base.state[weight]["z"][gone].any()) and bool(base.state[weight]["z"][~gone].all())
    base.train()
    pull([weight], 10)
    optimizer.step()
    assert torch.equal(weight == 0, gone)


def test_deep_copies_train_on_alone() -> None:
    ours = weights((6, 4))
    optimizer = PruneOptimizer(BASES["adam"]([group(ours)]))
    pull(ours, 0)
    optimizer.step()
    (copied,), other = copy.deepcopy((ours, optimizer))
    before = ours[0].detach().clone()
    assert other.param_groups[0]["params"][0] is copied
    pull([copied], 1)
    other.step()
    assert torch.equal(ours[0], before)
    pull(ours, 1)
    optimizer.step()
    torch.testing.assert_close(copied, ours[0], rtol=0, atol=0)
