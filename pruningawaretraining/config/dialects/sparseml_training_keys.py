"""The modifiers of SparseML-style recipes that are about training, and their keys."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator
from typing_extensions import Self  # noqa: UP035  (in typing from 3.11 on)

from pruningawaretraining.config.strict import Amount, Positive, Strict, UnitInterval, within
from pruningawaretraining.errors import ConfigError

Number = Annotated[float, within("a number", math.isfinite)]
Epoch = Annotated[float, within("-1, or a number of 0 or more", lambda value: value == -1 or 0 <= value < math.inf)]
Pace = Annotated[float, within("-1, or a number above 0", lambda value: value == -1 or 0 < value < math.inf)]
Names = str | list[str]


class Modifier(Strict):
    """Keys of every modifier."""

    start_epoch: Epoch = Field(-1.0, description="First epoch.")
    end_epoch: Epoch = Field(-1.0, description="Last epoch; -1 for none.")

    unused: ClassVar[dict[str, str]] = {}
    """Keys that have no meaning here -> why; said where they are given."""

    @model_validator(mode="after")
    def _ends_after_its_start(self) -> Self:
        if self.end_epoch != -1 and self.end_epoch < self.start_epoch:
            least = f"{self.start_epoch:g} or later, or -1"
            raise ConfigError(f"end_epoch: {self.end_epoch:g} is before start_epoch. Allowed: {least}")
        return self


class EpochRange(Modifier):
    """How long to train."""

    start_epoch: Epoch = Field(0.0, description="Ignored: training begins at epoch 0.")

    unused = {"start_epoch": "training begins at epoch 0"}


class SetRate(Modifier):
    """A learning rate from an epoch on."""

    learning_rate: Amount | None = Field(None, description="The rate; absent: the optimizer's own.")
    param_groups: list[int] | None = Field(None, description="Ignored.")
    constant_logging: bool = Field(False, description="Ignored.")

    unused = {"param_groups": "every parameter group gets the rate", "constant_logging": "loops log by themselves"}


class RateFunction(Modifier):
    """A learning rate that changes between two epochs, in cycles where it has ``cycle_epochs``."""

    lr_func: Literal["linear", "cosine", "cyclic_linear", "exponential", "step"] = Field(description="How it changes.")
    init_lr: Amount = Field(description="The rate at the start of every cycle.")
    final_lr: Amount = Field(description="The rate at the end of every cycle, or the least one.")
    cycle_epochs: Pace | None = Field(None, description="Epochs of a cycle; absent: one cycle from start to end.")
    cycle_mul: Amount = Field(1.0, description="Factor on the rate from one cycle to the next.")
    cycle_warmup: Amount = Field(0.0, description="Epochs of a linear warm-up inside every cycle.")
    warmup: Amount = Field(0.0, description="Another name for cycle_warmup.")
    decay_rate: Amount = Field(0.9, description="exponential and step: the factor of one decay.")
    decay_epochs: Positive = Field(1.0, description="exponential and step: epochs of one decay.")
    param_groups: list[int] | None = Field(None, description="Ignored.")
    update_frequency: Number = Field(-1.0, description="Ignored.")
    constant_logging: bool = Field(False, description="Ignored.")

    unused = {**SetRate.unused, "update_frequency": "the rate changes at every step"}


class RateSchedule(Modifier):
    """A learning rate by one of PyTorch's schedulers."""

    lr_class: Literal["StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingWarmRestarts"] = Field(
        description="The scheduler."
    )
    lr_kwargs: dict[str, Any] = Field({}, description="Its arguments, in epochs: gamma, step_size, milestones, T_0 ...")
    init_lr: Amount = Field(description="The rate at the start.")
    constant_logging: bool = Field(False, description="Ignored.")
    update_frequency: Number = Field(-1.0, description="Ignored.")

    unused = RateFunction.unused


class Distillation(Modifier):
    """A teacher beside the model."""

    hardness: UnitInterval = Field(0.5, description="Weight of the teacher's part; the task's loss has the rest.")
    temperature: Positive = Field(2.0, description="Temperature of the logits.")
    distill_output_keys: list[Any] | None = Field(None, description="Ignored: the logits are compared.")
    teacher_input_keys: list[Any] | None = Field(None, description="Ignored: the loop hands the inputs over.")
    update_frequency: Number = Field(-1.0, description="Ignored.")

    unused = {
        "distill_output_keys": "distill_loss compares the logits that it is given",
        "teacher_input_keys": "distill_loss is given the teacher's inputs",
        "update_frequency": "distillation has no events",
    }


class Outside(Modifier):
    """A modifier of training or quantization, which is not the pruner's; any keys."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Quantization(Outside):
    """Quantization-aware training from an epoch on: the loop's, see docs/quantization.md."""

    disable_quantization_observer_epoch: Number | None = Field(None, description="Epoch at which ranges are frozen.")
    freeze_bn_stats_epoch: Number | None = Field(None, description="Epoch at which batch norms are frozen.")
