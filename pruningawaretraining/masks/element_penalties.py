"""Regularisers of slices and blocks: one is part of the loss, the other shrinks weights after the step.

Shape suffixes: ``_S`` slots of one member, ``_F`` the member's folded shape, ``_W`` any weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import is_sharded, local_member, local_of
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.groups.views import fold_of, slot_sums
from pruningawaretraining.masks.penalties import check_strengths
from pruningawaretraining.registry import register

SMALL = 1e-8

RateOf = Callable[[Tensor], "Tensor | float"]
"""The learning rate that a parameter has now; a tensor where the optimizer keeps one on the device."""


@register("regularizer", "slice_penalty")
@dataclass(frozen=True)
class SlicePenalty:
    """``strength * sum of ||s|| stopgrad(1 / (||s|| + 1e-8))`` over slices s, to be added to the loss.

    Its gradient is that of ``strength * sum of log ||s||``: small slices are pulled harder towards 0. Slices that are 0
    have neither value nor gradient.

    Args:
        strength: of the penalty.
    """

    acts: ClassVar[str] = "loss"

    strength: float = 1e-4

    def __post_init__(self) -> None:
        check_strengths(strength=self.strength)

    def penalty(self, grouping: Grouping) -> Tensor:
        """The penalty of all groups, a differentiable scalar on the device of the first weight.

        Args:
            grouping: groups with consecutive slots.
        """
        total: Tensor | None = None
        for member in grouping.members:
            if is_sharded(member.parameter):
                raise ConfigError(
                    "regularizer: 'slice_penalty' is part of the loss, and fully_shard has spread the weights. "
                    "Allowed: block_lasso, which acts after the step"
                )
            part = _log_penalty(member)
            total = part if total is None else total + part.to(total.device)
        return self.strength * (torch.zeros(()) if total is None else total)


def _log_penalty(member: Member) -> Tensor:
    squares_S = slot_sums(member, member.parameter.float().square())
    with torch.no_grad():
        norm_S = squares_S.sqrt()
        # squares * scale has the gradient s / (||s|| (||s|| + small)) without a root, whose slope at 0 is infinite.
        scale_S = torch.where(norm_S > 0, 0.5 / (norm_S * (norm_S + SMALL)), 0.0).nan_to_num_(posinf=0.0)
        value = (norm_S / (norm_S + SMALL)).sum()
    sloped = (squares_S * scale_S).sum()
    return sloped + (value - sloped).detach()


@register("regularizer", "block_lasso")
@dataclass(frozen=True)
class BlockLasso:
    """Group lasso over blocks, decoupled from the optimizer: ``w -= rate * strength * w / ||w_block||`` after the step.

    A block smaller than ``rate * strength`` becomes 0 (the proximal map of the group lasso); a block of 0 stays.

    Args:
        strength: of the penalty.
    """

    acts: ClassVar[str] = "weights"

    strength: float = 1e-4

    def __post_init__(self) -> None:
        check_strengths(strength=self.strength)

    @torch.no_grad()
    def after_step(self, grouping: Grouping, rate_of: RateOf) -> None:
        """Shrink every block in place.

        Args:
            grouping: groups with consecutive slots.
            rate_of: parameter -> learning rate.
        """
        for member in grouping.members:
            step = rate_of(member.parameter) * self.strength
            if isinstance(step, Tensor) or step:
                _shrink(member, step)


def _shrink(member: Member, step: Tensor | float) -> None:
    weight_W = member.parameter.detach()
    norm_S = slot_sums(member, weight_W.float().square()).sqrt_()
    factor_S = torch.where(norm_S > 0, 1 - step / norm_S, 1.0).clamp_(min=0).to(weight_W.dtype)
    member, weight_W = local_member(member), local_of(weight_W)
    fold = fold_of(member)
    if fold is None:
        weight_W.mul_(member.spread(factor_S, outside=1.0))
    else:
        fold.view(weight_W).mul_(factor_S.view(fold.spread_shape))
