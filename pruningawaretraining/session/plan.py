"""Plan pruning without training: masks by the scores of the weights or of calibration data, and MACs, parameters and
latency under them.

Shape suffixes: ``_G`` groups.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from pruningawaretraining.config.options import support_of
from pruningawaretraining.config.schema import PruningConfig, Rule
from pruningawaretraining.config.structures import AS_MANY, has_experts
from pruningawaretraining.config.targets import Target
from pruningawaretraining.criteria.base import collector_of
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.engine.coupled_rules import set_of_layer
from pruningawaretraining.engine.latency_target import LatencyReached, LatencyTarget
from pruningawaretraining.errors import ConfigError, PruningError, TargetError
from pruningawaretraining.groups.grouping import Grouping, GroupSet
from pruningawaretraining.registry import build, names
from pruningawaretraining.session.scored_channels import ScoredChannels, scored_channels

logger = logging.getLogger(__name__)
SECONDS = 45.0
"""After so long no further copy is measured: what is predicted has to do."""
NO_LATENCY = "no latency: a token takes as many experts whatever their number, so that none is predicted"
"""The note of a rule with experts."""
ROUNDS, QUICK_ROUNDS, QUICK_MS = 2, 4, 10.0
"""Of choosing and measuring for a latency; more where the dense model takes less than so long."""


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan.

    Args:
        runtime, threads, batch: what latency is about.
        measured: whether copies are measured; else latencies are predicted.
        seconds: after so long no further copy is measured.
    """

    runtime: str = "onnxruntime"
    threads: int = 1
    batch: int = 1
    measured: bool = True
    seconds: float = SECONDS


@dataclass(frozen=True)
class PlannedSet:
    """Coupled layers, which lose the same channels.

    Attributes:
        name: the layer that stands for them.
        layers: those that have the channels as their outputs.
        size: channels of the dense model.
        kept: channels that are left, for each target; None where it is out of reach.
    """

    name: str
    layers: tuple[str, ...]
    size: int
    kept: tuple[int | None, ...]


@dataclass(frozen=True)
class Planned:
    """One target and what it comes to.

    Attributes:
        target: the cost that it is about: "latency", "macs" or "parameters".
        fraction: of the dense model's that is to be kept.
        sparsity: fraction of the groups that would go.
        macs, parameters: that would be kept.
        latency: predicted, and measured if there was time; None with experts, and where the runtime cannot run it.
        measured: whether the latency is measured.
        refused: why the target is out of reach; the rest is None then.
    """

    target: str
    fraction: float
    sparsity: float | None = None
    macs: int | None = None
    parameters: int | None = None
    latency: LatencyReached | None = None
    measured: bool = False
    refused: str = ""


@dataclass(frozen=True)
class Plan:
    """Targets side by side.

    Attributes:
        rule: what was planned with: pattern and criterion.
        macs, parameters, latency_ms: of the dense model; no latency with experts, and where the runtime cannot run it.
        sets: widths, dense and for each target.
        targets: what each comes to.
        note: what else is to be said.
    """

    rule: Mapping[str, Any]
    macs: int
    parameters: int
    latency_ms: float | None
    sets: tuple[PlannedSet, ...]
    targets: tuple[Planned, ...]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return asdict(self)


def rule_of(config: PruningConfig, criterion: str | None = None) -> Rule:
    """The rule to plan with: the first that removes channels, heads or blocks, with another criterion if one is given.

    Raises:
        ConfigError: there is none, or the criterion is unknown.
    """
    usable = [one for one in config.rules if one.enabled and one.mode == "prune"]
    usable = [one for one in usable if support_of(build("pattern", one.pattern, "pattern")).removable]
    if not usable:
        raise ConfigError("rules: none removes channels. Allowed: a config with a rule on channels, heads or blocks")
    if len(usable) > 1:
        logger.warning("rules: the plan is of the first of %d that remove channels", len(usable))
    changes = {} if criterion is None else {"criterion": criterion}
    return usable[0].model_copy(update=changes)


def needs_data(rule: Rule) -> bool:
    """Whether the rule's criterion looks at more than weights.

    Raises:
        ConfigError: it is unknown.
    """
    return collector_of(build("criterion", rule.criterion, "criterion")) is not None


def plan(
    model: nn.Module,
    rule: Rule,
    inputs: Any,
    wanted: Sequence[tuple[str, float]],
    calibration: Calibration | None = None,
    options: PlanOptions = PlanOptions(),
) -> Plan:
    """Choose groups for each target and say what that would cost; the model is only read.

    Args:
        model: dense, without a wrapper.
        rule: which groups, and how they are chosen; its own target is not used.
        inputs: example inputs.
        wanted: the cost ("latency", "macs" or "parameters") and the fraction to keep, of each target.
        calibration: data for a criterion that needs any.
        options: see there.

    Raises:
        ConfigError, ModelError: nothing can be pruned, a runtime that is not there, or the criterion needs data.
    """
    started = time.monotonic()
    if calibration is None and needs_data(rule):
        weights = [name for name in names("criterion") if collector_of(build("criterion", name, "criterion")) is None]
        raise ConfigError(f"--criterion: {rule.criterion!r} needs data. Allowed: --data, or {', '.join(weights)}")
    experts = has_experts(rule.pattern)
    if experts:
        _check_weighed(wanted)
    goals = [_target(cost, fraction, options) for cost, fraction in wanted]
    scored = scored_channels(model, rule, inputs, calibration)
    latency, note = (None, NO_LATENCY) if experts else _latency(scored, goals, options)
    watch = _Watch(started + options.seconds if options.measured else started)
    chosen = [_chosen(scored, latency, goal, watch) for goal in goals]
    rows = [_row(scored, cost, fraction, *one) for (cost, fraction), one in zip(wanted, chosen, strict=True)]
    keeps = [keep_G for keep_G, *_ in chosen]
    sets = _sets(scored.found.grouping, keeps)
    dense = (int(scored.macs.dense), int(scored.parameters.dense), None if latency is None else latency.dense_ms)
    used = {"pattern": rule.pattern, "criterion": rule.criterion, "allocation": rule.allocation}
    return Plan(used, *dense, sets, tuple(rows), note)


def _check_weighed(wanted: Sequence[tuple[str, float]]) -> None:
    """Refuse latencies for a rule with experts, as its own target would be.

    Raises:
        ConfigError: it names the option.
    """
    for cost, fraction in wanted:
        if cost == "latency":
            raise ConfigError(
                f"--latency: {fraction:g} {AS_MANY}, and what they save is parameters. Allowed with experts: --params, "
                "--macs"
            )


def _target(cost: str, fraction: float, options: PlanOptions) -> Target:
    about = {"runtime": options.runtime, "threads": options.threads, "batch": options.batch}
    return Target.model_validate({cost: fraction, **(about if cost == "latency" else {})})


def _latency(scored: ScoredChannels, goals: Sequence[Target], options: PlanOptions) -> tuple[LatencyTarget | None, str]:
    """The latency of the dense model; where no target is about it, one that cannot be had is only a note."""
    about = next((one for one in goals if one.latency is not None), None)
    if about is not None:
        return scored.targets.latency(about), ""
    try:
        return scored.targets.latency(_target("latency", 1.0, options)), ""
    except PruningError as error:
        return None, f"no latency on {options.runtime}: {error}"


class _Watch:
    """Whether there is time to measure once more.

    Args:
        until: when there is none, by the monotonic clock.
    """

    def __init__(self, until: float) -> None:
        self._until, self._longest = until, 0.0

    def allows(self) -> bool:
        """Whether something as long as before would still end in time."""
        return time.monotonic() + self._longest < self._until

    def timed(self, measure: Callable[[], Chosen]) -> Chosen:
        """The result; how long it took is remembered."""
        started = time.monotonic()
        found = measure()
        self._longest = max(self._longest, time.monotonic() - started)
        return found


Chosen = tuple[Tensor | None, LatencyReached | None, bool, str]
"""Masks, their latency, whether that is measured, and why there are none."""


def _chosen(scored: ScoredChannels, latency: LatencyTarget | None, target: Target, watch: _Watch) -> Chosen:
    """The masks that meet a target."""
    measured = watch.allows()
    rounds = QUICK_ROUNDS if latency is not None and latency.dense_ms < QUICK_MS else ROUNDS

    def measure() -> Chosen:
        keep_G, reached = scored.meeting(target, rounds if measured else 0)
        if reached is None and latency is not None:
            if measured:
                reached = latency.measure(keep_G, scored.without(keep_G))
            else:
                predicted = latency.cost(keep_G)
                reached = LatencyReached(predicted, predicted, latency.dense_ms)
        return keep_G, reached, measured and reached is not None and not reached.is_noisy, ""

    try:
        return watch.timed(measure) if measured else measure()
    except TargetError as error:
        return None, None, False, str(error).partition(": ")[2]  # the key is that of a config


def _row(
    scored: ScoredChannels,
    cost: str,
    fraction: float,
    keep_G: Tensor | None,
    latency: LatencyReached | None,
    measured: bool,
    refused: str,
) -> Planned:
    if keep_G is None:
        return Planned(cost, fraction, refused=refused)
    counts = (round(scored.macs(keep_G)), round(scored.parameters(keep_G)))
    return Planned(cost, fraction, 1.0 - float(keep_G.double().mean()), *counts, latency, measured)


def _sets(grouping: Grouping, keeps: Sequence[Tensor | None]) -> tuple[PlannedSet, ...]:
    """The widths of every set of coupled layers, now and under each of the masks."""
    set_of = set_of_layer(grouping)

    def kept(keep_G: Tensor | None, one: GroupSet) -> int | None:
        return None if keep_G is None else int(keep_G[one.start : one.stop].sum()) * one.width

    return tuple(
        PlannedSet(
            one.name,
            tuple(layer for layer in one.layers if set_of.get(layer) == one.name) or (one.name,),
            one.size * one.width,
            tuple(kept(keep_G, one) for keep_G in keeps),
        )
        for one in grouping.sets
    )
