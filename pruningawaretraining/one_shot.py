"""One-shot pruning: calibrate, score, prune, compensate, recalibrate; any number of sparsities from one calibration.

Shape suffixes: ``_W`` the shape of a weight, ``_G`` groups, ``_N`` candidates of a layer.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.allocation import Allocator, Limits
from pruningawaretraining.allocation_elements import ElementLimits, allocate, classes_of
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.criteria.second_order.channels import (
    compensate_readers,
    gate_gradients,
    losing_readers,
    measure,
    recalibrate_norms,
)
from pruningawaretraining.criteria.second_order.criteria import Sampling, Solver, gate_statistics
from pruningawaretraining.criteria.second_order.gradients import Calibration, LossFn
from pruningawaretraining.criteria.second_order.layout import WeightPattern
from pruningawaretraining.criteria.second_order.scored import ScoredSolver
from pruningawaretraining.criteria.second_order.solve import Candidates, Choose, Pruned, share_of
from pruningawaretraining.criteria.second_order.weights import PrunableWeight, prunable_weights
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.grouping import Grouping, GroupSet
from pruningawaretraining.patterns.block import Block, NofM, Unstructured
from pruningawaretraining.patterns.channel import Channel, find_channels, producer_names
from pruningawaretraining.patterns.selection import select
from pruningawaretraining.pruning import unwrap
from pruningawaretraining.registry import build, lookup
from pruningawaretraining.removal import remove
from pruningawaretraining.schedules import sparsity_at
from pruningawaretraining.statistics import Statistics

log = logging.getLogger(__name__)

DEFAULT_BLOCK = 64  # of criteria that have none of their own: only the work's granularity


@dataclass(frozen=True)
class AfterPruning:
    """What is done to a model once weights or channels have gone.

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


def one_shot(
    model: nn.Module,
    rule: Rule | Mapping[str, Any],
    dataloader: Iterable[Any],
    loss_fn: LossFn,
    sparsities: Sequence[float] | None = None,
    *,
    after: AfterPruning = AfterPruning(),
) -> dict[float, nn.Module]:
    """Prune a trained model at once, to one sparsity or to several, all from one collection of gradients.

    Args:
        model: the model; it is unchanged.
        rule: what to prune: pattern, layers, criterion, scope and bounds of a rule; its schedule is not used.
        dataloader: batches ``(inputs, targets)``, or mappings of keyword inputs with "labels".
        loss_fn: ``(outputs, targets) -> loss``.
        sparsities: fractions to remove; those of the rule's target when None.
        after: what follows the pruning.

    Returns:
        A pruned copy of the model for each sparsity. Pruned weights are exactly 0; channels are removed.

    Raises:
        ConfigError, ModelError, TargetError: an option, layer, batch or sparsity that cannot be used; it is named.
    """
    rule = rule if isinstance(rule, Rule) else Rule.model_validate(dict(rule))
    wanted = _checked(sparsities, rule)
    pattern = build("pattern", rule.pattern, "pattern")
    criterion = build("criterion", rule.criterion, "criterion")
    inner = unwrap(model)
    micro_batch = criterion.micro_batch if isinstance(criterion, Sampling) else None
    calibration = Calibration(inner, dataloader, loss_fn, micro_batch)
    if isinstance(pattern, Channel):
        return _one_shot_channels(calibration, rule, criterion, wanted, after)
    if not isinstance(pattern, (Unstructured, Block, NofM)):
        raise ConfigError(
            f"pattern: {rule.pattern!r} cannot be pruned in one shot. Allowed: channel, unstructured, block, n_of_m"
        )
    pruner = WeightPruner(calibration, rule, pattern, criterion)
    models = {}
    for sparsity, weights in pruner.prune(wanted).items():
        pruned = _unchanged_copy(inner)
        put(pruned, weights)
        if after.norm_batches:
            recalibrate_norms(pruned, _on(calibration, pruned), after.norm_batches)
        models[sparsity] = pruned
    return models


def _checked(sparsities: Sequence[float] | None, rule: Rule) -> list[float]:
    if sparsities is None:
        if rule.target.sparsity is None:
            raise ConfigError("sparsities: none given, and the rule has no target.sparsity")
        return [rule.target.sparsity]
    for one in sparsities:
        if isinstance(one, bool) or not isinstance(one, (int, float)) or not 0 <= one <= 1:
            raise ConfigError(f"sparsities: {one!r} is not allowed. Allowed: numbers in [0, 1]")
    return list(dict.fromkeys(float(one) for one in sparsities))


def _unchanged_copy(model: nn.Module) -> nn.Module:
    """A deep copy; gradients are not copied."""
    memo: dict[int, Any] = {id(p.grad): None for p in model.parameters() if p.grad is not None}
    return copy.deepcopy(model, memo)


def _on(calibration: Calibration, model: nn.Module) -> Calibration:
    return Calibration(model, calibration.dataloader, calibration.loss_fn, calibration.micro_batch)


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Pruned]) -> None:
    """Copy pruned weights into a model, in place."""
    for name, pruned in weights.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(pruned.weight_W)


# --- weights ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class WeightPruner:
    """Prunes the weights of a model by one rule, in one round or in several.

    Args:
        calibration: model and data.
        rule: layers, scope, bounds.
        pattern: what goes together.
        criterion: what scores it.
        collections: how many times statistics have been gathered.
    """

    calibration: Calibration
    rule: Rule
    pattern: WeightPattern
    criterion: Any
    collections: int = field(default=0, init=False)

    def weights(self, model: nn.Module, keep: Mapping[str, Tensor] | None = None) -> list[PrunableWeight]:
        """The rule's weights in a model."""
        size = self.criterion.block_size if isinstance(self.criterion, Sampling) else DEFAULT_BLOCK
        return prunable_weights(model, self.pattern, size, self.rule.layers, self.rule.exclude, keep)

    def prune(
        self, sparsities: Sequence[float], keep: Mapping[str, Tensor] | None = None
    ) -> dict[float, dict[str, Pruned]]:
        """The pruned weights at each sparsity.

        Args:
            sparsities: fractions of the dense groups.
            keep: masks so far by layer (True = keep): what they have zeroed stays so, and counts.

        Raises:
            TargetError: N:M and another sparsity than its own.
        """
        rounds = self.criterion.num_recomputations if isinstance(self.criterion, Sampling) else 1
        weights = self.weights(self.calibration.model, keep)
        finals = {one: share_of(weights[0].layout, one) for one in sparsities}
        if rounds == 1:
            found = self._solve(self.calibration, weights, list(dict.fromkeys(finals.values())))
            return {sparsity: found[final] for sparsity, final in finals.items()}
        return self._in_rounds(weights, finals, rounds, keep)

    def _in_rounds(
        self, weights: list[PrunableWeight], finals: dict[float, float], rounds: int, keep: Mapping[str, Tensor] | None
    ) -> dict[float, dict[str, Pruned]]:
        """Recompute the statistics between rounds; the first round's serve every sparsity."""
        before = _sparsity_of(weights)
        schedule = self.criterion.recomputation_schedule
        paths = {
            final: [sparsity_at(schedule, step / rounds, min(before, final), final) for step in range(1, rounds + 1)]
            for final in finals.values()
        }
        first = self._solve(self.calibration, weights, list(dict.fromkeys(path[0] for path in paths.values())))
        results = {}
        for final, path in paths.items():
            pruned = first[path[0]]
            stage = _unchanged_copy(self.calibration.model)
            for fraction in path[1:]:
                put(stage, pruned)
                masks = {**(keep or {}), **{name: one.keep_W for name, one in pruned.items()}}
                pruned = self._solve(_on(self.calibration, stage), self.weights(stage, masks), [fraction])[fraction]
            results[final] = pruned
        return {sparsity: results[final] for sparsity, final in finals.items()}

    def _solve(
        self, calibration: Calibration, weights: list[PrunableWeight], fractions: list[float]
    ) -> dict[float, dict[str, Pruned]]:
        self.collections += 1
        return self._solver(calibration, weights).solve(fractions)

    def _solver(self, calibration: Calibration, weights: list[PrunableWeight]) -> Solver:
        choose = chooser(weights, self.rule.scope, ElementLimits(self.rule.min_sparsity, self.rule.max_sparsity))
        if isinstance(self.criterion, Sampling):
            return self.criterion.solver(weights, calibration, choose)
        return ScoredSolver(weights, self.criterion, self.pattern, calibration.model, choose)


def _sparsity_of(weights: Sequence[PrunableWeight]) -> float:
    valid = sum(int(weight.valid_BT.sum()) for weight in weights)
    return 1 - sum(int(weight.open_BT.sum()) for weight in weights) / valid


def chooser(weights: Sequence[PrunableWeight], scope: str, limits: ElementLimits) -> Choose:
    """How a scope and bounds share a sparsity out over layers, with exact counts under ties."""
    sets = tuple(
        GroupSet(one.name, number, number + 1, 1, f"{type(one.module).__name__}:{one.layout.shape}", (one.name,))
        for number, one in enumerate(weights)
    )
    classes_S = classes_of(Grouping("weight", (), sets), scope)

    def choose(layers: Sequence[Candidates], fraction: float) -> list[Tensor]:
        sizes = [len(one.scores_N) for one in layers]
        scores, removed, exempt = (
            torch.cat([getattr(one, key) for one in layers]) for key in ("scores_N", "removed_N", "exempt_N")
        )
        keep = allocate(scores, sizes, fraction, limits, classes_S, removed, exempt)
        return list(torch.split(keep, sizes))

    return choose


# --- channels -----------------------------------------------------------------------------------------------------


def _one_shot_channels(
    calibration: Calibration, rule: Rule, criterion: Any, sparsities: Sequence[float], after: AfterPruning
) -> dict[float, nn.Module]:
    """Score channels once; for each sparsity compensate their readers, remove them, and measure the norms again."""
    model = calibration.model
    inputs = calibration.example()
    names = producer_names(model)
    chosen = select(model, rule.layers, names, "layers") - select(model, rule.exclude, names, "exclude")
    grouping = find_channels(model, inputs, chosen).grouping
    statistics = Statistics()
    if isinstance(criterion, Sampling):
        statistics = gate_statistics(gate_gradients(grouping, calibration, criterion.num_grads))
    scores_G = criterion.score(grouping, statistics)
    limits = Limits(rule.min_sparsity, rule.max_sparsity, rule.multiple)
    allocator = Allocator(grouping, scores_G, limits, rule.scope)
    hooks = None
    if after.compensation != "none":
        every = list(losing_readers(model, grouping, torch.zeros(grouping.size, dtype=torch.bool)))
        hooks = measure(every, calibration, after.input_batches)
    models = {}
    for sparsity in sparsities:
        keep_G = allocator.at(sparsity)
        pruned = _unchanged_copy(model)
        found = find_channels(pruned, inputs, chosen)
        if hooks is not None:
            lost = list(losing_readers(pruned, found.grouping, keep_G))
            compensate_readers(lost, hooks, lookup("channel_compensation", after.compensation))
        remove(pruned, found.grouping, keep_G, norms=found.norms)
        if after.norm_batches:
            recalibrate_norms(pruned, _on(calibration, pruned), after.norm_batches)
        models[sparsity] = pruned
    return models


def accuracy(model: nn.Module, dataloader: Iterable[Any], batches: int | None = None) -> float:
    """Fraction of correct predictions (largest output) of a classifier; the model is left as it was."""
    calibration = Calibration(model, dataloader, lambda outputs, targets: outputs)
    right = seen = 0
    for outputs, targets in calibration.outputs(itertools.islice(dataloader, batches)):
        right += int((outputs.argmax(-1) == targets).sum())
        seen += targets.numel()
    return right / max(seen, 1)


__all__ = ["AfterPruning", "WeightPruner", "accuracy", "chooser", "one_shot", "put"]
