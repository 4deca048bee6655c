"""What processes share: wrappers made anew with their options, and moments put together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining import Pruning
from pruningawaretraining.criteria import input_moments as moments
from pruningawaretraining.criteria.input_moments import ActivationCollector
from pruningawaretraining.distributed.ddp import outdated
from pruningawaretraining.errors import ModelError
from pruningawaretraining.patterns.block import Unstructured


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Task(nn.Module):
    """As timm's: it trains through a wrapper that it holds itself."""

    def __init__(self, wrapped):
        super().__init__()
        self.trainable_module = wrapped

    def forward(self, images):
        return {"loss": self.trainable_module(images).sum()}


def test_a_wrapper_made_anew_keeps_its_options_and_serves_whoever_holds_it(group):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=torch.randn(1, 1, 8, 8))
    wrapped = DistributedDataParallel(model, bucket_cap_mb=3, find_unused_parameters=True, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, bf16_compress_hook)
    wrapped.eval()
    assert pruner.rewrap(wrapped) is wrapped and not outdated(wrapped)
    pruner.prune(wrapped, 0)
    assert outdated(wrapped)
    task, seen = Task(wrapped), []
    wrapped.register_forward_hook(lambda *_: seen.append("forward"))
    new = pruner.rewrap(wrapped)
    assert new is wrapped and task.trainable_module is new
    assert not outdated(new) and new.module is model and not new.training
    assert new.bucket_bytes_cap == 3 * 1024 * 1024 and new.find_unused_parameters and new.gradient_as_bucket_view
    assert [hook for hook, _ in new._comm_hooks] == [bf16_compress_hook]
    new.train()
    task(torch.randn(2, 1, 8, 8))["loss"].backward()
    assert seen == ["forward"], "hooks of the user's stay"
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert pruner.rewrap(model) is model


@pytest.mark.parametrize("through", ["prune", "state"])
def test_a_forgotten_rewrap_is_named_at_the_next_step_and_the_reminder_goes(group, through):
    """Only training is refused, nothing is replaced, and no hook stays."""
    rule = {"rules": [{"target": {"sparsity": 0.5}}]}
    images = torch.randn(2, 1, 8, 8)

    def made():
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        return Pruning(model, rule, example_inputs=images[:1]), DistributedDataParallel(model)

    pruner, wrapped = made()
    task, before = Task(wrapped), dict(wrapped._forward_pre_hooks)
    if through == "prune":
        pruner.prune(wrapped, 0)
    else:
        other, _ = made()
        other.prune(None, 0)
        pruner.load_state_dict(other.state_dict())
    for _ in range(2):
        with pytest.raises(ModelError, match=r"still averages the gradients .* model = pruner.rewrap\(model\)"):
            task(images)
    with torch.no_grad():
        task(images)
    task.eval()
    task(images)
    task.train()
    assert pruner.rewrap(wrapped) is wrapped
    for _ in range(2):
        task(images)["loss"].backward()
    assert dict(wrapped._forward_pre_hooks) == before


def test_wrappers_of_other_models_and_new_ones_train_on(group):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=torch.randn(1, 1, 8, 8))
    other, _ = DistributedDataParallel(nn.Linear(3, 3)), DistributedDataParallel(model)
    pruner.prune(model, 0)
    new = DistributedDataParallel(model)
    other(torch.randn(2, 3)).sum().backward()
    new(torch.randn(2, 1, 8, 8)).sum().backward()
    assert not new._forward_pre_hooks and not other._forward_pre_hooks


@pytest.mark.parametrize("momentum", [1.0, 0.5])
def test_moments_of_two_processes_are_those_of_all_their_inputs(monkeypatch, momentum):
    """Events in the middle, batches after them, and a momentum that lets earlier batches fade."""
    layer = nn.Sequential(nn.Linear(3, 2))
    grouping = Unstructured().build(layer)
    whole, first, second = (ActivationCollector(momentum) for _ in range(3))
    for one in (whole, first, second):
        one._layers = {"0": layer[0]}
    rows = torch.randn(12, 8, 3, generator=torch.Generator().manual_seed(0)) + 5
    monkeypatch.setattr(moments, "world_size", lambda: 2)

    def see(number: int) -> None:
        for one, part in ((whole, rows[number]), (first, rows[number, ::2]), (second, rows[number, 1::2])):
            one._see("0", layer[0], part)

    def agree() -> None:
        sums = [[one._sums("0", layer[0])] for one in (first, second)]
        monkeypatch.setattr(moments, "totals", lambda _: [sums[0][0] + sums[1][0]])
        first.agree()
        second.agree()

    for number in range(12):
        see(number)
        if number in (4, 8, 11):
            agree()
            for key, value in whole.tensors().items():
                torch.testing.assert_close(first.tensors()[key], value, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(second.tensors()[key], value, rtol=1e-5, atol=1e-6)
    assert grouping.size == 6
