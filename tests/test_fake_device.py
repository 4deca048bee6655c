"""Everything that acts in a training step, on CUDA tensors without a GPU: right device, right shapes, no wait of the
host, nothing that a CUDA graph could not capture.

A model is trained and masked on the CPU, moved as ``model.cuda()`` does, and trained on. After the step that follows
the move everything is where it belongs, so the next ones may not even touch a tensor on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import moe
import pytest
import torch
import zoo
from attention_models import build as attention
from fake_device import CUDA, Waits, Watch, fake_cuda, move_to_cuda, put_gradients
from test_depth import Stack
from torch import Tensor, nn

from pruningawaretraining import Pruning
from pruningawaretraining.config.options import support_of
from pruningawaretraining.criteria.base import collector_of
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member
from pruningawaretraining.masks.penalties import prepare
from pruningawaretraining.registry import build, names

Built = tuple[nn.Module, Tensor]


def stack() -> Built:
    torch.manual_seed(0)
    return Stack(), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


# a name of a pattern (with a word more for a variant) -> what it is tried on, and how a config writes it
PATTERNS: dict[str, tuple[Callable[[], Built], Any]] = {
    "channel": (lambda: zoo.architecture("groupnorm"), "channel"),
    "channel of every shape": (lambda: zoo.architecture("shapes"), "channel"),
    "head": (lambda: attention("encoder"), "head"),
    "depth": (stack, "depth"),
    "expert": (moe.built, "expert"),
    "slice": (lambda: zoo.architecture("groupnorm"), "slice"),
    "block": (lambda: zoo.architecture("groupnorm"), "4x1"),
    "block that is padded": (lambda: zoo.architecture("groupnorm"), {"type": "block", "rows": 5, "columns": 3}),
    "unstructured": (lambda: zoo.architecture("groupnorm"), "unstructured"),
    "n_of_m": (lambda: zoo.architecture("groupnorm"), "2:4"),
}
LISTENING = [name for name in names("criterion") if collector_of(build("criterion", name)) is not None]
CRITERIA: dict[str, Any] = {
    **{name: name for name in LISTENING},
    **{f"{name} of single weights": {"type": name, "reduction": "max"} for name in ("snip_momentum", "movement")},
    "mac_aware": {"type": "mac_aware", "base": "taylor"},
}
OCCASIONAL = {"reconstruction": 16}
"""Criteria that look at one batch in so many."""
WITHOUT_WEIGHTS = {("bn_scale", "channel of every shape"), ("bn_scale", "head"), ("bn_scale", "expert")}
"""Regularisers that find none of their weights in a model."""


def is_structured(pattern: str) -> bool:
    return support_of(build("pattern", PATTERNS[pattern][1])).removable


@dataclass
class Run:
    """A training that goes on on fake CUDA; without an optimizer it is told of every step."""

    model: nn.Module
    pruner: Pruning
    optimizer: torch.optim.Optimizer | None
    inputs: Tensor

    def gradients(self) -> None:
        """A backward pass, with everything that listens to it."""
        put_gradients(self.model)

    def step(self) -> None:
        """The rest of a training step as loops that know the pruner write it."""
        self.pruner.on_step_begin()
        self.pruner.channel_regularize(self.model)
        self.pruner.on_before_optimizer_step()
        if self.optimizer is not None:
            self.optimizer.step()
        self.pruner.on_after_optimizer_step()
        self.pruner.on_step_end()


def on_the_cpu(pattern: str, attach: bool = True, steps: int = 2, kind: Any = None, **rule: Any) -> tuple[Run, Tensor]:
    """A training of a few steps, with masks from the first one on if the rule does not say otherwise."""
    make, spelled = PATTERNS[pattern]
    model, inputs = make()
    model.train()
    optimizer = (kind or torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9)
    config = {"rules": [{"pattern": spelled, "target": {"sparsity": 0.5}, "start": 0, "end": 3, "scope": "local"}]}
    config["rules"][0].update(rule)
    pruner = Pruning(model, config, example_inputs=inputs, optimizer=optimizer if attach else None)
    for epoch in range(steps):
        optimizer.zero_grad()
        loss = model(inputs).square().mean() + pruner.slice_regularize(model)
        loss.backward()
        if not attach:
            pruner.channel_regularize(model)
        optimizer.step()
        if not attach:
            pruner.on_after_optimizer_step()
        pruner.prune(model, epoch)
    assert steps == 0 or pruner.sparsity > 0 or rule.get("unit") == "step"
    return Run(model, pruner, optimizer, inputs), inputs


class Scaled(torch.optim.Optimizer):
    """It takes a loss scale and what overflowed, as fused optimizers do; these have no fake form."""

    def __init__(self, parameters: Any, **defaults: float) -> None:
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad * group["lr"])


@contextmanager
def on_the_gpu(pattern: str, attach: bool = True, **rule: Any) -> Iterator[Run]:
    """A training that has been moved to fake CUDA, one step after the move."""
    run, inputs = on_the_cpu(pattern, attach, **rule)
    with fake_cuda():
        move_to_cuda(run.model, () if run.optimizer is None else [run.optimizer])
        run.inputs = torch.empty(inputs.shape, device=CUDA)
        run.optimizer = run.optimizer if attach else None
        run.model(run.inputs)
        run.gradients()
        run.pruner.slice_regularize(run.model)
        run.step()
        yield run


def held(value: Any) -> list[Tensor]:
    """The tensors that an object of the library holds, those of models aside."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [one for each in value.values() for one in held(each)]
    if isinstance(value, (list, tuple)):
        return [one for each in value for one in held(each)]
    inside = type(value).__module__.startswith("pruningawaretraining") and hasattr(value, "__dict__")
    return held(vars(value)) if inside else []


def collectors_of(pruner: Pruning) -> list[Any]:
    """What listens for the pruner's criteria."""
    finer = [one.feed.collector for one in pruner.engine.weights.rules] if pruner.engine.weights is not None else []
    return finer if pruner.engine.weights is not None else [one.feed.collector for one in pruner.engine.rules]


def test_every_registered_pattern_is_tried() -> None:
    assert {name.partition(" ")[0] for name in PATTERNS} == set(names("pattern"))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_act_on_the_gpu_and_nothing_waits(pattern: str) -> None:
    with on_the_gpu(pattern) as run:
        with Watch() as backward:
            run.gradients()
        with Watch() as forward:
            out = run.model(run.inputs)
        with Watch() as step:
            run.step()
        masking = {"_foreach_mul_", "masked_fill_", "mul_"}
        assert masking & backward.operations.keys(), "gradients are masked where they are accumulated"
        assert masking & step.operations.keys() and forward.launches
        assert out.device == CUDA


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("regularizer", names("regularizer"))
def test_regularizers_act_on_the_gpu_and_nothing_waits(regularizer: str, pattern: str) -> None:
    rule = {"regularizer": {"type": regularizer, "strength": 0.01}}
    if is_structured(pattern) != hasattr(build("regularizer", regularizer), "prepare"):
        with pytest.raises(ConfigError, match="regularizer"):
            on_the_cpu(pattern, steps=0, **rule)
        return
    with on_the_gpu(pattern) as plain, Watch() as without:
        plain.gradients()
        plain.step()
        plain.pruner.slice_regularize(plain.model)
    with on_the_gpu(pattern, **rule) as run, Watch() as found:
        run.gradients()
        run.step()
        penalty = run.pruner.slice_regularize(run.model)
        assert penalty.device == CUDA and penalty.shape == ()
    if (regularizer, pattern) not in WITHOUT_WEIGHTS:
        assert found.launches > without.launches


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_listen_on_the_gpu_and_nothing_waits(criterion: str) -> None:
    tried = 0
    for pattern in ("channel", "n_of_m", "block that is padded", "depth", "expert"):
        try:
            with on_the_gpu(pattern, criterion=CRITERIA[criterion]) as run:
                collectors = collectors_of(run.pruner)
                assert all(one is not None for one in collectors)
                passes = OCCASIONAL.get(criterion, 1)
                for _ in range(passes - 1):
                    run.model(run.inputs)
                with Watch():
                    for _ in range(passes):
                        run.model(run.inputs)
                    run.gradients()
                    run.step()
                tensors = held([vars(one) for one in collectors])
                assert tensors and all(one.device == CUDA for one in tensors)
            tried += 1
        except ConfigError:  # the criterion is not for this pattern
            continue
    assert tried


def test_criteria_that_listen_are_all_tried() -> None:
    assert len(LISTENING) >= 14 and set(LISTENING) <= CRITERIA.keys()


@pytest.mark.parametrize(
    ("pattern", "regularizer"),
    [("channel", "growing_l2"), ("slice", "slice_penalty"), ("block", "block_lasso"), ("depth", "group_lasso")],
)
def test_explicit_calls_act_on_the_gpu_and_nothing_waits(pattern: str, regularizer: str) -> None:
    with on_the_gpu(pattern, attach=False, regularizer=regularizer) as run, Watch() as watch:
        run.model(run.inputs).sum() + run.pruner.slice_regularize(run.model)
        run.gradients()
        run.step()
        assert run.optimizer is None and not run.pruner._steps.optimizers
    assert watch.launches


@pytest.mark.parametrize("pattern", ["channel", "block"])
def test_a_loss_scale_and_skipped_steps_stay_on_the_gpu(pattern: str) -> None:
    """What a GradScaler gives fused optimizers; rules that count steps must not ask how many were skipped."""
    kind = "growing_l2" if is_structured(pattern) else "block_lasso"
    rule = {"unit": "step", "start": 0, "end": 1000, "every": 100, "regularizer": kind, "criterion": "taylor"}
    with on_the_gpu(pattern, kind=Scaled, **rule) as run:
        assert run.optimizer is not None
        run.optimizer.grad_scale = torch.empty((), device=CUDA)
        run.optimizer.found_inf = torch.empty((), device=CUDA)
        for _ in range(3):
            with Watch() as watch:
                run.gradients()
                run.step()
        assert watch.launches
        assert len(run.pruner._steps.counts) == 4 and isinstance(run.pruner._steps.fresh, Tensor)
        run.optimizer.param_groups[0]["lr"] = torch.empty((), device=CUDA)  # as capturable optimizers may have it
        with Watch():
            run.gradients()
            session = run.pruner._session
            session.on_round()
            session.on_gradients(run.optimizer.grad_scale, None)
            session.on_moved()
            session.on_stepped()


def test_several_optimizers_share_a_step_and_nothing_waits() -> None:
    run, inputs = on_the_cpu("channel", regularizer="group_lasso", criterion="taylor")
    parameters = list(run.model.parameters())
    optimizers = [torch.optim.SGD(half, lr=0.01, momentum=0.9) for half in (parameters[::2], parameters[1::2])]
    with fake_cuda():
        move_to_cuda(run.model)
        for watch in (Watch(strict=False), Watch()):
            with watch:
                run.gradients()
                for optimizer in optimizers:
                    optimizer.step()
    # once for both: rows of conv1, conv2 and hidden, columns of conv2, hidden and out
    assert watch.operations["linalg_vector_norm"] == 6


@pytest.mark.parametrize("narrower", [False, True])
def test_distillation_acts_on_the_gpu_and_nothing_waits(narrower: bool) -> None:
    model, inputs = zoo.architecture("groupnorm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule = {"target": {"sparsity": 0.5}, "start": 0, "end": 50}
    config = {"rules": [rule], "distillation": {"features": ["conv2", "hidden"]}}
    pruner = Pruning(model, config, example_inputs=inputs, optimizer=optimizer)
    pruner.prune(model, 0)
    if narrower:
        pruner.remove()
    for _ in range(2):  # the second step moves the projectors
        pruner.distill_loss(model(inputs), inputs).backward()
        optimizer.step()
    assert pruner.teacher is not None
    with fake_cuda():
        move_to_cuda(model, [optimizer], pruner.teacher)
        fake = torch.empty(inputs.shape, device=CUDA)
        for watch in (Watch(strict=False), Watch()):
            with watch:
                loss = pruner.distill_loss(model(fake), fake)
                for parameter in () if not narrower else pruner._session.distiller._features.parameters():
                    parameter.grad = torch.empty_like(parameter)
        assert loss.device == CUDA and loss.shape == ()


def test_a_weight_of_more_than_a_block_is_regularized() -> None:
    layer = nn.Conv2d(256, 512, 3, bias=False)
    sides = [Member.along("weight", layer.weight, dim, torch.arange(512 // (dim + 1)), 512, "out") for dim in (0, 1)]
    grouping = Grouping("channel", tuple(sides), (GroupSet("layer", 0, 512),))
    ready = [prepare(build("regularizer", kind), grouping) for kind in ("group_lasso", "growing_l2")]
    with fake_cuda():
        move_to_cuda(layer)
        put_gradients(layer)
        for one in ready:
            factor_G = one.factors()
            assert factor_G.shape == (512,) and factor_G.device == CUDA
            one()


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "a value": lambda x: float(x.sum()),
    "a branch": lambda x: 1 if (x > 0).any() else 0,
    "a mask": lambda x: x[x > 0],
    "a mask written": lambda x: x.index_put_((x > 0,), torch.empty(2, device=CUDA)),
    "places": lambda x: torch.nonzero(x),
    "a copy to the GPU": lambda x: x + torch.ones(3).to(CUDA),
    "a number of the CPU": lambda x: x * torch.tensor(2.0),
    "a copy to the CPU": lambda x: x.cpu(),
    "a new tensor of numbers": lambda x: x.new_tensor([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("what", WAITING)
def test_the_watch_notices(what: str) -> None:
    with fake_cuda():
        x = torch.empty(3, device=CUDA)
        with pytest.raises(Waits), Watch():
            WAITING[what](x)
