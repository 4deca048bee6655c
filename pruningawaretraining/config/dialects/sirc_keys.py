"""The keys of ``channel_sparsity_args`` and ``slice_sparsity_args``, what each means and what it allows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from typing_extensions import Self  # noqa: UP035  (in typing from 3.11 on)

from pruningawaretraining.config.dialects.base import check_window, schedule_name
from pruningawaretraining.config.dialects.flat import layer_list
from pruningawaretraining.config.strict import Amount, Count, Fraction, Strict, UnitInterval, Whole
from pruningawaretraining.config.targets import ExampleInputs
from pruningawaretraining.errors import ConfigError, unknown


def one_of(*allowed: str) -> AfterValidator:
    """A check for a name of any case; gives the spelling that is listed."""

    def check(value: str, info: ValidationInfo) -> str:
        spelled = {name.lower(): name for name in allowed}
        if value.lower() not in spelled:
            raise ConfigError(unknown(str(info.field_name), value, allowed))
        return spelled[value.lower()]

    return AfterValidator(check)


class Regularize(Strict):
    """``regularize``: the penalty on channels."""

    reg: Amount = Field(0.0, description="Base strength, lambda; 0: no penalty.")
    mac_reg: Amount = Field(0.0, description="Adds to lambda what a channel's MACs are to the mean, times this.")
    gamma: Amount = Field(1.0, description="Exponent on the growing factor.")
    alpha_shrinkage_reg: Amount = Field(4.0, description="The growing factor goes from 1 to 2 to the power of this.")


class MacParams(Strict):
    """``MAC_params``: weighs the score of a channel with its MACs."""

    use_macs: bool | None = Field(None, description="On or off; on by default for MACAwareImportance alone.")
    type: Annotated[str, one_of("Sum", "Mul", "per_mac")] = Field("Sum", description="How score and MACs are combined.")
    alpha: UnitInterval | None = Field(None, description="Sum: weight of the score, the MACs having the rest.")
    beta: Amount | None = Field(None, description="Mul: the root taken of the share of MACs.")

    @field_validator("beta")
    @classmethod
    def _is_a_root(cls, value: float | None) -> float | None:
        if value == 0:
            raise ConfigError("beta: 0 is not allowed. Allowed: a number above 0")
        return value


class ChannelArgs(Strict):
    """``channel_sparsity_args``."""

    is_prune: bool = Field(True, description="Off switch.")
    layers: list[str] | None = Field(None, description="Layers to prune; everything prunable when absent.")
    global_pruning: bool = Field(True, description="One ranking over all layers, or the same ratio in each.")
    block_size: Count = Field(1, description="Channels kept are a multiple of this.")
    start_epoch: Whole = Field(0, description="First epoch at which to prune.")
    end_epoch: Whole | None = Field(None, description="Last epoch at which to prune; start_epoch when absent.")
    epoch_rate: Count = Field(1, description="Epochs between pruning events.")
    global_prune_rate: UnitInterval | None = Field(None, description="Fraction of channels to remove.")
    max_pruning_rate: UnitInterval = Field(1.0, description="Largest fraction of channels to remove from a layer.")
    mac_target: Fraction | None = Field(None, description="Fraction of MACs kept; decides over global_prune_rate.")
    reach_mac_target: Any = Field(None, description="Ignored: state is kept in the checkpoint.")
    log_str: Any = Field(None, description="Ignored: state is kept in the checkpoint.")
    pruning_method: Annotated[
        str, one_of("BNScalePruner", "GroupNormPruner", "MACAwareImportance", "VBP", "LAMP", "Random")
    ] = Field("GroupNormPruner", description="What scores channels.")
    prune_channels_at_init: bool = Field(False, description="Remove instead of masking, all at once.")
    infer: bool = Field(False, description="The model is only loaded for inference.")
    isomorphic: bool = Field(False, description="Rank like groups among themselves only.")
    input_shape: list[int] | list[list[int]] | None = Field(None, description="Shape or shapes of the inputs.")
    container: Literal["list", "tuple"] | None = Field(None, description="What several inputs come in.")
    regularize: Regularize | None = Field(None, description="Penalty on channels.")
    MAC_params: MacParams | None = Field(None, description="How MACs weigh in the score.")
    schedule: str | None = Field(None, description="How the sparsity grows; linear when absent.")
    pruning_schedule: str | None = Field(None, description="Another name for schedule.")
    verbose: Any = Field(None, description="Ignored: the logger's level decides.")

    @property
    def chosen_schedule(self) -> str:
        """The schedule under whichever key it was given."""
        return self.schedule or self.pruning_schedule or "linear"

    @field_validator("layers", mode="before")
    @classmethod
    def _are_layers(cls, value: Any, info: ValidationInfo) -> Any:
        return [] if value == [] else layer_list(value, "layers")

    @field_validator("input_shape", mode="before")
    @classmethod
    def _is_shape(cls, value: Any) -> Any:
        try:
            return None if value is None else ExampleInputs(shape=value).shape
        except ConfigError as error:
            raise ConfigError(str(error).replace("shape", "input_shape", 1)) from error

    @field_validator("schedule", "pruning_schedule")
    @classmethod
    def _is_schedule(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else schedule_name(value, str(info.field_name))

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_window(self.start_epoch, self.end_epoch, "end_epoch", "start_epoch")
        if self.schedule and self.pruning_schedule and self.schedule != self.pruning_schedule:
            raise ConfigError(f"pruning_schedule: {self.pruning_schedule!r} is not the schedule {self.schedule!r}")
        if self.is_prune and self.layers == []:
            raise ConfigError("layers: [] names no layer. Allowed: at least one, or leave the key out for all")
        if self.is_prune and self.mac_target is None and not self.global_prune_rate:
            raise ConfigError(
                f"global_prune_rate: {self.global_prune_rate} leaves nothing to reach without a mac_target. "
                "Allowed: a number in (0, 1]"
            )
        return self


class SliceArgs(Strict):
    """``slice_sparsity_args``."""

    is_prune: bool = Field(True, description="Off switch.")
    layers: list[str] | None = Field(None, description="Layers to prune; every convolution when absent.")
    block_size: Count = Field(8, description="Filters in a slice.")
    depthwise_block_size: Count = Field(2, description="Filters in a slice of a depthwise layer.")
    start_epoch: Whole = Field(0, description="First epoch at which to prune.")
    end_epoch: Whole | None = Field(None, description="Last epoch at which to prune; start_epoch when absent.")
    epoch_rate: Count = Field(1, description="Slices are pruned in epochs that are a multiple of this.")
    prune_rate: UnitInterval | None = Field(None, description="Fraction of each layer's slices to zero; 0: none.")
    pruning_gradually: bool = Field(False, description="In equal steps, or all of it at every event.")
    pruning_mode: Annotated[str, one_of("Prune", "Unprune")] = Field("Prune", description="Unprune lifts the masks.")
    disable_first_index: bool = Field(False, description="Spare the first tap of each kernel row.")
    pruning_method: Annotated[str, one_of("L2_norm")] = Field("L2_norm", description="What scores slices.")
    reg: Amount = Field(0.0, description="Strength of the penalty on slices; 0: none.")

    @field_validator("layers", mode="before")
    @classmethod
    def _are_layers(cls, value: Any) -> Any:
        return [] if value == [] else layer_list(value, "layers")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_window(self.start_epoch, self.end_epoch, "end_epoch", "start_epoch")
        if self.is_prune and self.layers == []:
            raise ConfigError("layers: [] names no layer. Allowed: at least one, or leave the key out for all")
        if self.is_prune and self.pruning_mode == "Prune" and self.prune_rate is None:
            raise ConfigError("prune_rate: missing, but needed. Allowed: a number in [0, 1]")
        return self
