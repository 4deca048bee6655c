"""The section ``recovery`` of a config: how a training regains the accuracy that pruning has cost."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator
from typing_extensions import Self  # noqa: UP035  (in typing from 3.11 on)

from pruningawaretraining.config.distillation import Distillation
from pruningawaretraining.config.strict import Amount, Fraction, Positive, Strict, UnitInterval, within
from pruningawaretraining.errors import ConfigError

logger = logging.getLogger(__name__)
Batches = Annotated[int, Field(ge=0), within("a whole number of 0 or more", lambda n: n >= 0 and n.is_integer())]


class RecoveryRate(Strict):
    """The learning rate once pruning is over: the schedule goes back, and is run to its end in the epochs left."""

    to: Amount = Field(
        0.0, description="Epoch of the schedule to go back to, which may be a fraction; 0 restarts the schedule."
    )
    warmup: Amount = Field(0.0, description="Epochs over which the rate rises from 0 first.")
    peak: Positive = Field(1.0, description="Factor of the rates from then on.")
    at: Literal["end", "events"] = Field(
        "end", description="end: once pruning is over. events: at every event, as beside the dynamic 'rewind'."
    )


class RecoveryAverage(Strict):
    """An average of the weights over the last part of the training, in place of the last weights."""

    type: Literal["ema", "swa"] = Field(
        "ema",
        description="ema: a moving average, after every step. swa: the mean of the weights at the ends of epochs.",
    )
    decay: UnitInterval = Field(0.999, description="Of ema: the part of the average that stays at a step.")
    last: Fraction = Field(0.25, description="Part of the epochs after pruning that is averaged; one at least.")
    norm_batches: Batches = Field(
        100,
        description="Augmented training batches on which norms are measured anew; 0: they are not.",
    )


class Recovery(Strict):
    """Measures for accuracy during pruning and after it; each can be left out."""

    rate: RecoveryRate | None = Field(None, description="What the learning rate does once pruning is over.")
    average: RecoveryAverage | None = Field(None, description="An average of the last weights.")
    distillation: Distillation | None = Field(
        None,
        description="The dense model as the teacher, from the first step on: in 'pat run' the trained baseline, or the "
        "weights that the model begins with.",
    )
    budget: Literal["epochs", "macs", "time"] = Field(
        "epochs",
        description="How long the training is. epochs: as 'epochs' says. time: the pruned model is trained longer, for "
        "the time that its faster steps save, as measured when pruning is over. macs: likewise, by its MACs.",
    )

    @property
    def sets_rates(self) -> bool:
        """Whether learning rates differ from those of the schedule once pruning is over."""
        return self.rate is not None or self.budget != "epochs"

    @property
    def follows(self) -> bool:
        """Whether anything is done once pruning is over."""
        return self.sets_rates or self.average is not None

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self == type(self).model_construct():
            raise ConfigError("recovery: nothing is asked for. Allowed: rate, average, distillation, budget")
        return self


def _one_teacher(recovery: Recovery | None, info: ValidationInfo) -> Recovery | None:
    """Refuse two teachers."""
    if recovery is not None and recovery.distillation is not None and info.data.get("distillation") is not None:
        raise ConfigError("recovery.distillation: there is 'distillation' beside the rules. Allowed: one of the two")
    return recovery


OneRecovery = Annotated[Recovery | None, AfterValidator(_one_teacher)]
"""Of a config whose ``distillation`` is the other place for a teacher."""


def teaching_of(config: Any) -> Distillation | None:
    """The teacher that a ``PruningConfig`` asks for, beside the rules or as a part of the recovery."""
    recovery: Recovery | None = config.recovery
    beside: Distillation | None = config.distillation
    return beside or (None if recovery is None else recovery.distillation)


def for_pruner(config: Any) -> Any:
    """A ``PruningConfig`` for a pruner whose loop follows ``recovery``: only the teacher is left to it."""
    return config.model_copy(update={"recovery": None, "distillation": teaching_of(config)})


def tell_of_the_loop(config: Any) -> None:
    """Say which parts of a ``PruningConfig`` no pruner does."""
    recovery: Recovery | None = config.recovery
    if recovery is None or not recovery.follows:
        return
    parts = {"rate": recovery.rate, "average": recovery.average, "budget": recovery.budget != "epochs"}
    logger.warning(
        "recovery: %s: this is for the training loop to do, not for the pruner. 'pat run' does it; in a loop of your "
        "own call the functions of pruningawaretraining.recovery",
        ", ".join(name for name, given in parts.items() if given),
    )


def recovery_lines(recovery: Recovery | None) -> list[str]:
    """Describe a recovery, one line for each part."""
    if recovery is None:
        return []
    lines = ["recovery, once pruning is over"]
    if recovery.rate is not None:
        rate = recovery.rate
        warm = f", after a warm-up of {rate.warmup:g} epochs" if rate.warmup else ""
        times = f", times {rate.peak:g}" if rate.peak != 1 else ""
        times += ", at every event" if rate.at == "events" else ""
        lines.append(f"  rate          the schedule from epoch {rate.to:g} on, in the epochs left{times}{warm}")
    if recovery.average is not None:
        one = recovery.average
        what = f"ema, decay {one.decay:g}" if one.type == "ema" else one.type
        lines.append(f"  average       {what}, over the last {one.last:.0%} of these epochs")
    if recovery.distillation is not None:
        options = recovery.distillation
        lines.append(f"  distillation  weight {options.weight:g}, temperature {options.temperature:g}, from the start")
    if recovery.budget != "epochs":
        lines.append(f"  budget        more epochs, for the {recovery.budget} that the pruned model saves")
    return lines
