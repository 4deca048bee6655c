"""Whether outputs on the probes tell anything about groups: a constant is the same masked, removed and misread.

Shape suffixes: ``_G`` groups.
"""

from __future__ import annotations

from torch import Tensor, nn

from pruningawaretraining.masks.temporary import nudge
from pruningawaretraining.models.comparison import Comparison, Outputs
from pruningawaretraining.patterns.channel_groups import ChannelGroups

NOTHING_TOLD = (
    "%s: its outputs on random inputs like the example are constant or random, whatever its weights are, so that a "
    "removal can be checked by the shapes of outputs alone. Pass example_inputs= that reach every output (integers and "
    "masks are taken as they are given), or a forward_fn that returns more of them"
)
NUDGE, COARSE_NUDGE = 1e-3, 5e-2
"""How far groups are scaled to see whether outputs depend on them, in float64 and in other dtypes."""


def outputs_depend(
    comparison: Comparison, model: nn.Module, found: ChannelGroups, keep_G: Tensor, masked: Outputs
) -> bool:
    """Whether the outputs of a masked model change a little with the size of its groups.

    A bias alone, a saturated or rounded output, and one that integers of the example switch off do not. It is asked
    within :func:`~pruningawaretraining.masks.temporary.temporarily_masked`.

    Args:
        comparison: how to run the model.
        model, found, keep_G: the masked model, its groups, and those that stay.
        masked: its outputs.
    """
    if not nudge(model, found, keep_G, NUDGE if masked.exact else COARSE_NUDGE):
        return True
    return comparison.moved(masked, comparison.outputs())
