"""The proximal step on CUDA tensors of a machine that may have none: where its tensors are, that it waits for nothing.

``FakeTensorMode`` computes shapes and devices, not values; what needs a value on the host (``.item()``, ``nonzero``,
boolean indexing) raises there. Plans are made at the first step, which may move index vectors to the device; from then
on nothing goes between host and device, so that a step can be captured in a CUDA graph. Singular values are the
exception: their decomposition itself waits for the device (an error code is read), which no fake shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torchvision
from fake_device import need_fake_cuda
from proximal_cases import PAIRS, Operations, Residual, coupled_grouper, fields, shapes_for
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pruningawaretraining.proximal import CoupledChannelGrouper, PruneOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
LASSO = {"prox_type": "ProxGroupLasso", "reg_lambda": 1e-4}


class NoTransfers(TorchDispatchMode):
    """Refuses copies between host and device, and operations that mix tensors of both."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {one.device.type for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)}
        if len(devices) > 1:
            raise AssertionError(f"{func} between {sorted(devices)}")
        return out


@pytest.fixture
def fake() -> FakeTensorMode:
    """Where CUDA tensors can be without a device."""
    need_fake_cuda()
    return FakeTensorMode(allow_non_fake_inputs=True)


def weights_of(shapes: Sequence[Sequence[int]]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty(shape, device="cuda")) for shape in shapes]


def with_gradients(weights: list[nn.Parameter]) -> list[nn.Parameter]:
    """Backward needs a device, so gradients are put there by hand."""
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    return weights


def on_cuda(grouper: CoupledChannelGrouper, model: nn.Module) -> CoupledChannelGrouper:
    """The grouper on another model of the same weights; outside the fake mode, for its labels are read."""
    assert grouper.rebind(model)
    grouper.model = model
    assert len(grouper.grouping.set_ids) == grouper.grouping.size
    assert all(len(member.identity) == member.parameter.dim() for member in grouper.grouping.members)
    return grouper


def optimizer_of(groups: list[dict[str, Any]], **options: Any) -> PruneOptimizer:
    """Adam that can be captured: learning rate, steps and gamma on the device."""
    base = torch.optim.Adam(groups, lr=0.01, capturable=True)
    for group in base.param_groups:
        group["lr"] = torch.tensor(0.01, device="cuda")  # its constructor reads the value
    return PruneOptimizer(base, **options)


def steps(optimizer: PruneOptimizer, weights: list[nn.Parameter], phases: int = 2) -> None:
    """A first step, which plans, and one in which nothing crosses between host and device; the same for every phase."""
    for _ in range(phases):
        optimizer.step()
        with NoTransfers():
            optimizer.step()
    for weight in weights:
        own = optimizer.state[weight]
        assert own["exp_avg"].device == weight.device
        for key in {"latent", "mask"} & set(own):
            assert own[key].device == weight.device
            assert own[key].shape == weight.shape
        assert weight.device.type == "cuda"
    assert all(group["gamma"].device.type == "cuda" for group in optimizer.regularized_param_groups())


@pytest.mark.parametrize("healing", [None, 2], ids=["shrinking", "healing"])
@pytest.mark.parametrize(("grouper", "prox"), PAIRS)
def test_a_step_stays_on_the_device_and_reads_nothing(
    grouper: str, prox: str, healing: int | None, fake: FakeTensorMode
) -> None:
    entry: Any = grouper
    if grouper == "CoupledChannelGrouper":
        with fake, torch.device("cuda"):
            model = Residual()
        entry = on_cuda(coupled_grouper(relative=True, max_sparsity=0.9), model)
    with fake:
        coupled = isinstance(entry, CoupledChannelGrouper)
        weights = entry.parameters() if coupled else weights_of(shapes_for(grouper))
        group = {"params": with_gradients(weights), "group_type": entry, "prox_type": prox, **fields(grouper)}
        optimizer = optimizer_of([group], healing_start_step=healing)
        steps(optimizer, weights)
        expected = {"latent"} if healing is None else {"mask"}
        assert all(expected & set(optimizer.state[weight]) or "rank" in optimizer.state[weight] for weight in weights)
        for weight in weights:
            if "rank" in optimizer.state[weight]:
                assert optimizer.state[weight]["rank"].device.type == "cuda"


@pytest.mark.parametrize("redirect", [True, False])
def test_a_ramp_and_steps_without_the_map_stay_on_the_device(redirect: bool, fake: FakeTensorMode) -> None:
    with fake:
        weights = with_gradients(weights_of([(8, 12), (8, 12)]))
        group = {"params": weights, "group_type": "Dim0Grouper", "prox_type": "MinSparsityConstraint"}
        group |= {"min_sparsity": 0.5, "min_sparsity_schedule": True, "prox_freq": 2}
        optimizer = optimizer_of([group], healing_start_step=20, redirect=redirect)
        steps(optimizer, weights, phases=4)


def test_what_is_reached_is_read_only_when_asked(fake: FakeTensorMode) -> None:
    """The exception that a host sync raises is what the other tests rely on."""
    with fake:
        weights = with_gradients(weights_of([(8, 12)]))
        optimizer = optimizer_of([{"params": weights, "group_type": "Dim0Grouper", **LASSO}])
        optimizer.step()
        with pytest.raises(DataDependentOutputException):
            assert optimizer.relative_sparsity >= 0
        with pytest.raises(AssertionError, match="between"), NoTransfers():
            weights[0].to("cpu")


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "rows": ({"group_type": "Dim0Grouper", **LASSO}, 45),
    "columns": ({"group_type": "Dim1Grouper", **LASSO}, 65),
    "elements": ({"group_type": "ElemGrouper", "prox_type": "ProxLasso", "reg_lambda": 1e-4}, 15),
    "2:4": ({"group_type": "KElementGrouper", "k": 4, "prox_type": "NMSparseConstraint", "n_nonzero": 2}, 60),
    "half of the rows": ({"group_type": "Dim0Grouper", "prox_type": "MinSparsityConstraint", "min_sparsity": 0.5}, 50),
    "coupled": (LASSO, 60),
}


def operations_of(optimizer: torch.optim.Optimizer) -> int:
    optimizer.step()
    with Operations() as operations:
        optimizer.step()
    return operations.total


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_resnet50_adds_few_operations(case: str, fake: FakeTensorMode) -> None:
    """Its 54 weights one by one were 115 operations for the group lasso of rows, and 2,039 for 2:4."""
    options, most = CASES[case]
    grouper = None
    if case == "coupled":
        grouper = CoupledChannelGrouper(torchvision.models.resnet50(), torch.zeros(1, 3, 64, 64))
    with fake, torch.device("cuda"):
        model = torchvision.models.resnet50()
    if grouper is not None:
        on_cuda(grouper, model)
    with fake:
        weights = [weight for weight in model.parameters() if weight.dim() > 1]
        with_gradients(list(model.parameters()))
        groups = grouper.param_groups(**options) if grouper else [{"params": weights, **options}]
        plain = [{"params": group["params"]} for group in groups]
        bare = operations_of(torch.optim.SGD(plain, 0.1, momentum=0.9, foreach=True))
        ours = operations_of(PruneOptimizer(torch.optim.SGD(groups, 0.1, momentum=0.9, foreach=True)))
    assert ours - bare <= most
