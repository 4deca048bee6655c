"""The keys of ``channel_sparsity_args`` and ``slice_sparsity_args``, what each means and what it allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from typing_extensions import Self  # noqa: UP035  (in typing from 3.11 on)

from pruningawaretraining.config.dialects.base import check_window, schedule_name
from pruningawaretraining.config.dialects.flat import layer_list
from pruningawaretraining.config.strict import Amount, Count, Strict, UnitInterval, Whole
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


OTHER_MODES = ("weight_variance_both", "combined", "rank_fusion", "mag_guided", "dw_proj_var")
"""Importance modes that are known and refused."""


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
    mac_target: UnitInterval | None = Field(
        None, description="Fraction of MACs kept; decides over global_prune_rate. 0: no target."
    )
    prune_at_target: bool = Field(True, description="Ignored: the target is met, and channels are removed then.")
    reach_mac_target: Any = Field(None, description="Ignored: state is kept in the checkpoint.")
    log_str: Any = Field(None, description="Ignored: state is kept in the checkpoint.")
    pruning_method: Annotated[
        str, one_of("BNScalePruner", "GroupNormPruner", "MACAwareImportance", "VBP", "NormNet", "LAMP", "Random")
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
    importance_mode: Annotated[str, one_of("variance", "weight_variance", "tp_variance", *OTHER_MODES)] = Field(
        "variance",
        description="VBP: variance, weight_variance (times the consumers' weights), tp_variance (magnitude).",
    )
    norm_per_layer: bool | None = Field(None, description="Scores are divided by the mean of their layer.")
    group_reduction: Annotated[str, one_of("mean", "sum", "max", "prod", "first")] = Field(
        "mean", description="How the scores of coupled layers are joined: mean, or sum with norm_per_layer."
    )
    similarity_discount: Literal[False] = Field(False, description="Discounts for similar channels are not supported.")
    sparse_mode: Annotated[str, one_of("none", "gmp", "reparam", "vnr", "l1_group")] = Field(
        "none", description="Sparse training before start_epoch: none is supported; 'regularize' does such a thing."
    )
    epochs_ft: Any = Field(None, description="Ignored: the loop decides how long it trains between and after events.")
    max_batches: Any = Field(None, description="Ignored: every batch that is seen counts, or those of calibrate_with.")
    bn_recalibration: Any = Field(None, description="Ignored: running statistics go on in training.")
    bn_recalib_batches: Any = Field(None, description="Ignored, as bn_recalibration.")
    no_compensation: Any = Field(None, description="Ignored: a rule's 'compensation' does that.")
    fold_bn_before_prune: Any = Field(None, description="Ignored: norms stay in the model.")
    alpha: Any = Field(None, description="Ignored: of importance modes that are not supported.")
    normalize_importance: Any = Field(None, description="Ignored, as alpha.")
    wv_base_mode: Any = Field(None, description="Ignored, as alpha.")
    mag_guided_delta: Any = Field(None, description="Ignored, as alpha.")
    var_loss_weight: Any = Field(None, description="Ignored: the loop's loss is the loop's.")
    sparse_gmp_target: Any = Field(None, description="Ignored: of sparse_mode gmp.")
    reparam_lambda: Any = Field(None, description="Ignored: of sparse_mode reparam.")
    reparam_normalize: Any = Field(None, description="Ignored: of sparse_mode reparam.")
    reparam_layers: Any = Field(None, description="Ignored: of sparse_mode reparam.")
    reparam_entropy_lambda: Any = Field(None, description="Ignored: of sparse_mode reparam.")
    reparam_during_pat: Any = Field(None, description="Ignored: of sparse_mode reparam.")
    reparam_target: Any = Field(None, description="Ignored: of sparse_mode reparam.")

    @property
    def chosen_schedule(self) -> str:
        """The schedule under whichever key it was given."""
        return self.schedule or self.pruning_schedule or "linear"

    @property
    def weighs_macs(self) -> bool:
        """Whether MACs weigh in the score."""
        wanted = None if self.MAC_params is None else self.MAC_params.use_macs
        return self.pruning_method == "MACAwareImportance" if wanted is None else wanted

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

    @model_validator(mode="before")
    @classmethod
    def _has_one_schedule(cls, values: Any) -> Any:
        """Refuse two schedules, as they are written."""
        texts = [values.get(key) for key in ("schedule", "pruning_schedule")] if isinstance(values, Mapping) else []
        if len(texts) == 2 and all(isinstance(text, str) for text in texts):
            first, second = map(str, texts)
            if schedule_name(first, "schedule") != schedule_name(second, "pruning_schedule"):
                raise ConfigError(f"pruning_schedule: {second!r} is not the schedule {first!r}. Allowed: one of them")
        return values

    @field_validator("schedule", "pruning_schedule")
    @classmethod
    def _is_schedule(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else schedule_name(value, str(info.field_name))

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_window(self.start_epoch, self.end_epoch, "end_epoch", "start_epoch")
        if self.is_prune and self.layers == []:
            raise ConfigError("layers: [] names no layer. Allowed: at least one, or leave the key out for all")
        if self.is_prune and not self.mac_target and not self.global_prune_rate:
            raise ConfigError(
                f"global_prune_rate: {self.global_prune_rate} leaves nothing to reach without a mac_target. "
                "Allowed: a number in (0, 1]"
            )
        if self.is_prune:
            self._check_supported()
        return self

    def _check_supported(self) -> None:
        """Refuse what would choose other channels than the file means."""
        if self.importance_mode in OTHER_MODES:
            raise ConfigError(
                f"importance_mode: {self.importance_mode!r} is not supported. Allowed: variance, weight_variance, "
                "tp_variance"
            )
        if self.group_reduction not in ("mean", "sum") or (self.group_reduction == "sum" and not self.norm_per_layer):
            raise ConfigError(
                f"group_reduction: {self.group_reduction!r} is not supported. Allowed: mean, or sum with norm_per_layer"
            )
        if self.sparse_mode != "none":
            raise ConfigError(
                f"sparse_mode: {self.sparse_mode!r} is not supported. Allowed: none, with 'regularize' for a penalty"
            )


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
