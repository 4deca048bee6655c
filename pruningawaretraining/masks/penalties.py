"""Regularisers: penalties on whole groups, added to the gradients after backward.

Shape suffixes: ``_G`` groups.

Everything that only depends on the groups is an index built once. A step then costs one pass over the weights for the
norms and one for the gradients; there is no loop over groups and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pruningawaretraining.groups.channel_norms import GroupIndex
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.groups.placed import placed
from pruningawaretraining.registry import calling, check_returned, register

STRONGEST = 1e6
"""Largest strength of a regulariser."""
STEEPEST = 64.0
"""Largest power of 2 by which decay grows."""
EXPECTED_FACTORS = "a vector of {} factors, one for each group"


class Regularizer:
    """A penalty made ready for one grouping.

    Args:
        index: the groups.
        strength_G: penalty of each group.
        factor: ``(squared norms, index, keep) -> factor`` of each group's weights in the gradient.
    """

    def __init__(
        self,
        index: GroupIndex,
        strength_G: Tensor,
        factor: Callable[[Tensor, GroupIndex, Tensor | None], Tensor],
    ) -> None:
        self.index, self.factor = index, factor
        self.options: Any = self
        self._tried = False
        self.strength_G = strength_G.float()

    @property
    def acts(self) -> bool:
        """Whether there are weights that it is about."""
        return bool(self.index.weights)

    @torch.no_grad()
    def factors(self, keep_G: Tensor | None = None) -> Tensor:
        """The factor of each group's weights in the penalty's gradient, at the weights as they are now.

        Args:
            keep_G: groups that are not masked (True), on the index's device; None for all.
        """
        norms_G = self.index.squared_norms()
        factor_G = self._checked(self.factor(norms_G, self.index, keep_G), norms_G)
        factor_G = factor_G * placed(self.strength_G, factor_G.device)
        return factor_G if keep_G is None else factor_G * keep_G

    def _checked(self, factor_G: Any, norms_G: Tensor) -> Tensor:
        """Refuse anything but a factor for each group; whether those of a user's own are finite is asked once, since
        the device has to be waited for."""
        size = len(self.strength_G)
        expected = EXPECTED_FACTORS.format(size)
        good = isinstance(factor_G, Tensor) and factor_G.shape == (size,)
        check_returned(good, "regularizer", self.options, factor_G, expected)
        found_G: Tensor = factor_G
        if not self._tried and not type(self.options).__module__.startswith("pruningawaretraining."):
            self._tried = True
            wrong = int((norms_G.isfinite() & ~found_G.isfinite()).sum())
            shown = f"{wrong} of {size} factors that are not finite"
            check_returned(not wrong, "regularizer", self.options, found_G, expected, shown)
        return found_G

    @torch.no_grad()
    def add(self, factor_G: Tensor, only: set[int] | None = None) -> None:
        """Add the penalty's gradient in place; see :meth:`GroupIndex.add_to_gradients`."""
        self.index.add_to_gradients(factor_G, only)

    def __call__(self, keep_G: Tensor | None = None, scale: Tensor | float = 1.0) -> None:
        """Add the penalty's gradient in place, in the gradients' own ``scale``."""
        self.add(self.factors(keep_G) * scale)


def _strengths(grouping: Grouping, strength: float, mac_strength: float, saving_G: Tensor | None) -> Tensor:
    out_G = torch.full((grouping.size,), strength, dtype=torch.float64)
    if mac_strength and saving_G is not None:
        out_G = out_G + mac_strength * saving_G / saving_G.mean().clamp(min=1e-30)
    return out_G


def check_strengths(most: float = STRONGEST, **values: float) -> None:
    """Refuse options that would turn weights into infinities at the first step.

    Args:
        most: the largest that is allowed.
        values: options by name.

    Raises:
        ValueError: it names the option.
    """
    for key, value in values.items():
        if not 0 <= value <= most:
            raise ValueError(f"{key}: {value!r} must be from 0 to {most:g}")


@register("regularizer", "growing_l2", "GroupNormPruner")
@dataclass(frozen=True)
class GrowingL2:
    """L2 decay that grows from 1 to ``2^alpha`` times as a channel falls behind the others of its set.

    With s the root of a group's magnitude and r = (max s - s) / (max s - min s) in its set:
    ``grad += strength * (2^alpha)^(gamma r) * w`` on output and input weights and norm weights, never on biases (Fang
    et al. 2023, DepGraph, section 3.3; after Wang et al. 2021, Growing Regularization).

    Args:
        strength: lambda of a channel that is as large as the largest.
        alpha: the smallest channel is decayed ``2^alpha`` times as much.
        gamma: exponent on the growing factor.
        mac_strength: added to lambda in proportion to the MACs that the channel costs (1 at the mean).
    """

    acts: ClassVar[str] = "gradients"

    strength: float = 5e-4
    alpha: float = 4.0
    gamma: float = 1.0
    mac_strength: float = 0.0

    def __post_init__(self) -> None:
        check_strengths(strength=self.strength, mac_strength=self.mac_strength)
        check_strengths(STEEPEST, alpha=self.alpha, gamma=self.gamma)
        if self.alpha * self.gamma > STEEPEST:
            raise ValueError(f"alpha: {self.alpha!r} times gamma {self.gamma!r} must be at most {STEEPEST:g}")

    def prepare(self, grouping: Grouping, saving_G: Tensor | None = None) -> Regularizer:
        """Build the index for a grouping; ``saving_G`` are the MACs that each group costs."""
        index = GroupIndex(grouping, ("out", "in", "norm"))
        exponent = self.alpha * self.gamma

        def factor(norms_G: Tensor, index: GroupIndex, keep_G: Tensor | None) -> Tensor:
            size_G = (norms_G / index.members_G).sqrt()
            low_G, high_G = index.extremes(size_G, keep_G)
            span_G = high_G - low_G
            behind_G = torch.where(span_G > 0, (high_G - size_G) / span_G, torch.zeros_like(size_G))
            return torch.exp2(exponent * behind_G.clamp(0, 1))

        return Regularizer(index, _strengths(grouping, self.strength, self.mac_strength, saving_G), factor)


def _inverse_norm(norms_G: Tensor, index: GroupIndex, keep_G: Tensor | None) -> Tensor:
    return torch.where(norms_G > 0, norms_G.rsqrt(), torch.zeros_like(norms_G))


@register("regularizer", "group_lasso")
@dataclass(frozen=True)
class GroupLasso:
    """The group lasso ``strength * sum of ||w_g||_2`` over whole coupled groups (Yuan and Lin 2006).

    Its gradient is ``strength * w / ||w_g||``, and 0 where the group is 0.

    Args:
        strength: lambda.
        mac_strength: added to lambda in proportion to the MACs that the group costs (1 at the mean).
    """

    acts: ClassVar[str] = "gradients"

    strength: float = 1e-4
    mac_strength: float = 0.0

    def __post_init__(self) -> None:
        check_strengths(strength=self.strength, mac_strength=self.mac_strength)

    def prepare(self, grouping: Grouping, saving_G: Tensor | None = None) -> Regularizer:
        """Build the index for a grouping; ``saving_G`` are the MACs that each group costs."""
        strength_G = _strengths(grouping, self.strength, self.mac_strength, saving_G)
        return Regularizer(GroupIndex(grouping, ("out", "in", "norm")), strength_G, _inverse_norm)


@register("regularizer", "bn_scale", "bn_l1", "BNScalePruner")
@dataclass(frozen=True)
class NormScaleLasso:
    """Group lasso on the norm weights alone; with one norm behind a channel it is the L1 penalty of Liu et al. 2017.

    ``grad += strength * weight / ||weights of the group||_2``.

    Args:
        strength: lambda.
    """

    acts: ClassVar[str] = "gradients"

    strength: float = 1e-4

    def __post_init__(self) -> None:
        check_strengths(strength=self.strength)

    def prepare(self, grouping: Grouping, saving_G: Tensor | None = None) -> Regularizer:
        """Build the index for a grouping; ``saving_G`` is not used."""
        strength_G = _strengths(grouping, self.strength, 0.0, None)
        return Regularizer(GroupIndex(grouping, ("norm",)), strength_G, _inverse_norm)


def prepare(options: Any, grouping: Grouping, saving_G: Tensor | None = None) -> Regularizer:
    """Make a registered regulariser ready for a grouping.

    Raises:
        ExtensionError: it raises, or its strengths are not one for each group.
    """
    expected = f"a Regularizer with {grouping.size} strengths, one for each group"
    with calling("regularizer", options, expected):
        ready = options.prepare(grouping, saving_G)
    check_returned(isinstance(ready, Regularizer), "regularizer", options, ready, expected)
    found: Regularizer = ready
    check_returned(found.strength_G.shape == (grouping.size,), "regularizer", options, found.strength_G, expected)
    found.options = options
    return found
