"""The keys of step-wise pattern pruning, in their 2022 names and those of 2.x, what each means and what it allows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator, model_validator
from typing_extensions import Self  # noqa: UP035  (in typing from 3.11 on)

from pruningawaretraining.config.dialects.base import TAG
from pruningawaretraining.config.dialects.intel_epochs import EpochSection
from pruningawaretraining.config.dialects.sirc_keys import one_of
from pruningawaretraining.config.strict import Amount, Count, Strict, UnitInterval, Whole
from pruningawaretraining.errors import ConfigError

TAG_OF_PRUNERS, TAG_OF_2X = "!Pruner", "!PrunerV2"

SAME = {
    "prune_type": "pruning_type",
    "names": "op_names",
    "prune_layer_type": "pruning_op_types",
    "prune_domain": "pruning_scope",
    "update_frequency_on_step": "pruning_frequency",
    "update_frequency": "pruning_frequency",
    "prune_frequency": "pruning_frequency",
    "max_sparsity_ratio_per_layer": "max_sparsity_ratio_per_op",
    "max_layer_sparsity_ratio": "max_sparsity_ratio_per_op",
    "min_sparsity_ratio_per_layer": "min_sparsity_ratio_per_op",
}
"""The 2022 name of a key -> its 2.x name."""

EXCLUDING = (
    "excluded_op_names",
    "exclude_names",
    "not_to_prune_names",
    "excluded_names",
    "extra_excluded_names",
    "extra_excluded_op_names",
)
"""Names for layers to leave alone. A pruner's own list goes before the file's of the same name; other lists add up."""
EXCLUDED = "excluded"


NOT_OF_RULES = ("parameters", "pruners", "pruning_configs", "backend", "distill_loss_weight")
"""Keys that become no field of a rule by themselves."""


class Parameters(Strict):
    """``parameters``."""

    reg_coeff: Amount | None = Field(None, description="Strength of the regulariser.")


Reduce = Annotated[str, one_of("mean", "sum", "max")]
Scope = Annotated[str, one_of("global", "local")]
RegType = Annotated[str, one_of("none", "group_lasso")]


class PrunerKeys(Strict):
    """Keys of one pruner, or of all of them; None if not given."""

    start_step: Whole | None = Field(None, description="Step at which pruning begins; 0 when absent.")
    end_step: Whole | None = Field(None, description="Step at which it ends; 0 when absent. As start_step: at once.")
    target_sparsity: UnitInterval | None = Field(None, description="Fraction of the weights to zero; 0.9 when absent.")
    pruning_type: str | None = Field(None, description="What scores weights; snip_momentum when absent.")
    prune_type: str | None = Field(None, description="Another name for pruning_type.")
    criterion_type: str | None = Field(None, description="What scores heads (pattern mha); else pruning_type does.")
    pattern: str | None = Field(None, description="NxM, N:M, channelx1, 1xchannel or mha; 4x1 when absent.")
    op_names: list[str] | None = Field(None, description="Regular expressions to find in names of layers; [] for all.")
    names: list[str] | None = Field(None, description="Another name for op_names.")
    excluded_op_names: list[str] | None = Field(None, description="Regular expressions of layers to leave alone.")
    exclude_names: list[str] | None = Field(None, description="Another name for excluded_op_names.")
    not_to_prune_names: list[str] | None = Field(None, description="Another name for excluded_op_names.")
    excluded_names: list[str] | None = Field(None, description="Another name for excluded_op_names.")
    extra_excluded_names: list[str] | None = Field(None, description="Another name for excluded_op_names.")
    extra_excluded_op_names: list[str] | None = Field(None, description="Another name for excluded_op_names.")
    pruning_op_types: list[str] | None = Field(None, description="Parts of class names; Conv and Linear when absent.")
    prune_layer_type: list[str] | None = Field(None, description="Another name for pruning_op_types.")
    pruning_scope: Scope | None = Field(None, description="global or local; global when absent.")
    prune_domain: Scope | None = Field(None, description="Another name for pruning_scope.")
    pruning_frequency: Count | None = Field(None, description="Steps between pruning events; 1 when absent.")
    update_frequency_on_step: Count | None = Field(None, description="Another name for pruning_frequency.")
    update_frequency: Count | None = Field(None, description="Another name for pruning_frequency.")
    prune_frequency: Count | None = Field(None, description="Another name for pruning_frequency.")
    max_sparsity_ratio_per_op: UnitInterval | None = Field(
        None, description="Most that a layer loses; 0.98 when absent."
    )
    max_sparsity_ratio_per_layer: UnitInterval | None = Field(None, description="Another name of it.")
    max_layer_sparsity_ratio: UnitInterval | None = Field(None, description="Another name of it.")
    min_sparsity_ratio_per_op: UnitInterval | None = Field(None, description="Least that a layer loses; 0 when absent.")
    min_sparsity_ratio_per_layer: UnitInterval | None = Field(None, description="Another name of it.")
    sparsity_decay_type: str | None = Field(None, description="exp, linear, cos, cube or cubic; exp when absent.")
    criterion_reduce_type: Reduce | None = Field(None, description="mean, sum or max in a block; mean when absent.")
    reg_type: RegType | None = Field(None, description="group_lasso, or none.")
    reg_coeff: Amount | None = Field(None, description="Strength of the regulariser; 0 when absent.")
    parameters: Parameters | None = Field(None, description="Holds reg_coeff, too.")
    low_memory_usage: bool | None = Field(None, description="Scores in half precision.")
    resume_from_pruned_checkpoint: bool | None = Field(None, description="Keep the zeros that the weights have.")

    lists: ClassVar[tuple[str, ...]] = ("op_names", "names", *EXCLUDING, "pruning_op_types", "prune_layer_type")

    @model_validator(mode="before")
    @classmethod
    def _untag(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        if values.get(TAG, TAG_OF_PRUNERS) not in (TAG_OF_PRUNERS, TAG_OF_2X):
            raise ConfigError(f"{TAG}: {values[TAG]!r} is not known. Allowed: {TAG_OF_PRUNERS}, {TAG_OF_2X}")
        return {key: value for key, value in values.items() if key != TAG}

    @field_validator(*lists, mode="before")
    @classmethod
    def _is_a_list(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            value = [value]
        if info.field_name in ("pruning_op_types", "prune_layer_type") or not isinstance(value, list):
            return value
        for number, entry in enumerate(value):
            _check_expression(entry, f"{info.field_name}[{number}]")
        return value

    @field_validator("reg_type", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        return "none" if value is None else value

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        self.said()
        return self

    def said(self) -> dict[str, Any]:
        """The given keys under 2.x names; :data:`EXCLUDED` holds the exclusions by their keys, ``reg_coeff`` also that
        of ``parameters``.

        Raises:
            ConfigError: a key is there under two names with two values.
        """
        out: dict[str, Any] = {}
        for key in type(self).model_fields:
            value = getattr(self, key)
            if value is None or key in (*EXCLUDING, *NOT_OF_RULES):
                continue
            name = SAME.get(key, key)
            if out.setdefault(name, value) != value:
                raise ConfigError(f"{key}: {value!r} is not the {out[name]!r} that it is elsewhere. Allowed: one value")
        inner = self.parameters.reg_coeff if self.parameters else None
        if inner is not None and out.setdefault("reg_coeff", inner) != inner:
            raise ConfigError(f"parameters.reg_coeff: {inner} is not the reg_coeff {out['reg_coeff']}")
        out[EXCLUDED] = {key: getattr(self, key) for key in EXCLUDING if getattr(self, key) is not None}
        return out

    def spelled(self) -> dict[str, str]:
        """2.x name of each given key -> the name that the user has given it; lists of exclusions go by the last."""
        found = {self._plain(key): key for key in type(self).model_fields if getattr(self, key) is not None}
        if self.parameters is not None and self.parameters.reg_coeff is not None:
            found["reg_coeff"] = "parameters.reg_coeff"
        return found

    @staticmethod
    def _plain(key: str) -> str:
        return "excluded_op_names" if key in EXCLUDING else SAME.get(key, key)


def _check_expression(entry: Any, where: str) -> None:
    if not isinstance(entry, str) or not entry:
        raise ConfigError(f"{where}: {entry!r} is not a regular expression")
    try:
        re.compile(entry)
    except re.error as error:
        raise ConfigError(f"{where}: {entry!r} is not a regular expression: {error}") from error


class FileKeys(PrunerKeys):
    """Keys of all pruners, or of the whole file."""

    distill_loss_weight: Amount | None = Field(None, description="Weight of the teacher's part of the loss; 0: none.")


class Section(FileKeys):
    """``pruning.approach.weight_compression_pytorch``: settings for all, and the pruners."""

    pruners: list[PrunerKeys] = Field([], description="One pruner each, with what differs from the settings for all.")


class Approach(Strict):
    """``pruning.approach``: one of them."""

    weight_compression_pytorch: Section | None = Field(None, description="Pruners that count steps, of 2022.")
    weight_compression_v2: Section | None = Field(None, description="Pruners that count steps, with the keys of 2.x.")
    weight_compression: EpochSection | None = Field(None, description="Pruners that count epochs, the older section.")

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        given = [key for key in type(self).model_fields if getattr(self, key) is not None]
        if len(given) != 1:
            shown = ", ".join(given) or "weight_compression_pytorch"
            raise ConfigError(f"{shown}: one section is needed. Allowed: {' or '.join(type(self).model_fields)}")
        return self


class PruningSection(Strict):
    """``pruning``."""

    train: Any = Field(None, description="Ignored: the loop trains.")
    approach: Approach = Field(description="What to prune and how.")


class File2022(Strict):
    """The form of 2022."""

    version: Any = Field(None, description="Ignored.")
    model: Any = Field(None, description="Ignored: the model is handed to the pruner.")
    device: Any = Field(None, description="Ignored: the model's own device is used.")
    evaluation: Any = Field(None, description="Ignored: the loop evaluates.")
    tuning: Any = Field(None, description="Ignored: nothing is tuned.")
    quantization: Any = Field(None, description="Ignored: the loop quantizes.")
    distillation: Any = Field(None, description="Ignored: the loop distils.")
    graph_optimization: Any = Field(None, description="Ignored.")
    mixed_precision: Any = Field(None, description="Ignored.")
    pruning: PruningSection = Field(description="What to prune and how.")


class Flat2x(FileKeys):
    """The flat form of 2.x."""

    pruning_configs: list[PrunerKeys] = Field([], description="One pruner each, with what differs from the rest.")
    backend: Any = Field(None, description="Ignored.")
