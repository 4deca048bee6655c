"""Second-order pruning of a model's weights by one rule: in one shot, or as one event of a schedule.

Shape suffixes: ``_W`` the shape of a weight, ``_S`` sets of groups (layers), ``_N`` candidates of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.allocation.ranking import Limits
from pruningawaretraining.allocation.threshold import allocate, classes_of
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.criteria.base import solves
from pruningawaretraining.criteria.second_order.criteria import Solver
from pruningawaretraining.criteria.second_order.gathering import on_model, unchanged_copy
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.criteria.second_order.layout import WeightPattern
from pruningawaretraining.criteria.second_order.scored import ScoredSolver
from pruningawaretraining.criteria.second_order.solve import Candidates, Choose, Pruned, share_of
from pruningawaretraining.criteria.second_order.weights import PrunableWeight, prunable_weights
from pruningawaretraining.engine.rule import ActiveRule
from pruningawaretraining.groups.grouping import Grouping, GroupSet
from pruningawaretraining.groups.views import slot_maxima
from pruningawaretraining.schedules import Asked, sparsity_at

DEFAULT_BLOCK = 64  # of criteria that have none of their own: only the work's granularity


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Pruned]) -> None:
    """Copy pruned weights into a model, in place."""
    for name, pruned in weights.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(pruned.weight_W)


@dataclass(eq=False)
class WeightPruner:
    """Prunes the weights of a model by one rule, in one round or in several.

    Args:
        calibration: model and data.
        rule: layers, scope, bounds.
        pattern: what goes together.
        criterion: what scores it.
    """

    calibration: Calibration
    rule: Rule
    pattern: WeightPattern
    criterion: Any

    def weights(self, model: nn.Module, keep: Mapping[str, Tensor] | None = None) -> list[PrunableWeight]:
        """The rule's weights in a model."""
        size = self.criterion.block_size if solves(self.criterion) else DEFAULT_BLOCK
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
        weights = self.weights(self.calibration.model, keep)
        return self._prune(weights, {one: share_of(weights[0].layout, one) for one in sparsities}, keep)

    def event(self, sparsity: float, keep: Mapping[str, Tensor] | None = None) -> dict[str, Pruned]:
        """The pruned weights at one step of a schedule; N:M may be on its way to N of M.

        Args:
            sparsity: fraction of the dense groups.
            keep: masks so far by layer, as above.
        """
        weights = self.weights(self.calibration.model, keep)
        share = sparsity / weights[0].layout.tile.most
        return self._prune(weights, {sparsity: min(share, 1.0)}, keep)[sparsity]

    def _prune(
        self, weights: list[PrunableWeight], finals: dict[float, float], keep: Mapping[str, Tensor] | None
    ) -> dict[float, dict[str, Pruned]]:
        rounds = self.criterion.num_recomputations if solves(self.criterion) else 1
        if rounds == 1:
            found = self._solver(self.calibration, weights).solve(list(dict.fromkeys(finals.values())))
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
        first = self._solver(self.calibration, weights).solve(list(dict.fromkeys(path[0] for path in paths.values())))
        results = {}
        for final, path in paths.items():
            pruned = first[path[0]]
            stage = unchanged_copy(self.calibration.model)
            for fraction in path[1:]:
                put(stage, pruned)
                masks = {**(keep or {}), **{name: one.keep_W for name, one in pruned.items()}}
                again = self._solver(on_model(self.calibration, stage), self.weights(stage, masks))
                pruned = again.solve([fraction])[fraction]
            results[final] = pruned
        return {sparsity: results[final] for sparsity, final in finals.items()}

    def _solver(self, calibration: Calibration, weights: list[PrunableWeight]) -> Solver:
        choose = chooser(weights, self.rule.scope, Limits(self.rule.min_sparsity, self.rule.max_sparsity))
        if solves(self.criterion):
            solver: Solver = self.criterion.solver(weights, self.criterion.sampled(calibration), choose)
            return solver
        return ScoredSolver(weights, self.criterion, self.pattern, calibration, choose)


def _sparsity_of(weights: Sequence[PrunableWeight]) -> float:
    valid = sum(int(weight.valid_BT.sum()) for weight in weights)
    return 1 - sum(int(weight.open_BT.sum()) for weight in weights) / valid


def chooser(weights: Sequence[PrunableWeight], scope: str, limits: Limits) -> Choose:
    """How a scope and bounds share a sparsity out over layers, with exact counts under ties."""
    sets = tuple(
        GroupSet(one.name, number, number + 1, 1, f"{type(one.module).__name__}:{one.layout.shape}", (one.name,))
        for number, one in enumerate(weights)
    )
    classes_S = classes_of(Grouping("weight", (), sets), scope)

    def choose(layers: Sequence[Candidates], fraction: float) -> list[Tensor]:
        sizes = [len(one.scores_N) for one in layers]
        device = layers[0].scores_N.device  # a model may lie on several
        scores, removed, exempt = (
            torch.cat([getattr(one, key).to(device) for one in layers]) for key in ("scores_N", "removed_N", "exempt_N")
        )
        keep = allocate(scores, sizes, fraction, limits, classes_S, removed, exempt)
        return list(torch.split(keep, sizes))

    return choose


def prune_by_curvature(
    calibration: Calibration, one: ActiveRule, grouping: Grouping, keep_G: Tensor, asked: Asked
) -> Tensor:
    """One event of a second-order rule: measure, decide, and move the weights that stay to where the loss rises least.

    Args:
        calibration: model, data and loss.
        one: the rule; the weights change in place.
        grouping: its groups.
        keep_G: what is kept so far.
        asked: what the event asks for.

    Returns:
        Its new masks, those of single weights also where groups are larger.
    """
    rule = one.rule if asked.layers is None else one.rule.model_copy(update={"layers": list(asked.layers)})
    pruner = WeightPruner(calibration, rule, one.pattern, one.criterion)
    masks = {member.name: keep_W for member, keep_W in grouping.expand(keep_G)}
    so_far = {
        group_set.name: masks[member.name].expand(member.parameter.shape).contiguous()
        for group_set, member in zip(grouping.sets, grouping.members, strict=True)
    }
    pruned = pruner.event(asked.sparsity, so_far)
    put(calibration.model, pruned)
    kept = [
        slot_maxima(member, pruned[group_set.name].keep_W.float()).to(keep_G.device)
        if group_set.name in pruned
        else slot_maxima(member, so_far[group_set.name].float()).to(keep_G.device)
        for group_set, member in zip(grouping.sets, grouping.members, strict=True)
    ]
    return torch.cat(kept) > 0
