"""The native config: a list of rules, each one pattern on some layers, driven by a criterion, a schedule, a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from typing_extensions import Self  # noqa: UP035  (in typing from 3.11 on)

from pruningawaretraining import schedules  # noqa: F401  (importing it registers the schedules)
from pruningawaretraining.config.caps import read_caps
from pruningawaretraining.config.checks import check_registered, layer_name
from pruningawaretraining.config.distillation import Distillation
from pruningawaretraining.config.editor import complete_schema
from pruningawaretraining.config.family import Hold, check_family, check_one_family
from pruningawaretraining.config.options import OPTIONS, check_supported
from pruningawaretraining.config.origin import Translated
from pruningawaretraining.config.phases import (
    OWN,
    Initial,
    Phase,
    Start,
    check_initial,
    check_moments,
    check_phases,
    check_stable,
    read_start,
)
from pruningawaretraining.config.recovery import OneRecovery
from pruningawaretraining.config.strict import Amount, Count, Fraction, Moment, Pace, Positive, Strict, UnitInterval
from pruningawaretraining.config.structures import check_comparable, check_structures, one_pattern
from pruningawaretraining.config.targets import ExampleInputs, Target, check_per_layer
from pruningawaretraining.config.times import Timed
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.registry import canonical, names

__all__ = [
    "Amount",
    "Count",
    "Distillation",
    "ExampleInputs",
    "Fraction",
    "Phase",
    "PruningConfig",
    "Rule",
    "UnitInterval",
    "Target",
    "json_schema",
]

MOST_RULES = 2000


class Rule(Timed, Strict):
    """One thing to prune: which layers, in which pattern, by which criterion, when, how far, and how it is applied."""

    name: str | None = Field(None, description="Name for messages and reports; the position in the list when absent.")
    pattern: str | dict[str, Any] = Field(
        "channel",
        description="What lives or dies together: a name, or {type: name, ...its options}; or a list of channel, head, "
        "expert and depth, which then compete in one ranking.",
    )
    layers: list[str] | None = Field(
        None,
        description="Layers to prune: exact module names, containers (all that is in them), or 're:' and a regular "
        "expression that must match the whole name. Absent: everything prunable but the outputs.",
    )
    exclude: list[str] = Field([], description="Layers to leave alone, written as in 'layers'.")
    criterion: str | dict[str, Any] = Field(
        "magnitude", description="What scores a group, the lowest going first: a name, or {type: name, ...its options}."
    )
    schedule: str = Field("linear", description="How the sparsity grows from start to end.")
    scope: str = Field("global", description="Where scores compete: over all sets, within each, or within like ones.")
    allocation: str | None = Field(
        None,
        description="How groups are chosen under a target of MACs, latency and the like: by the scores alone "
        "(ranking), the same share of every set (uniform), or by the importance lost for what is saved (latency, macs, "
        "parameters). Absent: latency where the target is about it, macs or parameters with a criterion whose scores "
        "add up (reconstruction, obs, cap), else ranking.",
    )
    start: Start = Field(
        0, description="First epoch (or step) at which to prune; epochs may be fractions. 'stable': see that key."
    )
    end: Moment | None = Field(None, description="Epoch (or step) at which the target is due; absent: start, at once.")
    every: Pace = Field(1, description="Epochs (or steps) between one pruning event and the next, above 0.")
    hold: Hold | None = Field(
        None,
        description="Epochs (or steps) of fine-tuning for each member of a family, before pruning goes on to the next; "
        "the last one has what follows end. Absent: until the next event, as 'every' says.",
    )
    unit: Literal["epoch", "step"] = Field("epoch", description="What start, end, every and hold count.")
    steps_per_epoch: Count | None = Field(
        None,
        description="Optimizer steps of an epoch, for events at fractions of epochs; absent: as many as the "
        "dataloader of on_train_begin has batches.",
    )
    initial: Initial = Field(
        None,
        description="Sparsity of the event at start; the schedule goes from there to the target, by the time that has "
        "passed. 'present': the sparsity that the weights have. Absent: the first event takes the first part.",
    )
    stable: Fraction | None = Field(
        None,
        description="Begin to prune when masks are stable: from start on, every 'every', those that the target asks "
        "for are compared with those of the look before, by intersection over union (of what goes and of what stays, "
        "the smaller of the two); at 'end' in any case. 'start: stable' is start 0 and stable 0.95.",
    )
    phases: list[Phase] = Field(
        [], description="Several schedules, one after the other, instead of start, end, every, schedule and initial."
    )
    target: Target = Field(Target(), description="What to reach.")
    sparsity_per_layer: dict[str, UnitInterval] | None = Field(
        None,
        description="Fraction to remove of single layers, {layer: fraction}, instead of a target; layers are written "
        "as in 'layers', and all others stay whole.",
    )
    keep_per_layer: Count | None = Field(
        None, description="How many groups stay in each set of layers (heads, channels ...), instead of a target."
    )
    final_sparsity: Fraction | None = Field(
        None,
        description="Sparsity that the schedule heads for while a target of MACs and the like is sought; pruning stops "
        "as soon as the target is met. Absent: events take the target's own measure: at progress t at most "
        "1 - s(t) (1 - target) of it is left, and the target is met at 'end'.",
    )
    min_sparsity: UnitInterval = Field(0.0, description="Least fraction to remove from each set, in [0, 1].")
    max_sparsity: UnitInterval = Field(1.0, description="Largest fraction to remove from each set, in [0, 1].")
    max_sparsity_from: str | dict[str, UnitInterval] | None = Field(
        None,
        description="Largest fraction of single sets, beside max_sparsity: a file that 'pat sensitivity' wrote "
        "(relative to the config), or {layer: fraction}. sparsity_per_layer and keep_per_layer beyond it are refused.",
    )
    multiple: Count = Field(1, description="The number of groups kept in each set is a multiple of this.")
    widths: Literal["free", "uniform"] = Field(
        "free",
        description="uniform: layers of one size in a transformers config, or whose names differ in numbers alone, "
        "keep equally many groups: of a sparsity the fewest that one of them would keep, else as many as fit.",
    )
    application: Literal["mask", "remove"] = Field(
        "mask", description="mask: zero until the target is met, then remove. remove: shrink the model at each event."
    )
    compensation: str = Field(
        "none",
        description="How the layers that read masked channels make up for them at every event: least_squares, bias, "
        "bias_variance or none. It needs 'pruner.calibrate_with(data, loss)', and measures batch norms anew.",
    )
    regularizer: str | dict[str, Any] | None = Field(
        None, description="Penalty that pushes groups towards zero: a name, {type: name, ...its options}, or none."
    )
    dynamic: str | dict[str, Any] = Field(
        "frozen", description="What masked weights do meanwhile: a name, or {type: name, ...its options}."
    )
    at_init: bool = Field(False, description="Prune when the pruner is made if start <= 0, else at start, all at once.")
    enabled: bool = Field(True, description="False: the rule is read and checked, and does nothing.")
    mode: Literal["prune", "unprune", "lock"] = Field(
        "prune",
        description="unprune: lift the masks of this rule instead. lock: the zeros that the weights have at start are "
        "the mask, for good.",
    )
    keep_zeros: bool = Field(False, description="Groups that are zero already at start count as pruned, and stay so.")
    nested: bool = Field(
        False,
        description="May prune inside layers that an earlier rule prunes: what is masked there counts as pruned, and "
        "both masks hold.",
    )
    release: bool = Field(False, description="Lift the masks right after the last event: its zeros may come back.")
    progressive: Count = Field(
        1, description="Parts in which an event's weights are zeroed, evenly until the next event, lowest scores first."
    )

    @property
    def aims(self) -> bool:
        """Whether there is anything to reach."""
        return self.target.given or self.sparsity_per_layer is not None or self.keep_per_layer is not None

    @field_validator("pattern", "criterion", "regularizer", "dynamic", "schedule", "scope", "allocation", mode="before")
    @classmethod
    def _is_registered(cls, value: Any, info: ValidationInfo) -> Any:
        several = info.field_name == "pattern" and isinstance(value, (list, tuple))
        return one_pattern(value) if several else check_registered(str(info.field_name), value)

    @field_validator("compensation")
    @classmethod
    def _is_compensation(cls, value: str) -> str:
        return canonical("channel_compensation", value, "compensation") if names("channel_compensation") else value

    @field_validator("max_sparsity_from", mode="before")
    @classmethod
    def _caps(cls, value: Any) -> Any:
        """The caps themselves: what a run used stays known when the file changes."""
        return read_caps(value) if isinstance(value, str) else value

    @field_validator("layers", "exclude", mode="before")
    @classmethod
    def _are_layers(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.field_name == "layers":
            return None
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{info.field_name}: {value!r} is not a list of layer names")
        return [layer_name(entry, f"{info.field_name}[{number}]") for number, entry in enumerate(value)]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        """A start in words as numbers; structures of a list are ranked together."""
        if not isinstance(values, Mapping):
            return values
        several = values.get("pattern")
        if isinstance(several, (list, tuple)) and len(several) > 1 and isinstance(one_pattern(several), dict):
            check_comparable(values.get("criterion", cls.model_fields["criterion"].default), several)
        return read_start(values)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.end is not None and self.end < self.start:
            raise ConfigError(f"end: {self.end} is before start. Allowed: start ({self.start}) or later")
        if self.min_sparsity > self.max_sparsity:
            raise ConfigError(
                f"min_sparsity: {self.min_sparsity} is above max_sparsity. Allowed: at most {self.max_sparsity}"
            )
        sparsity = self.target.last_sparsity
        end = self.start if self.end is None else self.end
        check_moments(self.unit, {"start": self.start, "end": end, "every": self.every})
        final = None if self.target.about_costs else sparsity
        check_initial(self.initial, final)
        if self.phases:
            defaults = {key: type(self).model_fields[key].default for key in OWN}
            own = {key: getattr(self, key) for key in OWN if getattr(self, key) != defaults[key]}
            check_phases(self.phases, own, final, self.unit)
        check_stable(self)
        if self.progressive > 1 and self.every != int(self.every):
            raise ConfigError(f"progressive: {self.progressive} goes with whole epochs. Allowed: 1, or another 'every'")
        if self.enabled and sparsity is not None and self.min_sparsity > sparsity:
            raise ConfigError(
                f"min_sparsity: {self.min_sparsity} is above target.sparsity. Allowed: at most {sparsity}"
            )
        if self.enabled and self.layers is not None and not self.layers:
            raise ConfigError("layers: [] names no layer. Allowed: at least one, or leave the key out for all")
        if self.enabled and names("pattern"):
            check_supported(self, {option: type(self).model_fields[option].default for option in OPTIONS})
        check_per_layer(self.sparsity_per_layer, self.keep_per_layer, self.target, self.min_sparsity, self.max_sparsity)
        check_family(self)
        check_structures(self)
        aimless = not self.aims and self.regularizer is None
        if self.enabled and self.mode == "prune" and aimless:
            raise ConfigError("target: nothing to reach. Allowed: sparsity, macs, parameters, latency and the like")
        return self


class PruningConfig(Translated):
    """Everything that a pruner needs to know: the rules, in the order in which they act, and what the model takes."""

    rules: list[Rule] = Field(description="What to prune, in this order (channels before slices).")
    example_inputs: ExampleInputs | None = Field(
        None, description="Shapes of the model's inputs; not needed when example inputs are handed to the pruner."
    )
    infer: bool = Field(False, description="The model is only loaded for inference: no masking, no regularising.")
    reset_optimizer: bool = Field(
        False, description="Clear the optimizer's state after removal; otherwise it is kept and sliced."
    )
    trace_limit: Positive = Field(
        60.0,
        description="Seconds that the search for coupled channels may take; layers that are not done by then stay.",
    )
    distillation: Distillation | None = Field(
        None, description="Let a teacher take part in the loss: 'pruner.distill_loss(outputs, inputs)' in the loop."
    )
    recovery: OneRecovery = Field(None, description="What 'pat run' does for accuracy beside pruning, and after it.")

    @model_validator(mode="before")
    @classmethod
    def _drop_schema_key(cls, values: Any) -> Any:
        """Drop "$schema", by which editors find the JSON schema of a file."""
        return {key: values[key] for key in values if key != "$schema"} if isinstance(values, Mapping) else values

    @field_validator("rules", mode="before")
    @classmethod
    def _are_not_thousands(cls, rules: Any) -> Any:
        if isinstance(rules, (list, tuple)) and len(rules) > MOST_RULES:
            raise ConfigError(f"rules: {len(rules)} of them are too many. Allowed: at most {MOST_RULES}")
        return rules

    @field_validator("rules", mode="after")
    @classmethod
    def _names_differ(cls, rules: list[Rule]) -> list[Rule]:
        if not rules:
            raise ConfigError("rules: [] prunes nothing. Allowed: one rule or more")
        check_one_family(rules)
        seen: dict[str, int] = {}
        for number, rule in enumerate(rules):
            if rule.name is not None and seen.setdefault(rule.name, number) != number:
                first = seen[rule.name]
                raise ConfigError(f"rules[{number}].name: {rule.name!r} is the name of rules[{first}] already")
        return rules


def json_schema() -> dict[str, Any]:
    """The JSON schema of a native config, with every registered name and its options, for editors to complete."""
    return complete_schema(PruningConfig.model_json_schema())
