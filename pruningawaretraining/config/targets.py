"""Targets of rules, and the shapes of example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self  # noqa: UP035  (in typing from 3.11 on)

from pruningawaretraining import schedules  # noqa: F401  (importing it registers the schedules)
from pruningawaretraining.config.checks import are_sizes
from pruningawaretraining.config.family import Fractions, Milliseconds, Sparsities, check_lengths, member_name
from pruningawaretraining.config.strict import Count, Strict
from pruningawaretraining.errors import ConfigError, unknown
from pruningawaretraining.registry import canonical, names

COSTS = ("macs", "parameters", "peak_memory", "latency", "latency_ms", "costs")
"""Keys of a target that limit a cost of the model."""


class Target(Strict):
    """Limits to reach: all that are given must hold; without any, a rule only regularises.

    A number may be a list, of decreasing fractions to keep or milliseconds, or of increasing sparsities: a family of
    models from one run, see docs/family.md.
    A registered cost is a key too: ``{"energy": 0.5}`` is short for ``{"costs": {"energy": 0.5}}``.
    """

    sparsity: Sparsities | None = Field(
        None,
        description="Fraction of the rule's groups to remove, in (0, 1], rounded down to whole groups: 0.5 of 41 "
        "channels removes 20 (0.488).",
    )
    macs: Fractions | None = Field(
        None, description="Fraction of the dense model's MACs to KEEP, in (0, 1]: 0.7 is a cut of 30%."
    )
    parameters: Fractions | None = Field(
        None, description="Fraction of the dense model's parameters to KEEP, in (0, 1]."
    )
    peak_memory: Fractions | None = Field(
        None, description="Fraction to KEEP of the most memory that activations take at once, in (0, 1]."
    )
    latency: Fractions | None = Field(
        None, description="Fraction of the dense model's latency to KEEP, measured on 'runtime', in (0, 1]."
    )
    latency_ms: Milliseconds | None = Field(None, description="Latency to stay within, in milliseconds.")
    costs: dict[str, Fractions] | None = Field(
        None, description="Registered cost -> fraction of the dense model's to KEEP; a cost's name may be a key itself."
    )
    runtime: str = Field("onnxruntime", description="Where latency is measured: a registered runtime.")
    batch: Count | None = Field(1, description="Rows of the example inputs for latency; null: as many as they have.")
    threads: Count = Field(1, description="Threads of the runtime for latency.")

    @model_validator(mode="before")
    @classmethod
    def _with_costs(cls, values: Any) -> Any:
        """Collect the keys that name registered costs, and refuse costs that are not registered."""
        if not isinstance(values, Mapping):
            return values
        own = {key: value for key, value in values.items() if key in cls.model_fields}
        more = {key: value for key, value in values.items() if key not in own}
        costs = {key: more.pop(key) for key in list(more) if key in names("cost")}
        if more and names("cost"):
            key = next(iter(more))
            raise ConfigError(unknown(str(key), key, [*cls.model_fields, *names("cost")]))
        given = own.get("costs")
        if given == {} and isinstance(given, Mapping) and not costs:
            raise ConfigError("costs: {} names no cost. Allowed: a registered cost -> the fraction of it to keep")
        if isinstance(given, Mapping):
            for name in given:
                if not names("cost"):
                    raise ConfigError(f"costs: {name!r} is not known. Allowed: a name under @register('cost', name)")
                canonical("cost", name, "costs")
            costs = {**given, **costs}
        return {**own, **more, **({"costs": costs} if costs else {})}

    @property
    def about_costs(self) -> bool:
        """Whether it is about more than a fraction of the groups."""
        return any(getattr(self, name) is not None for name in COSTS)

    @property
    def given(self) -> bool:
        """Whether there is anything to reach."""
        return self.sparsity is not None or self.about_costs

    @property
    def fractions(self) -> dict[str, Any]:
        """Fraction to keep, or the list of a family, by cost: those that are given."""
        own = {name: getattr(self, name) for name in ("macs", "parameters", "peak_memory", "latency")}
        return {name: value for name, value in {**own, **(self.costs or {})}.items() if value is not None}

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers of the target by key: fractions to keep, milliseconds, the sparsity; lists in a family."""
        more = {"latency_ms": self.latency_ms, "sparsity": self.sparsity}
        return {**self.fractions, **{name: value for name, value in more.items() if value is not None}}

    @property
    def lists(self) -> dict[str, list[float]]:
        """The numbers of a family by key; empty without one."""
        return {name: value for name, value in self.numbers.items() if isinstance(value, list)}

    @property
    def names(self) -> list[str]:
        """Names of the members of a family, by the numbers of its first list."""
        return [member_name(key, value) for key, values in list(self.lists.items())[:1] for value in values]

    @property
    def last_sparsity(self) -> float | None:
        """The fraction to remove: in a family that of the last member."""
        return self.sparsity[-1] if isinstance(self.sparsity, list) else self.sparsity

    def members(self) -> list[Target]:
        """The target of each member of a family; without one, this target alone."""
        if not self.lists:
            return [self]
        count = len(next(iter(self.lists.values())))
        return [self.at({name: value[number] for name, value in self.lists.items()}) for number in range(count)]

    def at(self, numbers: Mapping[str, float | list[float]]) -> Target:
        """This target with other numbers for some keys."""
        own = {name: value for name, value in numbers.items() if name in Target.model_fields}
        costs = None if self.costs is None else {name: numbers.get(name, value) for name, value in self.costs.items()}
        return self.model_copy(update={**own, "costs": costs})

    @model_validator(mode="after")
    def _is_of_one_family(self) -> Self:
        if self.lists:
            check_lengths(self.lists)
        return self

    @model_validator(mode="after")
    def _is_about_latency(self) -> Self:
        if names("runtime"):
            canonical("runtime", self.runtime, "runtime")
        if self.latency is None and self.latency_ms is None:
            for name in ("runtime", "batch", "threads"):
                value, default = getattr(self, name), Target.model_fields[name].default
                if value != default:
                    raise ConfigError(f"{name}: {value!r} requires latency or latency_ms")
        return self


class ExampleInputs(Strict):
    """The shapes of what the model's forward takes, for tracing and for counting MACs."""

    shape: list[int] | list[list[int]] = Field(
        description="One shape such as [1, 3, 224, 224] for a single tensor, or a list of shapes for several."
    )
    container: Literal["list", "tuple"] | None = Field(
        None, description="What several tensors come in: a list (also when absent) or a tuple."
    )
    dtype: Literal["float32", "float64", "float16", "bfloat16", "int64", "int32"] = Field(
        "float32", description="Type of the tensors."
    )

    @field_validator("shape", mode="before")
    @classmethod
    def _is_shape(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and value:
            if are_sizes(value):
                return list(value)
            if all(isinstance(shape, (list, tuple)) and shape and are_sizes(shape) for shape in value):
                return [list(shape) for shape in value]
        raise ValueError(f"{value!r} is not a shape. Allowed: [B, C, H, W], each at least 1, or a list of shapes")


def check_per_layer(
    fractions: dict[str, float] | None, keep: int | None, target: Target, least: float, most: float
) -> None:
    """Refuse what is given for single layers beside a target, a mapping without layers, and fractions out of bounds.

    Raises:
        ConfigError: it names what to leave out.
    """
    names = [name for name, value in (("sparsity_per_layer", fractions), ("keep_per_layer", keep)) if value is not None]
    if not names:
        return
    given = [f"target.{name}" for name in ("sparsity", *COSTS) if getattr(target, name) is not None]
    if others := [*names[1:], *given]:
        raise ConfigError(f"{names[0]}: it stands for a target. Allowed: leave out {others[0]}")
    if fractions is not None and not fractions:
        raise ConfigError("sparsity_per_layer: {} names no layer. Allowed: {layer: fraction}")
    for layer, fraction in (fractions or {}).items():
        if not least <= fraction <= most:
            bound = f"max_sparsity: {most}" if fraction > most else f"min_sparsity: {least}"
            raise ConfigError(
                f"sparsity_per_layer.{layer}: {fraction} does not go with {bound}. Allowed: {least} to {most}"
            )
