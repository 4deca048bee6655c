"""The rows of ``cifar_medium.py``: what each way does to the network while it is trained like all others.

A way acts at four moments: before the training, after a backward pass, after a step, and at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from cifar_ways import LEAST, shrink, their_pruner
from one_shot_cifar import Batches
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning
from pruningawaretraining.checkpoint.state_dict import load_state_dict_pruned

TICKS = 4  # of an epoch; the rules count them as their epochs


@dataclass(frozen=True)
class Setting:
    """What every way is given.

    Args:
        epochs: of the whole training.
        steps: optimizer steps of an epoch.
        rate, decay: of SGD; a way with a penalty has no weight decay until its channels are gone.
        strength: of the growing penalty, and of Torch-Pruning's.
        calibration: batches of augmented training images.
        example: one input.
    """

    epochs: int
    steps: int
    rate: float
    decay: float
    strength: float
    calibration: Batches
    example: Tensor

    def sgd(self, parameters: Any, penalised: bool = False) -> torch.optim.SGD:
        """The optimizer of all rows."""
        decay = 0.0 if penalised else self.decay
        return torch.optim.SGD(parameters, lr=self.rate, momentum=0.9, nesterov=True, weight_decay=decay)


class Method:
    """Nothing is pruned; and what the other ways begin with.

    Args:
        model: the dense network, changed in place.
        setting: what all are given.
        target: how many times fewer MACs, for channels.
    """

    def __init__(self, model: nn.Module, setting: Setting, target: float) -> None:
        self.model, self.setting, self.target = model, setting, target
        self.optimizer: torch.optim.Optimizer

    def begin(self) -> None:
        """Before the first step of a run."""
        self.optimizer = self.setting.sgd(self.model.parameters())

    def regularize(self) -> None:
        """After a backward pass."""

    def stepped(self, done: int) -> None:
        """After an optimizer step; ``done`` of them so far."""

    def finish(self) -> None:
        """After the last step."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, in place of :meth:`begin`."""
        load_state_dict_pruned(self.model, state["model"])
        self.optimizer = self.setting.sgd(self.model.parameters())
        self.optimizer.load_state_dict(state["optimizer"])


class ByRule(Method):
    """A rule of this library; its moments are ticks, quarters of an epoch."""

    def __init__(self, model: nn.Module, setting: Setting, target: float, rule: Mapping[str, Any]) -> None:
        super().__init__(model, setting, target)
        removes = "pattern" not in rule
        rule = {**({"target": {"macs": 1 / target}, **LEAST} if removes else {"exclude": ["conv1"]}), **rule}
        self.penalised = rule.get("regularizer") is not None
        self.optimizer = setting.sgd(model.parameters(), self.penalised)
        config = {"rules": [rule]}
        self.pruner = Pruning(model, config, example_inputs=setting.example, optimizer=self.optimizer)
        self.pruner.calibrate_with(setting.calibration, functional.cross_entropy)

    def begin(self) -> None:
        self.pruner.prune(self.model, 0)

    def stepped(self, done: int) -> None:
        tick = done * TICKS // self.setting.steps
        if tick == (done - 1) * TICKS // self.setting.steps:
            return
        if self.pruner.prune(self.model, tick) == "removed" and self.penalised:
            for group in self.optimizer.param_groups:
                group["weight_decay"] = self.setting.decay

    def finish(self) -> None:
        self.pruner.on_train_end()

    def state(self) -> dict[str, Any]:
        return {**super().state(), "pruner": self.pruner.state_dict()}

    def resume(self, state: Mapping[str, Any]) -> None:
        self.pruner.load_state_dict(state["pruner"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class TheirL1(Method):
    """Torch-Pruning's L1 in one shot, before the training."""

    def begin(self) -> None:
        importance = tp.importance.MagnitudeImportance(p=1)
        example = self.setting.example
        shrink(their_pruner(self.model, example, importance, 0.0), self.model, self.target, example)
        super().begin()


class TheirGroupNorm(Method):
    """Torch-Pruning's recipe: GroupNorm sparse learning, for three tenths of the training, and then the removal."""

    def __init__(self, model: nn.Module, setting: Setting, target: float) -> None:
        super().__init__(model, setting, target)
        self.until = setting.steps * (setting.epochs * 3 // 10)
        self.done = 0
        self.pruner: Any = None

    def begin(self) -> None:
        self.optimizer = self.setting.sgd(self.model.parameters(), penalised=True)
        self._learn()

    def _learn(self) -> None:
        importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer="max")
        self.pruner = their_pruner(self.model, self.setting.example, importance, self.setting.strength)

    def regularize(self) -> None:
        if self.pruner is not None:
            self.pruner.regularize(self.model)

    def stepped(self, done: int) -> None:
        self.done = done
        if done == self.until:
            shrink(self.pruner, self.model, self.target, self.setting.example)
            self.model.train()
            self.pruner = None
            super().begin()

    def state(self) -> dict[str, Any]:
        return {**super().state(), "done": self.done}

    def resume(self, state: Mapping[str, Any]) -> None:
        super().resume(state)
        self.done = state["done"]
        if self.done < self.until:
            self._learn()


class TheirProximal(Method):
    """torchao's PAT: PruneOptimizer with a hard constraint, which grows for half of the training and is then frozen.

    Args:
        options: of its param group.
    """

    def __init__(self, model: nn.Module, setting: Setting, target: float, options: Mapping[str, Any]) -> None:
        super().__init__(model, setting, target)
        self.options = options

    def begin(self) -> None:
        from torchao.prototype.pat.optim import PruneOptimizer

        named = dict(self.model.named_parameters())
        weights = [one for name, one in named.items() if one.ndim > 1 and name != "conv1.weight"]
        others = [one for name, one in named.items() if one.ndim < 2 or name == "conv1.weight"]
        base = self.setting.sgd([{"params": weights, **self.options}, {"params": others}])
        every = self.setting.steps
        self.optimizer = PruneOptimizer(
            base, warmup_steps=every // TICKS, healing_start_step=every * self.setting.epochs // 2
        )

    def resume(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.begin()
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class Way:
    """A row of the table, at each of its targets.

    Args:
        key: in file names and --only.
        what: the part of the table: what is pruned.
        who, label: in the table.
        method: a :class:`Method`.
        options: of the method.
        targets: how many times fewer MACs; 1 where weights are masked.
        taught: whether the dense network teaches, from the first step on.
    """

    key: str
    what: str
    who: str
    label: str
    method: type[Method] = Method
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[float, ...] = (1.0,)
    taught: bool = False


OURS, TP, AO = "this library", "Torch-Pruning", "torchao"
GROWING = {"type": "growing_l2", "strength": 5e-4}
CHANNELS = {"start": 1, "end": 8, "every": 1, "regularizer": GROWING}
FITTED = {"start": 2, "end": 8, "every": 3, "regularizer": GROWING, "compensation": "least_squares"}
START = {"start": 0, "regularizer": None}
LOST = {**START, "criterion": "reconstruction", "compensation": "least_squares"}
SINGLE = {"pattern": "unstructured", "criterion": "l1", "target": {"sparsity": 0.9}}
GRADUAL = {**SINGLE, "schedule": "cubic", "start": 1, "end": 20}
PAIRS = {"pattern": "2:4", "criterion": "l1", "target": {"sparsity": 0.5}, "start": 1}
STE = {"type": "straight_through", "decay": 2e-4, "refresh": 10}
K_ELEMENTS = {"group_type": "KElementGrouper", "reg_lambda": 0.0}
LOWEST = {
    **K_ELEMENTS,
    "k": 1,
    "prox_type": "MinSparsityConstraint",
    "min_sparsity": 0.9,
    "min_sparsity_schedule": True,
}
TWO_OF_FOUR = {**K_ELEMENTS, "k": 4, "prox_type": "NMSparseConstraint", "n_nonzero": 2}
BOTH, ONE = (2.11, 4.0), (2.11,)


def _channels(key: str, label: str, rule: Mapping[str, Any], targets: tuple[float, ...], taught: bool = True) -> Way:
    return Way(key, "channels", OURS, label, ByRule, {"rule": rule}, targets, taught)


def _weights(key: str, what: str, label: str, rule: Mapping[str, Any], taught: bool = False) -> Way:
    return Way(key, what, OURS, label, ByRule, {"rule": rule}, (1.0,), taught)


WAYS = (
    Way("dense", "nothing", "nobody", "trained alike"),
    Way("dense_taught", "nothing", "nobody", "trained and distilled alike", taught=True),
    _channels("ours", "growing L2, 8 events in 2 epochs, distillation", CHANNELS, BOTH),
    _channels("ours_untaught", "... without distillation", CHANNELS, BOTH, False),
    _channels("ours_free", "... without the penalty", {**CHANNELS, "regularizer": None}, ONE),
    _channels("ours_at_once", "... all at once", {"start": 8, "regularizer": GROWING}, ONE),
    _channels("ours_fitted", "... with least squares, 3 events", FITTED, ONE),
    _channels("lost", "at the start, by what readers lose, least squares, distillation", LOST, BOTH),
    _channels("lost_untaught", "... without distillation", LOST, ONE, False),
    _channels("start", "... by magnitude, nothing adjusted", START, ONE),
    Way("tp_l1", "channels", TP, "L1, one shot", TheirL1, targets=BOTH),
    Way("tp_group", "channels", TP, "GroupNorm sparse learning, 3 epochs", TheirGroupNorm, targets=BOTH),
    _weights("w90", "90% of the weights", "magnitude, cubic in 5 epochs, distillation", GRADUAL, True),
    _weights("w90_untaught", "90% of the weights", "... without distillation", GRADUAL),
    _weights(
        "w90_acdc",
        "90% of the weights",
        "AC/DC, phases of 1 epoch",
        {**SINGLE, "schedule": "one_shot", "start": 4, "end": 28, "every": 4, "dynamic": "alternate"},
    ),
    _weights(
        "w90_rigl",
        "90% of the weights",
        "RigL, 4 events an epoch",
        {**SINGLE, "schedule": "one_shot", "start": 0, "end": 30, "dynamic": "regrow"},
    ),
    _weights("w90_ste", "90% of the weights", "SR-STE, cubic in 5 epochs", {**GRADUAL, "dynamic": STE}),
    _weights("w90_ste_taught", "90% of the weights", "... with distillation", {**GRADUAL, "dynamic": STE}, True),
    Way(
        "w90_pat",
        "90% of the weights",
        AO,
        "PAT, hard constraint, cubic in 5 epochs",
        TheirProximal,
        {"options": LOWEST},
    ),
    _weights("n24", "2:4", "magnitude, at once, distillation", PAIRS, True),
    _weights("n24_untaught", "2:4", "... without distillation", PAIRS),
    _weights("n24_ste", "2:4", "SR-STE", {**PAIRS, "dynamic": STE}),
    _weights("n24_ste_taught", "2:4", "SR-STE, distillation", {**PAIRS, "dynamic": STE}, True),
    Way("n24_pat", "2:4", AO, "PAT, hard constraint, frozen after 5 epochs", TheirProximal, {"options": TWO_OF_FOUR}),
)

QUEUE = (
    "dense", "tp_l1-2.11", "ours-2.11", "n24_ste", "w90_acdc", "dense_taught", "ours_untaught-2.11", "n24_ste_taught",
    "w90", "n24_pat", "w90_pat", "tp_group-2.11", "ours-4.0", "tp_l1-4.0", "w90_untaught", "n24", "w90_rigl",
)  # fmt: skip
