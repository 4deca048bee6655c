"""The ways of pruning that ``cifar_resnet56.py`` compares: this library's, and Torch-Pruning's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch_pruning as tp
from cifar_training import Data, Phase, train
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Distiller, Pruning, count_macs
from pruningawaretraining.proximal import CoupledChannelGrouper, LambdaController, PruneOptimizer
from pruningawaretraining.session.one_shot import AfterPruning, one_shot

Note = Callable[[nn.Module], None]
Prune = Callable[[nn.Module, float, Data, Phase, "Distiller | None", Note], nn.Module]

TICKS = 12  # of the first phase; a rule counts them as its epochs
FIRST, LAST = 2, 10
OBS = {"type": "obs", "num_grads": 128, "micro_batch": 4}
VARIANCE = {"type": "variance_next"}
LARGEST = {"type": "magnitude", "normalize": "max"}
REPAIR = AfterPruning(compensation="least_squares", norm_batches=16, input_batches=16)
FITTED = {"compensation": "least_squares", "every": 4}
LEAST = {"max_sparsity": 0.9}  # a tenth of every layer stays


@dataclass(frozen=True)
class Way:
    """A row of the table.

    Args:
        key: in file names and --only.
        who, label: in the table.
        prune: trains for the first phase, prunes in it, notes the model just then, and gives it back.
        distill: whether the dense model teaches in both phases.
        lr: where it is not that of the others.
    """

    key: str
    who: str
    label: str
    prune: Prune = field(repr=False)
    distill: bool = False
    lr: float | None = None


def left_alone(
    model: nn.Module, target: float, data: Data, phase: Phase, distiller: Distiller | None, note: Note
) -> nn.Module:
    """Nothing is pruned: what the training does by itself."""
    note(model)
    train(model, phase.budget.optimizer(model.parameters()), data, phase, distiller)
    return model


def by_rule(
    model: nn.Module,
    target: float,
    data: Data,
    phase: Phase,
    distiller: Distiller | None,
    note: Note,
    *,
    criterion: Any,
    regularize: bool = False,
    **options: Any,
) -> nn.Module:
    """A rule of :class:`Pruning` inside the training, in events of a schedule."""
    budget = phase.budget
    rule = {
        "criterion": criterion,
        "schedule": "linear",
        "start": FIRST,
        "end": LAST,
        "target": {"macs": 1 / target},
        **LEAST,
        **options,
    }
    if regularize:
        rule["regularizer"] = {"type": "growing_l2", "strength": budget.strength}
    optimizer = budget.optimizer(model.parameters(), 0.0 if regularize else None)
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=data.example, optimizer=optimizer)
    pruner.calibrate_with(data.calibration, functional.cross_entropy)
    ticks = [round(phase.steps * tick / TICKS) for tick in range(TICKS + 1)]

    def stepped(done: int) -> None:
        for tick in range(TICKS + 1):
            if ticks[tick] == done:
                began = pruner.phase
                pruner.prune(model, tick)
                if pruner.phase == "finetune" != began:
                    note(model)
                    for group in optimizer.param_groups:
                        group["weight_decay"] = budget.decay

    train(model, optimizer, data, phase, distiller, stepped=stepped)
    pruner.on_train_end()
    return model


def at_first(
    model: nn.Module,
    target: float,
    data: Data,
    phase: Phase,
    distiller: Distiller | None,
    note: Note,
    *,
    criterion: Any,
    allocation: str | None = None,
    after: AfterPruning = REPAIR,
) -> nn.Module:
    """One shot, the readers of what is gone adjusted and norms measured anew, and then training."""
    rule = {"criterion": criterion, "allocation": allocation, "target": {"macs": 1 / target}, **LEAST}
    (pruned,) = one_shot(model, rule, data.calibration, functional.cross_entropy, after=after).values()
    note(pruned)
    train(pruned, phase.budget.optimizer(pruned.parameters()), data, phase, distiller)
    return pruned


def proximal(
    model: nn.Module, target: float, data: Data, phase: Phase, distiller: Distiller | None, note: Note
) -> nn.Module:
    """Group lasso on coupled channels by proximal steps; what is 0 is removed."""
    start, end = phase.steps // 6, phase.steps * 5 // 6
    grouper = CoupledChannelGrouper(model, data.example, max_sparsity=0.9, relative=True)
    base = phase.budget.optimizer(grouper.param_groups())
    optimizer = PruneOptimizer(base, warmup_steps=start, healing_start_step=end)
    every = max((end - start) // 20, 1)
    controller = LambdaController.for_macs(optimizer, grouper, 1 / target, start, end, every=every)
    train(model, optimizer, data, phase, distiller, stepped=lambda done: controller.step())
    pruner = Pruning(model, {"rules": [grouper.removal_rule()]}, example_inputs=data.example, optimizer=optimizer)
    pruner.prune(model, 0)
    note(model)
    pruner.on_train_end()
    return model


def their_pruner(model: nn.Module, example: Tensor, importance: Any, strength: float) -> Any:
    """Torch-Pruning's pruner as its CIFAR recipe sets it up, without the residual streams, which option A fixes."""
    kept = [model.conv1, model.linear]
    kept += [block.conv2 for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.pruner.GroupNormPruner(
            model,
            (example,),
            importance=importance,
            reg=strength,
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=400,
            ignored_layers=kept,
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )


def shrink(pruner: Any, model: nn.Module, target: float, example: Tensor) -> None:
    """Torch-Pruning's own steps until ``target`` times fewer MACs are left; the model is in eval mode after it."""
    model.eval()
    wanted = count_macs(model, example) / target
    for _ in range(400):
        if count_macs(model, example) <= wanted:
            return
        pruner.step()
    raise RuntimeError("Torch-Pruning has not met the target in 400 steps")


def their_sparse_learning(
    model: nn.Module, target: float, data: Data, phase: Phase, distiller: Distiller | None, note: Note
) -> nn.Module:
    """GroupNorm sparse learning for the first phase, then the removal: the recipe of the published figures."""
    importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer="max")
    pruner = their_pruner(model, data.example, importance, phase.budget.strength)
    optimizer = phase.budget.optimizer(model.parameters(), 0.0)
    train(model, optimizer, data, phase, distiller, regularize=lambda: pruner.regularize(model))
    shrink(pruner, model, target, data.example)
    note(model)
    return model


def their_l1(
    model: nn.Module, target: float, data: Data, phase: Phase, distiller: Distiller | None, note: Note
) -> nn.Module:
    """L1 in one shot, and then training."""
    pruner = their_pruner(model, data.example, tp.importance.MagnitudeImportance(p=1), 0.0)
    shrink(pruner, model, target, data.example)
    note(model)
    train(model, phase.budget.optimizer(model.parameters()), data, phase, distiller)
    return model


OURS, THEIRS = "this library", "Torch-Pruning"
RECONSTRUCTION_FIRST = partial(at_first, criterion="reconstruction")
L2_FIRST = partial(at_first, criterion=LARGEST)
WAYS = (
    Way("rec_first", OURS, "reconstruction per MAC, one shot, least squares", RECONSTRUCTION_FIRST),
    Way("rec_taught", OURS, "the same, distillation", RECONSTRUCTION_FIRST, distill=True),
    Way(
        "rec_steps",
        OURS,
        "reconstruction per MAC, iterative, least squares",
        partial(by_rule, criterion="reconstruction", **FITTED),
    ),
    Way("l2_first", OURS, "global L2, one shot, least squares", L2_FIRST),
    Way("l2_bare", OURS, "global L2, one shot, nothing adjusted", partial(L2_FIRST, after=AfterPruning())),
    Way(
        "growing",
        OURS,
        "growing L2 + global L2, iterative, least squares",
        partial(by_rule, criterion=LARGEST, regularize=True, **FITTED),
    ),
    Way(
        "growing_bare",
        OURS,
        "growing L2 + global L2, iterative, nothing adjusted",
        partial(by_rule, criterion=LARGEST, regularize=True),
    ),
    Way("proximal", OURS, "proximal coupled group lasso", proximal),
    Way(
        "variance",
        OURS,
        "variance per MAC, one shot, least squares",
        partial(at_first, criterion=VARIANCE, allocation="macs"),
    ),
    Way("obs", OURS, "OBS per MAC, one shot, least squares", partial(at_first, criterion=OBS, allocation="macs")),
    Way("tp_l1", THEIRS, "L1, one shot", their_l1),
    Way("tp_l1_fast", THEIRS, "L1, one shot, lr 0.02", their_l1, lr=0.02),
    Way("tp_group", THEIRS, "GroupNorm sparse learning", their_sparse_learning),
    Way("dense", "nobody", "not pruned, the same training", left_alone),
)
