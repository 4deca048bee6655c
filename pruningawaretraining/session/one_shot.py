"""One-shot pruning: calibrate, score, prune, compensate, recalibrate; any number of sparsities from one calibration.

Shape suffixes: ``_W`` the shape of a weight, ``_G`` groups, ``_N`` candidates of a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.allocation.ranking import Allocator, limits_of
from pruningawaretraining.config.options import support_of
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.config.structures import compete
from pruningawaretraining.config.targets import Target
from pruningawaretraining.criteria.second_order.channels import (
    compensate_readers,
    losing_readers,
    measure,
    recalibrate_norms,
)
from pruningawaretraining.criteria.second_order.gathering import on_model, unchanged_copy
from pruningawaretraining.criteria.second_order.gradients import Calibration, LossFn
from pruningawaretraining.engine.compensation import WeightPruner, put
from pruningawaretraining.engine.context import RemovalContext
from pruningawaretraining.engine.engine import Engine
from pruningawaretraining.engine.weights import WeightGroups
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.masks.removal import remove
from pruningawaretraining.models.calling import unwrap
from pruningawaretraining.registry import build, lookup
from pruningawaretraining.session.arguments import check_model
from pruningawaretraining.session.build import check_scored
from pruningawaretraining.session.scored_channels import ScoredChannels, scored_channels

__all__ = ["AfterPruning", "accuracy", "one_shot"]


@dataclass(frozen=True)
class AfterPruning:
    """Repairs of a model after weights or channels have gone.

    Args:
        compensation: how the layers that read removed channels follow: "least_squares", "bias", "bias_variance" or
            "none". (Weights inside a layer are compensated by the criterion itself.)
        norm_batches: micro-batches over which batch norms are measured again; 0 to leave them.
        input_batches: micro-batches behind the compensation of channels.
    """

    compensation: str = "none"
    norm_batches: int = 0
    input_batches: int = 16

    def __post_init__(self) -> None:
        lookup("channel_compensation", self.compensation, "compensation")
        for key, least in (("norm_batches", 0), ("input_batches", 1)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{key}: {value!r} is not allowed. Allowed: whole numbers, {least} or more")


@torch.inference_mode(False)
def one_shot(
    model: nn.Module,
    rule: Rule | Mapping[str, Any],
    dataloader: Iterable[Any],
    loss_fn: LossFn,
    sparsities: Sequence[float] | None = None,
    *,
    after: AfterPruning = AfterPruning(),
) -> dict[float, nn.Module]:
    """See :func:`pruningawaretraining.one_shot.one_shot`."""
    check_model(model)
    if not isinstance(after, AfterPruning):
        raise ConfigError(f"after: {after!r} is a {type(after).__name__}. Allowed: AfterPruning(...)")
    rule = _parsed(rule, sparsities is not None)
    if rule.mode != "prune" or not rule.enabled:
        raise ConfigError(f"mode: {rule.mode!r}, enabled: {rule.enabled} prunes nothing. Allowed: 'prune', True")
    wanted = _checked(sparsities, rule)
    pattern = build("pattern", rule.pattern, "pattern")
    criterion = build("criterion", rule.criterion, "criterion")
    support = support_of(pattern)
    check_scored(pattern, criterion, rule)
    inner = unwrap(model)
    micro_batch = getattr(criterion, "micro_batch", None)
    calibration = Calibration(inner, dataloader, loss_fn, micro_batch)
    if support.removable:
        if after.compensation == "none":
            after = replace(after, compensation=rule.compensation)
        return _one_shot_channels(calibration, rule, wanted, after)
    if after.compensation != "none":
        raise ConfigError(
            f"after.compensation: {after.compensation!r} is not supported by the pattern {rule.pattern!r}. "
            "Allowed: 'none'"
        )
    if support.kind != "tile":
        return _one_shot_masks(calibration, rule, pattern, criterion, wanted, after)
    pruner = WeightPruner(calibration, rule, pattern, criterion)
    models = {}
    for sparsity, weights in pruner.prune(wanted).items():
        pruned = unchanged_copy(inner)
        put(pruned, weights)
        if after.norm_batches:
            recalibrate_norms(pruned, on_model(calibration, pruned), after.norm_batches)
        models[sparsity] = pruned
    return models


def _one_shot_masks(
    calibration: Calibration, rule: Rule, pattern: Any, criterion: Any, sparsities: Sequence[float], after: AfterPruning
) -> dict[float, nn.Module]:
    """Slices and registered patterns of users: the one event of a rule, on a copy for each sparsity."""
    models = {}
    for sparsity in sparsities:
        pruned = unchanged_copy(calibration.model)
        alone = rule.model_copy(update={"target": Target(sparsity=sparsity), "start": 0, "end": None, "unit": "epoch"})
        engine = Engine(pruned, None, WeightGroups(pruned, [("rule", alone, pattern, criterion)]), RemovalContext)
        data = on_model(calibration, pruned)
        engine.calibrate(data)
        engine.prune(0)
        for masks in engine.masks:
            masks.clear()
        if after.norm_batches:
            recalibrate_norms(pruned, data, after.norm_batches)
        models[sparsity] = pruned
    return models


def _parsed(rule: Any, aimless: bool) -> Rule:
    """The rule; one without a target will do where sparsities are given."""
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, Mapping):
        raise ConfigError(
            f"rule: a {type(rule).__name__} is not allowed. Allowed: a mapping, or a Rule such as config.rules[0]"
        )
    return Rule.model_validate({**({"target": {"sparsity": 1.0}} if aimless else {}), **rule})


def _checked(sparsities: Any, rule: Rule) -> list[float]:
    for name, values in rule.target.lists.items():
        raise ConfigError(f"rule.target.{name}: {values} is a family of one training. Allowed: a single fraction")
    if sparsities is None:
        if rule.target.about_costs:
            return []
        if (sparsity := rule.target.last_sparsity) is None:
            raise ConfigError("sparsities: none given, and the rule has no target.sparsity")
        return [sparsity]
    if not isinstance(sparsities, Iterable) or isinstance(sparsities, str):
        raise ConfigError(f"sparsities: {sparsities!r} is not allowed. Allowed: a list of numbers in [0, 1]")
    if compete(rule.pattern):
        raise ConfigError(
            "sparsities: a count of groups means nothing where blocks, experts, heads and channels compete. Allowed: "
            "None, with target.macs, target.parameters or (without experts) target.latency in the rule"
        )
    sparsities = list(sparsities)
    if not sparsities:
        raise ConfigError("sparsities: [] asks for nothing. Allowed: numbers in [0, 1], or None for the rule's target")
    for one in sparsities:
        if isinstance(one, bool) or not isinstance(one, (int, float)) or not 0 <= one <= 1:
            raise ConfigError(f"sparsities: {one!r} is not allowed. Allowed: numbers in [0, 1]")
    return list(dict.fromkeys(float(one) for one in sparsities))


# --- channels -----------------------------------------------------------------------------------------------------


def _one_shot_channels(
    calibration: Calibration, rule: Rule, sparsities: Sequence[float], after: AfterPruning
) -> dict[float, nn.Module]:
    """Score groups once; for each sparsity compensate their readers, remove them, and measure the norms again."""
    model = calibration.model
    scored = scored_channels(model, rule, calibration.example(), calibration)
    channels, grouping = scored.found, scored.found.grouping
    keeps = _keeps(scored, sparsities)
    hooks = None
    if after.compensation != "none":
        every = list(losing_readers(model, grouping, torch.zeros(grouping.size, dtype=torch.bool)))
        hooks = measure(every, calibration, after.input_batches)
    models = {}
    for sparsity, keep_G in keeps.items():
        pruned = unchanged_copy(model)
        found = channels.on(pruned)
        if hooks is not None:
            lost = list(losing_readers(pruned, found.grouping, keep_G))
            compensate_readers(lost, hooks, lookup("channel_compensation", after.compensation))
        remove(pruned, found, keep_G)
        if after.norm_batches:
            recalibrate_norms(pruned, on_model(calibration, pruned), after.norm_batches)
        models[sparsity] = pruned
    return models


def _keeps(scored: ScoredChannels, sparsities: Sequence[float]) -> dict[float, Tensor]:
    """Keep masks by sparsity: at those that are wanted, or where the rule's target is met."""
    rule = scored.rule
    if sparsities:
        allocator = Allocator(scored.found.grouping, scored.scores_G, limits_of(rule), rule.scope)
        return {sparsity: allocator.at(sparsity) for sparsity in sparsities}
    keep_G, _ = scored.meeting(rule.target)
    return {1.0 - float(keep_G.double().mean()): keep_G}


def accuracy(model: nn.Module, dataloader: Iterable[Any], batches: int | None = None) -> float:
    """Fraction of correct predictions (largest output) of a classifier; the model is left as it was.

    Raises:
        ConfigError: the loader is empty.
    """
    calibration = Calibration(model, dataloader, lambda outputs, targets: outputs)
    right = seen = 0
    for outputs, targets in calibration.outputs(itertools.islice(dataloader, batches)):
        scores = getattr(outputs, "logits", outputs)
        right += int((scores.argmax(-1) == targets).sum())
        seen += targets.numel()
    if not seen:
        raise ConfigError("dataloader: it is empty; at least one batch is needed")
    return right / seen
