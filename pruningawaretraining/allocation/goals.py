"""Goals of an allocation: costs with a budget."""

from __future__ import annotations

from dataclasses import dataclass

from pruningawaretraining.costs.widths import SetCost
from pruningawaretraining.errors import TargetError

UNUSED = 0.03
"""Part of a promised latency that may be left when channels could still be given back."""


@dataclass(frozen=True, eq=False)
class Goal:
    """A cost that must not be above a budget.

    Args:
        key: of the config, for messages.
        cost: of the whole model.
        budget: in the units of the cost.
        asked: what the user wrote, for messages; without it a fraction of the dense cost.
        unit: of the cost, where amounts say something.
    """

    key: str
    cost: SetCost
    budget: float
    asked: str = ""
    unit: str = ""

    def out_of_reach(self, least: float) -> TargetError:
        """The error if the limits leave more of the cost than the budget."""
        dense = self.cost.dense
        asked = self.asked or f"{self.budget / dense:.4g} of the dense cost"
        amount = f", {least:.4g} of {dense:.4g} {self.unit}" if self.unit else ""
        return TargetError(
            f"{self.key}: {asked} is out of reach: caps, multiples and the selected layers leave at least "
            f"{least / dense:.4f}{amount}. Raise the target or max_sparsity, or select more"
        )
