"""What goes wrong in other proximal optimizers, one test each."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.proximal import PruneOptimizer


def group(*params: nn.Parameter, **options: Any) -> dict[str, Any]:
    return {
        "params": list(params),
        "group_type": "Dim0Grouper",
        "prox_type": "ProxGroupLasso",
        "reg_lambda": 1e3,
        **options,
    }


def sgd(*groups: dict[str, Any], **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(list(groups), **{"lr": 0.1, **options})


def weight(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def step(optimizer: PruneOptimizer, *params: nn.Parameter, gradient: float = 0.01) -> None:
    for parameter in params:
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


@pytest.mark.parametrize("prox", ["ProxGroupLasso", "ProxLasso"])
def test_a_zero_group_at_threshold_zero_is_not_nan(prox: str) -> None:
    one = nn.Parameter(torch.zeros(3, 4))
    step(PruneOptimizer(sgd(group(one, prox_type=prox, reg_lambda=0.0))), one, gradient=0.0)
    assert torch.equal(one, torch.zeros(3, 4))


def test_no_regularised_group_is_a_plain_optimizer() -> None:
    one, other = weight(3, 4), weight(3, 4)
    optimizer, base = PruneOptimizer(torch.optim.SGD([one], lr=0.1)), torch.optim.SGD([other], lr=0.1)
    for _ in range(3):
        step(optimizer, one)
        other.grad = torch.full_like(other, 0.01)
        base.step()
    assert torch.equal(one, other)
    assert optimizer.num_steps == 3
    assert optimizer.relative_sparsity == 0.0


@pytest.mark.parametrize("warmup", [0, 3])
def test_groups_can_be_added_after_the_first_step(warmup: int) -> None:
    one, other = weight(3, 4), weight(5, 4)
    optimizer = PruneOptimizer(torch.optim.Adam([group(one)], lr=0.1), warmup)
    step(optimizer, one)
    optimizer.add_param_group(group(other))
    for _ in range(4):
        step(optimizer, one, other)
    assert optimizer.parameter_sparsity() == {"param_groups[0].params[0]": 1.0, "param_groups[1].params[0]": 1.0}


def test_a_group_that_is_refused_leaves_no_trace() -> None:
    one, other = weight(3, 4), weight(5, 4)
    optimizer = PruneOptimizer(sgd(group(one)))
    with pytest.raises(ConfigError, match="group_type"):
        optimizer.add_param_group(group(other, group_type="Dim7Grouper"))
    assert len(optimizer.param_groups) == 1
    step(optimizer, one)


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_weight_may_get_its_first_gradient_late(base: type[torch.optim.Optimizer], warmup: int) -> None:
    one, late = weight(3, 4), weight(3, 4, seed=1)
    late.requires_grad_(False)
    before = late.detach().clone()
    optimizer = PruneOptimizer(base([group(one, late)], lr=0.1), warmup)  # type: ignore[call-arg]
    for _ in range(4):
        step(optimizer, one)
    assert torch.equal(late, before)
    late.requires_grad_(True)
    step(optimizer, one, late)
    assert bool((late == 0).all())


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_weight_may_get_its_first_gradient_while_healing(base: type[torch.optim.Optimizer]) -> None:
    one, late = weight(3, 4), weight(3, 4, seed=1)
    optimizer = PruneOptimizer(base([group(one, late)], lr=0.1), 0, 2)  # type: ignore[call-arg]
    for _ in range(4):
        step(optimizer, one)
    before = late.detach().clone()
    step(optimizer, one, late)
    assert bool((late != before).all())


def test_weights_without_a_gradient_are_not_shrunk() -> None:
    one, idle = weight(3, 4), weight(3, 4, seed=1)
    before = idle.detach().clone()
    optimizer = PruneOptimizer(sgd(group(one, idle)))
    for _ in range(3):
        step(optimizer, one)
    assert torch.equal(idle, before)
    assert idle not in optimizer.state


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.RMSprop])
def test_the_base_optimizer_may_have_trained_before(base: type[torch.optim.Optimizer]) -> None:
    one = weight(3, 4)
    inner = base([group(one)], lr=0.1)  # type: ignore[call-arg]
    one.grad = torch.ones_like(one)
    inner.step()
    step(PruneOptimizer(inner), one)
    assert float(inner.state[one]["step"]) == 2
    assert bool((one == 0).all())


def test_deep_copies_end() -> None:
    one = weight(3, 4)
    optimizer = PruneOptimizer(sgd(group(one)))
    step(optimizer, one)
    copied = copy.deepcopy(optimizer)
    assert copied.num_steps == 1
    assert copied.base_optimizer is not optimizer.base_optimizer
    assert copied.param_groups[0]["params"][0] is not one
    assert copied.param_groups is copied.base_optimizer.param_groups
    with pytest.raises(AttributeError):
        _ = copied.no_such_thing


@pytest.mark.parametrize("redirect", [True, False])
def test_closures_see_the_pruned_weights(redirect: bool) -> None:
    one = weight(3, 4)
    optimizer = PruneOptimizer(sgd(group(one, reg_lambda=6.0)), redirect=redirect)
    step(optimizer, one)
    pruned, seen = one.detach().clone(), []
    assert 0 < int((pruned == 0).all(1).sum()) < 3

    def closure() -> Tensor:
        seen.append(one.detach().clone())
        optimizer.zero_grad()
        loss = one.square().sum()
        loss.backward()
        return loss.detach()

    assert torch.equal(optimizer.step(closure), pruned.square().sum())
    assert torch.equal(seen[0], pruned)
    assert len(seen) == 1


def test_step_hooks_see_the_pruned_weights() -> None:
    one = weight(3, 4)
    optimizer = PruneOptimizer(sgd(group(one)))
    zeros: dict[str, list[bool]] = {"before": [], "after": []}

    def look(when: str) -> Any:
        return lambda *_: zeros[when].append(bool((one == 0).all()))

    optimizer.register_step_pre_hook(look("before"))
    optimizer.register_step_post_hook(look("after"))
    step(optimizer, one)
    step(optimizer, one)
    assert zeros == {"before": [False, True], "after": [True, True]}


@pytest.mark.parametrize(("fraction", "count"), [(0.07, 7), (0.29, 29), (0.58, 58), (0.071, 8)])
def test_a_fraction_of_the_groups_is_free_of_float_error(fraction: float, count: int) -> None:
    one = weight(100, 4)
    step(PruneOptimizer(sgd(group(one, prox_type="MinSparsityConstraint", min_sparsity=fraction))), one)
    assert int((one == 0).all(1).sum()) == count


@pytest.mark.parametrize(
    ("value", "options", "expected"),
    [
        (torch.zeros(4, 6), {}, 1.0),
        (torch.ones(3, 6), {"group_type": "KElementGrouper", "k": 4}, 1.0),
        (torch.zeros(3, 6), {"group_type": "LayerGrouper"}, 1.0),
        (
            torch.tensor([[4.0, 1, 2, 3, 5, 6]]),
            {"group_type": "KElementGrouper", "k": 4, "prox_type": "NMSparseConstraint", "n_nonzero": 2},
            2 / 6,
        ),
    ],
)
def test_sparsity_counts_zeroed_layers_and_padded_groups(
    value: Tensor, options: dict[str, Any], expected: float
) -> None:
    one = nn.Parameter(value)
    optimizer = PruneOptimizer(sgd(group(one, **options)))
    step(optimizer, one, gradient=0.0)
    assert optimizer.relative_sparsity == pytest.approx(expected)
    assert list(optimizer.parameter_sparsity().values()) == pytest.approx([expected])


def test_sparsity_is_that_of_now_between_proximal_steps() -> None:
    one = weight(4, 6)
    optimizer = PruneOptimizer(sgd(group(one, prox_freq=2)))
    reached = []
    for _ in range(4):
        step(optimizer, one)
        reached.append(optimizer.relative_sparsity)
    assert reached == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
@pytest.mark.parametrize(
    "options",
    [
        {"group_type": "Dim0Grouper"},
        {"group_type": "Dim1Grouper"},
        {"group_type": "ConvFilterGrouper"},
        {"group_type": "KElementGrouper", "k": 4},
        {"group_type": "AttentionHeadGrouperDim0", "num_heads": 2},
        {"group_type": "AttentionHeadGrouperDim1", "num_heads": 2},
        {"group_type": "KElementGrouper", "k": 4, "prox_type": "NMSparseConstraint", "n_nonzero": 2},
        {"group_type": "SVDGrouper", "prox_type": "ProxNuclearNorm"},
    ],
)
def test_memory_formats_make_no_difference(options: dict[str, Any], layout: str) -> None:
    values = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(7))
    plain = nn.Parameter(values.clone())
    other = nn.Parameter(
        {
            "channels_last": values.clone(memory_format=torch.channels_last),
            "transposed": values.transpose(0, 3).contiguous().transpose(0, 3),
            "strided": torch.stack([values, values], -1)[..., 0],
        }[layout]
    )
    for parameter in (plain, other):
        optimizer = PruneOptimizer(sgd(group(parameter, **{"reg_lambda": 2.0, **options}), momentum=0.9), 1, 4)
        for number in range(6):
            noise = torch.randn(plain.shape, generator=torch.Generator().manual_seed(number))
            parameter.grad = torch.empty_like(parameter).copy_(noise)
            optimizer.step()
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)
    assert other.stride() != plain.stride()


def test_phases_and_thresholds_are_in_the_state() -> None:
    one = weight(3, 4)
    optimizer = PruneOptimizer(sgd(group(one, reg_lambda=2.0)), 2, 7)
    for _ in range(4):
        step(optimizer, one)
    saved = optimizer.state_dict()["param_groups"][0]
    wanted = {"num_steps": 4, "warmup_steps": 2, "healing_start_step": 7, "reg_lambda": 2.0}
    assert {key: saved[key] for key in wanted} == wanted
    assert saved["gamma"] == pytest.approx(0.2)


def test_counters_are_exact_for_half_precision_weights() -> None:
    """1000 steps of 0.001: in bfloat16 a sum stops growing at 0.25, and a rank of 257 becomes 256."""
    one = nn.Parameter(torch.randn(3, 4).bfloat16())
    optimizer = PruneOptimizer(sgd(group(one, reg_lambda=1e-6), lr=0.001))
    for _ in range(1000):
        step(optimizer, one, gradient=0.0)
    other = nn.Parameter(one.detach().clone())
    again = PruneOptimizer(sgd(group(other), lr=0.001))
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["gamma"] == pytest.approx(1.0)
    assert again.num_steps == 1000
    large = nn.Parameter(torch.eye(257).bfloat16())
    options = {"group_type": "SVDGrouper", "prox_type": "MinRankConstraint", "min_sparsity": 0.0}
    low = PruneOptimizer(sgd(group(large, **options)))
    step(low, large, gradient=0.0)
    low.load_state_dict(low.state_dict())
    assert low.state[large]["rank"].tolist() == [257]


@pytest.mark.parametrize(
    "wrong", [{"group_type": "NoGrouper"}, {"prox_type": "NoProx"}, {"group_type": "KElementGrouper"}]
)
def test_wrong_types_surface_at_construction(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PruneOptimizer(sgd(group(weight(3, 4), **wrong)))


def test_a_packed_qkv_does_not_mix_heads() -> None:
    """Head 0 is small in query, key and value alike; cutting one of two heads must take its rows in all three."""
    values = torch.ones(3, 2, 4, 8)
    values[:, 0] = 0.1
    values[1, 1] = 0.05  # a small key in the large head must not save the small head
    one = nn.Parameter(values.view(24, 8).clone())
    options = {"group_type": "AttentionHeadGrouperDim0", "num_heads": 2}
    step(
        PruneOptimizer(sgd(group(one, prox_type="MinSparsityConstraint", min_sparsity=0.5, **options))),
        one,
        gradient=0.0,
    )
    kept = (one.detach().view(3, 2, 4, 8) != 0).flatten(2)
    assert bool((~kept[:, 0]).all()) and bool(kept[:, 1].all())


class Reads(TorchDispatchMode):
    """Notes operations that wait for the device, or whose output's shape depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prox_type": "ProxLasso"},
        {"prox_type": "MinSparsityConstraint", "min_sparsity": 0.5},
        {"prox_type": "GlobalMinSparsityConstraint", "min_sparsity": 0.5},
        {"group_type": "KElementGrouper", "k": 4, "prox_type": "NMSparseConstraint", "n_nonzero": 2},
        {"gamma_index_slope": 0.5},
    ],
)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_no_step_waits_for_the_device(options: dict[str, Any], lr: Any) -> None:
    one, other = weight(6, 8), weight(5, 8)
    optimizer = PruneOptimizer(sgd(group(one, other, **options), lr=lr, foreach=True), 1, 5)
    step(optimizer, one, other)
    step(optimizer, one, other)
    base = torch.optim.SGD([weight(6, 8)], lr=lr, foreach=True)
    base.param_groups[0]["params"][0].grad = torch.ones(6, 8)
    with Reads() as of_base:
        base.step()
    for _ in range(6):  # proximal and healing steps
        with Reads() as reads:
            step(optimizer, one, other)
        assert sorted(set(reads.found) - set(of_base.found)) == []


def test_nothing_overflows_in_half_precision() -> None:
    one = nn.Parameter(torch.full((2, 4096), 200.0).half())
    step(PruneOptimizer(sgd(group(one, reg_lambda=1.0), lr=1.0)), one, gradient=0.0)
    assert bool(torch.isfinite(one).all())
    assert float(one.detach().max()) == pytest.approx(200 - 1.0, rel=1e-3)
    assert math.isfinite(float(one.detach().float().norm()))
