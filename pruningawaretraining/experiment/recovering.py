"""Recovery in ``pat run``: rates, the average and the epochs of a run once pruning is over, and what each came to.

Shape suffixes: ``_BCHW`` images, ``_B`` labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pruningawaretraining.config.rates import LearningRates
from pruningawaretraining.config.recovery import Recovery, teaching_of
from pruningawaretraining.criteria.second_order.gathering import unchanged_copy
from pruningawaretraining.distributed.collectives import agreed, barrier, same_buffers
from pruningawaretraining.engine.rule import WORKING
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment.build import has_weights, load_weights
from pruningawaretraining.experiment.calibration import loss_of
from pruningawaretraining.experiment.data import Batch
from pruningawaretraining.experiment.optim import Scheduler
from pruningawaretraining.experiment.record import DENSE
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.experiment.state import RunState
from pruningawaretraining.experiment.train import Learner
from pruningawaretraining.recovery import (
    RewoundRates,
    averaged,
    epochs_for_time,
    measure_norms,
    step_seconds,
    take_average,
)
from pruningawaretraining.session.pruning import Pruning

Cost = Callable[[str], dict[str, float]]


class RunRecovery:
    """The recovery of one run.

    Args:
        options: what is asked for.
        rates: of the run, before pruning is over; None where they stay those of the schedule.
        epochs: of the run.

    Attributes:
        began: the epoch before which pruning was over; None so far.
        epochs: of the run, with those that a budget has added.
    """

    def __init__(self, options: Recovery, rates: RewoundRates | None, epochs: int) -> None:
        self.options, self.epochs = options, epochs
        self.began: int | None = None
        self._back: int | None = None  # the epoch at which the schedule went back last
        self._events = 0
        self._planned, self._rates = epochs, rates
        self._average: AveragedModel | None = None
        self._costs: dict[str, float] = {}

    @classmethod
    def of(
        cls, config: ExperimentConfig, optimizer: torch.optim.Optimizer, scheduler: Scheduler | None, steps: int
    ) -> RunRecovery | None:
        """That of an experiment, before its first step; None where none is asked for.

        Raises:
            ConfigError: rates that cannot be rewound.
        """
        options = config.pruning.recovery
        if options is None:
            return None
        rates = _rates(config, optimizer, scheduler, steps) if options.sets_rates else None
        if rates is not None and options.rate is not None:
            try:
                rates.after(0, None, options.rate.to)
            except ConfigError as error:
                raise ConfigError(f"recovery.rate.{error}") from None
        return cls(options, rates, config.epochs)

    # --- while the model is trained -----------------------------------------------------------------------------

    def apply(self, optimizer: torch.optim.Optimizer, epoch: float) -> float | None:
        """Set the rates of a moment, where that is left to the recovery; the first group's, or None."""
        return None if self._rates is None else self._rates.apply(optimizer, epoch)[0]

    @property
    def sets_rates(self) -> bool:
        """Whether it sets the rates, in place of the scheduler."""
        return self._rates is not None

    def stepped(self, model: nn.Module) -> None:
        """A step is over."""
        if self._average is not None and self._average_options.type == "ema":
            self._average.update_parameters(model)

    def epoch_over(self, epoch: int, model: nn.Module, pruner: Pruning, cost: Cost) -> None:
        """An epoch and its events are over.

        Args:
            epoch: number of the next one.
            model, pruner: of the run.
            cost: budget -> what an epoch of the dense and of the pruned model costs.
        """
        if self.began is None and epoch < self.epochs and _is_over(pruner):
            self.began = epoch
            if self.options.budget != "epochs":
                self._costs = cost(self.options.budget)
                self.epochs = epoch + epochs_for_time(self._planned - epoch, **self._costs)
            self._back = epoch
        events, before = sum(one.state.event for one in pruner.engine.rules), self._events
        self._events, rate = events, self.options.rate
        if rate is not None and rate.at == "events" and events > before and epoch < self.epochs:
            self._back = epoch
        if self._back == epoch:
            self._rewind()
        if self._average is not None and self._average_options.type == "swa":
            self._average.update_parameters(model)
        if self.options.average is not None and self._average is None and self._averages_from() == epoch:
            self._average = averaged(model, self.options.average.type, self.options.average.decay)
            pruner.attach_ema(self._average)

    @property
    def _average_options(self) -> Any:
        return self.options.average

    def _averages_from(self) -> int | None:
        """The first epoch whose weights are averaged."""
        if self.options.average is None or self.began is None:
            return None
        return self.epochs - max(1, round(self.options.average.last * (self.epochs - self.began)))

    def _rewind(self) -> None:
        if self._rates is None or self._back is None:
            return
        rate = self.options.rate
        how = {} if rate is None else {"warmup": rate.warmup, "peak": rate.peak}
        self._rates = self._rates.after(self._back, self.epochs, None if rate is None else rate.to, **how)

    # --- at the end ---------------------------------------------------------------------------------------------

    def finish(self, model: nn.Module, batches: Any, accuracy: Callable[[], float], last: float) -> dict[str, Any]:
        """Take the average, and say what each part came to.

        Args:
            model: in place of whose last weights the average is put.
            batches: augmented training batches.
            accuracy: of the model as it is.
            last: accuracy of the last weights.

        Returns:
            The "recovery" of ``summary.json``.
        """
        found: dict[str, Any] = {"began": self.began, "planned_epochs": self._planned, "epochs": self.epochs}
        found |= {"budget": self.options.budget, "costs": self._costs, "last": last, "average": None}
        if self._average is not None:
            take_average(model, self._average)
            unmeasured = accuracy()
            if self._average_options.norm_batches:
                measure_norms(model, batches, self._average_options.norm_batches)
                same_buffers(model)
            found["average"] = {"from": self._averages_from(), "unmeasured": unmeasured, "accuracy": accuracy()}
        return found

    # --- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs."""
        average = None if self._average is None else self._average.state_dict()
        where = {"began": self.began, "back": self._back, "events": self._events}
        return {**where, "epochs": self.epochs, "costs": self._costs, "average": average}

    def load_state_dict(self, state: dict[str, Any], model: nn.Module, pruner: Pruning) -> None:
        """Go on from a state, with the model as it was then."""
        self.began, self.epochs, self._costs = state["began"], int(state["epochs"]), dict(state["costs"])
        self._back, self._events = state["back"], state["events"]
        self._rewind()
        if state["average"] is not None:
            self._average = averaged(model, self._average_options.type, self._average_options.decay)
            self._average.load_state_dict(state["average"])
            pruner.attach_ema(self._average)


def _rates(
    config: ExperimentConfig, optimizer: torch.optim.Optimizer, scheduler: Scheduler | None, steps: int
) -> RewoundRates:
    """The rates of a run as a course: of its schedule, stepped after epochs, or of ``rates``, at every step."""
    if not config.rates:
        return RewoundRates.of(optimizer, scheduler, config.epochs)
    own = [float(group["lr"]) for group in optimizer.param_groups]
    given = LearningRates(tuple(config.rates))
    found = [given.at(number / steps, steps) for number in range(config.epochs * steps)]
    course = [own if rate is None else [rate] * len(own) for rate in found]
    return RewoundRates(course, steps, config.epochs, epochs=config.epochs)


def _is_over(pruner: Pruning) -> bool:
    """Whether all rules have met their targets; between members of a family they are only held."""
    return not any(one.rule.enabled and one.state.phase in WORKING for one in pruner.engine.rules)


def final_accuracy(recovered: Mapping[str, Any] | None, last: float) -> float:
    """That of the averaged weights, where there are any, else of the last ones."""
    average = None if recovered is None else recovered["average"]
    return last if average is None else float(average["accuracy"])


class Teaching(Protocol):
    """The part of a run that a teacher is built from."""

    config: ExperimentConfig
    state: RunState
    folder: Path

    def new_model(self) -> nn.Module: ...


def teacher_of(runner: Teaching) -> nn.Module | None:
    """The trained baseline, or None where the teacher is the model as it begins, or there is none.

    Before the baseline is trained, for the checks at a run's begin, it is the model as it begins.

    Raises:
        ConfigError: the recovery asks for the dense model, and there is none but an untrained one.
    """
    config = runner.config
    if teaching_of(config.pruning) is None:
        return None
    if not config.dense_baseline:
        if config.pruning.distillation is None and not has_weights(config.model):
            raise ConfigError(
                "recovery.distillation: no dense model is trained. Allowed: dense_baseline: true, or model.weights"
            )
        return None
    teacher = runner.new_model()
    if runner.state.stage == "pruned":
        barrier()  # the first process has written it
        load_weights(teacher, str(runner.folder / DENSE))
    return teacher


def costs_of(dense: Callable[[], nn.Module], learner: Learner, batches: Iterable[Batch]) -> Cost:
    """The cost of a step of the dense and of the pruned model, by the name of a budget; ranks agree.

    Args:
        dense: builds the dense model.
        learner: trains the pruned one, which stays as it is.
        batches: of the training.
    """

    def cost(budget: str) -> dict[str, float]:
        pruner = learner.pruner
        if budget == "macs":
            return {"dense": 1.0, "pruned": 1.0 if pruner is None else pruner.macs.fraction}
        images_BCHW, labels_B = next(iter(batches))

        def loss(model: nn.Module) -> Tensor:
            with learner.precision.autocast():
                return loss_of(model(images_BCHW), labels_B)

        with torch.random.fork_rng([one for one in (images_BCHW.device,) if one.type == "cuda"]):
            found = step_seconds({"dense": dense(), "pruned": unchanged_copy(learner.model)}, loss)
        (seconds,) = agreed(torch.tensor([found["dense"], found["pruned"]], dtype=torch.float64))
        return {"dense": float(seconds[0]), "pruned": float(seconds[1])}

    return cost
