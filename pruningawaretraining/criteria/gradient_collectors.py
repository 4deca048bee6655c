"""Collectors of gradients while the model trains.

Shape suffixes: ``_G`` groups, ``_W`` any weight, ``_M`` gradients kept.

Nothing here waits for the device: a step whose gradients are not finite is weighed with 0 there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pruningawaretraining.distributed.fsdp import across, is_sharded, local_of
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.groups.reductions import Reduction, device_of
from pruningawaretraining.registry import lookup

Combine = Callable[[Tensor, Tensor], Tensor]
Finish = Callable[[Tensor], Tensor]

SCORE, SEEN, STEPS = "score", "seen", "steps"


@dataclass(frozen=True)
class GradientRule:
    """Update of a step: ``score <- momentum * score + gain * finish(reduce(combine(w, g)))``.

    Args:
        combine: elementwise ``(weight, gradient) -> value``; may reuse neither.
        finish: applied to the value of a group.
        reduction: a registered reduction. "max" keeps the moving score of every weight, the others only of groups.
        momentum: 0 keeps the last step, 1 sums all steps.
        gain: weight of a new step.
        dtype: of the scores that are kept.
    """

    combine: Combine
    finish: Finish
    reduction: str
    momentum: float
    gain: float = 1.0
    dtype: torch.dtype = torch.float32


class _WithoutHooks:
    """A collector that reads gradients before each step, when they have been averaged over processes."""

    def attach(self, model: nn.Module, grouping: Grouping) -> None:
        """Nothing to hook."""

    def detach(self) -> None:
        """Nothing is hooked."""

    def agree(self) -> None:
        """Nothing to share."""


class GradientCollector(_WithoutHooks):
    """Keeps a :class:`GradientRule`'s score of every group (or weight)."""

    reads_gradients: ClassVar[bool] = True

    def __init__(self, rule: GradientRule) -> None:
        self.rule = rule
        self.scores: list[Tensor] = []  # one over groups, or with "max" one a distinct parameter
        self.names: list[str] = []
        self.sharded: list[Tensor] = []
        self.seen: dict[str, bool] = {}
        self.steps: Tensor = torch.zeros((), dtype=torch.int64)
        self.offered = 0  # steps since construction, and those of them whose gradients were not finite
        self.refused: Tensor = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def on_before_step(self, grouping: Grouping, scale: Tensor | float = 1.0) -> None:
        """See :class:`~pruningawaretraining.criteria.base.Collector`."""

        def values(member: Member) -> Tensor | None:
            gradient_W = member.parameter.grad
            if gradient_W is None:
                return None
            self.seen[member.name] = True
            return self.rule.combine(local_of(member.parameter).float(), _unscaled(local_of(gradient_W), scale))

        if self.rule.reduction == "max":
            distinct = {member.name: member for member in grouping.members}
            self.sharded = [one.parameter for one in distinct.values() if is_sharded(one.parameter)]
            found = [(name, values(member)) for name, member in distinct.items()]
            self._update(
                [name for name, _ in found],
                [
                    self.rule.finish(value)
                    if value is not None
                    else torch.zeros_like(local_of(distinct[name].parameter))
                    for name, value in found
                ],
            )
            return
        reduce: Reduction = lookup("reduction", self.rule.reduction)
        self._update([""], [self.rule.finish(reduce(grouping, values, torch.float32))])

    def _update(self, names: list[str], fresh: list[Tensor]) -> None:
        total = torch.stack([value.sum().to(fresh[0].device) for value in fresh]).sum()
        fine = torch.isfinite(total)
        if names != [""] and self.sharded:  # the values are of this process's parts
            fine = across(total.isfinite().float().neg(), self.sharded, largest=True) < 0
        if not self.scores:
            self.names = names
            self.steps = torch.zeros((), dtype=torch.int64, device=fine.device)
            self.scores = [torch.zeros_like(value, dtype=self.rule.dtype) for value in fresh]
        self.steps = self.steps.to(fine.device)
        self.steps += fine
        self.offered += 1
        self.refused = self.refused.to(fine.device) + ~fine
        decay = torch.where(fine, self.rule.momentum, 1.0)
        for number, value in enumerate(fresh):
            score = self.scores[number] = self.scores[number].to(value.device)
            usable = fine.to(value.device)
            score.mul_(decay.to(value.device, score.dtype))
            score.add_(torch.where(usable, value, 0.0).to(score.dtype), alpha=self.rule.gain)

    def tensors(self) -> dict[str, Tensor]:
        """``score`` (or ``score.NAME`` of each parameter), ``seen.NAME`` and ``steps``."""
        keys = [f"{SCORE}.{name}" if name else SCORE for name in self.names]
        seen = {f"{SEEN}.{name}": torch.tensor(True) for name in self.seen}
        return {**dict(zip(keys, self.scores, strict=True)), **seen, STEPS: self.steps}

    def not_finite(self) -> tuple[int, int]:
        """(steps whose gradients were not finite, all steps); reading it waits for the device."""
        return int(self.refused), self.offered

    def restrict(self, grouping: Grouping, keep_G: Tensor) -> None:
        """Drop the scores of removed groups; the scores of single weights begin anew."""
        if self.rule.reduction == "max":
            self.scores, self.names, self.steps = [], [], torch.zeros_like(self.steps)
        else:
            self.scores = [score[keep_G.to(score.device)] for score in self.scores]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data; scores of single weights that lie on several processes are not kept."""
        if self.sharded:
            return {"names": [], "scores": [], "seen": sorted(self.seen), "steps": 0}
        return {
            "names": list(self.names),
            "scores": [score.clone() for score in self.scores],
            "seen": sorted(self.seen),
            "steps": int(self.steps),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~pruningawaretraining.criteria.base.Collector`."""
        names, seen = state["names"], state["seen"]
        texts = all(isinstance(one, list) and all(isinstance(each, str) for each in one) for one in (names, seen))
        tensors = isinstance(state["scores"], list) and all(isinstance(one, Tensor) for one in state["scores"])
        if not texts or not tensors or len(state["scores"]) != len(names):
            raise CheckpointError("state: the scores of gradients are damaged")
        shapes = [tuple(score.shape) for score in state["scores"]]
        mine = [tuple(score.shape) for score in self.scores]
        if mine and shapes and mine != shapes:
            raise CheckpointError(f"state: scores of the shapes {shapes[:4]} do not fit {mine[:4]}")
        self.names = list(state["names"])
        self.scores = [score.to(self.rule.dtype).clone() for score in state["scores"]]
        self.seen = dict.fromkeys(state["seen"], True)
        self.steps = torch.tensor(state["steps"])


def _unscaled(gradient_W: Tensor, scale: Tensor | float) -> Tensor:
    gradient_W = gradient_W.detach().float()
    if isinstance(scale, (int, float)):
        return gradient_W if scale == 1 else gradient_W / scale
    return gradient_W / scale.to(gradient_W.device)


class MaskGradientCollector(_WithoutHooks):
    """Keeps the last gradients with respect to the groups' masks: ``dL/dm = reduce(w * g)`` at m = 1.

    Args:
        samples: how many are kept; the sum of their squares is over all.
        most: with more groups than this only the sum is kept.
        over: gives the weights of the groups that are looked at; None for all of them.
    """

    reads_gradients: ClassVar[bool] = True

    def __init__(self, samples: int, most: int, over: Callable[[Grouping], Grouping] | None = None) -> None:
        self.samples, self.most, self.over = samples, most, over
        self.squares_G: Tensor | None = None
        self.kept_MG: Tensor | None = None
        self.steps: Tensor = torch.zeros((), dtype=torch.int64)
        self.offered = 0  # steps since construction; self.steps counts those whose gradients were finite
        self.refused: Tensor = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def on_before_step(self, grouping: Grouping, scale: Tensor | float = 1.0) -> None:
        """See :class:`~pruningawaretraining.criteria.base.Collector`."""

        def values(member: Member) -> Tensor | None:
            gradient_W = member.parameter.grad
            if gradient_W is None:
                return None
            return local_of(member.parameter).float() * _unscaled(local_of(gradient_W), scale)

        sums: Reduction = lookup("reduction", "sum")
        slope_G = sums(grouping if self.over is None else self.over(grouping), values, torch.float32)
        fine = torch.isfinite(slope_G.sum())
        slope_G = torch.where(fine, slope_G, 0.0)
        if self.squares_G is None:
            self.steps = torch.zeros((), dtype=torch.int64, device=device_of(grouping))
            self.squares_G = torch.zeros(grouping.size, device=device_of(grouping))
            if grouping.size <= self.most:
                self.kept_MG = torch.zeros(self.samples, grouping.size, device=device_of(grouping))
        self.squares_G = self.squares_G.to(slope_G.device).addcmul_(slope_G, slope_G)
        self.steps = self.steps.to(slope_G.device)
        if self.kept_MG is not None:
            self.kept_MG = self.kept_MG.to(slope_G.device)
            row = (self.steps % self.samples).view(1)
            known_G = self.kept_MG.index_select(0, row)
            self.kept_MG.index_copy_(0, row, torch.where(fine, slope_G.unsqueeze(0), known_G))
        self.steps += fine
        self.offered += 1
        self.refused = self.refused.to(fine.device) + ~fine

    def not_finite(self) -> tuple[int, int]:
        """See :meth:`GradientCollector.not_finite`."""
        return int(self.refused), self.offered

    def tensors(self) -> dict[str, Tensor]:
        """``mask_gradient_squares``, ``steps`` and, of few groups, ``mask_gradients``."""
        if self.squares_G is None:
            return {}
        kept = {} if self.kept_MG is None else {"mask_gradients": self.kept_MG[: min(int(self.steps), self.samples)]}
        return {"mask_gradient_squares": self.squares_G, STEPS: self.steps, **kept}

    def restrict(self, grouping: Grouping, keep_G: Tensor) -> None:
        """Drop what belongs to removed groups."""
        if self.squares_G is not None:
            self.squares_G = self.squares_G[keep_G.to(self.squares_G.device)]
        if self.kept_MG is not None:
            self.kept_MG = self.kept_MG[:, keep_G.to(self.kept_MG.device)]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data."""
        none = torch.zeros(0)
        return {
            "squares": none if self.squares_G is None else self.squares_G.clone(),
            "kept": none if self.kept_MG is None else self.kept_MG.clone(),
            "steps": int(self.steps),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~pruningawaretraining.criteria.base.Collector`."""
        squares_G, kept_MG = state["squares"], state["kept"]
        if self.squares_G is not None and squares_G.numel() and squares_G.shape != self.squares_G.shape:
            raise CheckpointError(f"state: {len(squares_G)} groups' gradients do not fit {len(self.squares_G)} groups")
        self.squares_G = squares_G.clone() if squares_G.numel() else None
        self.kept_MG = kept_MG.clone() if kept_MG.numel() else None
        self.steps = torch.tensor(int(state["steps"]))
