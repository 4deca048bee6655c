"""The flat form: start_epoch, end_epoch, interval, global_sparsity, mac_target and layers_to_prune, one rule in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self  # noqa: UP035  (in typing from 3.11 on)

from pruningawaretraining.config.checks import layer_name
from pruningawaretraining.config.dialects.base import check_window, native, note_ignored, schedule_name
from pruningawaretraining.config.origin import Names
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.config.strict import Count, Fraction, Strict, UnitInterval, Whole
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.registry import register


class FlatConfig(Strict):
    """The keys of the flat form."""

    start_epoch: Whole = Field(0, description="First epoch at which to prune.")
    end_epoch: Whole | None = Field(None, description="Epoch at which the target is due; start_epoch when absent.")
    interval: Count = Field(1, description="Epochs between pruning events.")
    global_sparsity: Fraction | None = Field(None, description="Fraction of channels to remove; mac_target goes first.")
    mac_target: UnitInterval | None = Field(
        None, description="Fraction of MACs kept: 0.7 is a cut of 30%. 0: no target of MACs."
    )
    layers_to_prune: list[str] | None = Field(None, description="Layers or containers; all when absent.")
    schedule: str = Field("linear", description="How the sparsity grows.")
    reset_optimizer: bool = Field(False, description="Clear the optimizer's state after removal.")

    @field_validator("layers_to_prune", mode="before")
    @classmethod
    def _are_layers(cls, value: Any) -> Any:
        return layer_list(value, "layers_to_prune")

    @field_validator("schedule")
    @classmethod
    def _is_schedule(cls, value: str) -> str:
        return schedule_name(value, "schedule")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_window(self.start_epoch, self.end_epoch, "end_epoch", "start_epoch")
        if self.global_sparsity is None and not self.mac_target:
            raise ConfigError("global_sparsity: missing, and so is mac_target. Allowed: either or both, each in (0, 1]")
        return self


FIELDS = {
    "layers": "layers_to_prune",
    "schedule": "schedule",
    "start": "start_epoch",
    "end": "end_epoch",
    "every": "interval",
    "target.sparsity": "global_sparsity",
    "target.macs": "mac_target",
    "macs": "mac_target",
}
"""Field of the rule -> key of the flat form."""


@register("dialect", "flat")
@dataclass(frozen=True)
class Flat:
    """One rule for channels, all its keys at the top level."""

    keys: ClassVar[tuple[str, ...]] = tuple(
        key for key in FlatConfig.model_fields if key not in ("schedule", "reset_optimizer")
    )
    yaml_tags: ClassVar[tuple[str, ...]] = ()

    def recognises(self, mapping: Mapping[str, Any]) -> bool:
        """A key that only the flat form has, and no section as the other forms have."""
        distinct = [key for key in self.keys if key not in ("start_epoch", "end_epoch")]
        return any(key in mapping for key in distinct) and not any(_is_section(value) for value in mapping.values())

    def translate(self, mapping: Mapping[str, Any]) -> PruningConfig:
        """One rule: channels by magnitude, in one ranking over the listed layers.

        Raises:
            ConfigError: an unknown key or a value that is not allowed.
        """
        flat = FlatConfig.model_validate({key: mapping[key] for key in mapping if key != "$schema"})
        rule = {
            "layers": flat.layers_to_prune,
            "schedule": flat.schedule,
            "start": flat.start_epoch,
            "end": flat.end_epoch,
            "every": flat.interval,
            "target": channel_target(flat.global_sparsity, flat.mac_target or None),
            "final_sparsity": 1.0 if flat.mac_target else None,
        }
        if flat.mac_target and flat.global_sparsity is not None:
            note_ignored("global_sparsity", "mac_target decides how far to prune")
        return native([rule], [Names(fields=FIELDS)], reset_optimizer=flat.reset_optimizer)


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(item, Mapping) for item in value))


def channel_target(sparsity: float | None, macs: float | None) -> dict[str, float]:
    """The target: MACs if given, else the sparsity."""
    if macs is not None:
        return {"macs": macs}
    return {} if sparsity is None else {"sparsity": sparsity}


def layer_list(value: Any, key: str) -> list[str] | None:
    """Checked layer names in normal form, or None."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigError(f"{key}: {value!r} is not a list of one layer name or more")
    return [layer_name(entry, f"{key}[{number}]") for number, entry in enumerate(value)]
