"""A removal that does not leave the masked model: the sets that are to blame are found, and the others can go.

Shape suffixes: ``_G`` groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.masks.bisection import working
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.masks.removal import remove
from pruningawaretraining.models.calling import first_line
from pruningawaretraining.models.comparison import Comparison, Outputs
from pruningawaretraining.models.exported_graph import ExportedGraph
from pruningawaretraining.models.surgery import Surgery
from pruningawaretraining.patterns.channel_groups import ChannelGroups


def removable_part(
    model: nn.Module,
    found: ChannelGroups,
    keep_G: Tensor,
    comparison: Comparison,
    masked: Outputs,
    graphs: Iterable[ExportedGraph] = (),
) -> tuple[Tensor, dict[str, str]]:
    """The masked groups that can go now, and the sets whose masked groups have to stay masked.

    Args:
        model: masked by ``keep_G``, without the hooks of masks; it is as before afterwards.
        found: its groups.
        keep_G: False for groups that are masked.
        comparison, masked: how to run the model, and what it computes masked.
        graphs: exported from the model.

    Returns:
        keep_G with the groups of offending sets kept; set -> why.
    """
    losing = [number for number, one in enumerate(found.grouping.sets) if not bool(keep_G[one.start : one.stop].all())]

    def problem(numbers: Sequence[int]) -> str:
        return _problem(model, found, keep_G, _only(found, keep_G, numbers), comparison, masked, graphs)

    able, reasons = working(losing, problem) if losing else ([], {})
    named = {found.grouping.sets[number].name: reason for number, reason in sorted(reasons.items())}
    return _only(found, keep_G, able), named


def _only(found: ChannelGroups, keep_G: Tensor, numbers: Sequence[int]) -> Tensor:
    """keep_G in some sets, and everything kept in the others."""
    part_G = torch.ones_like(keep_G)
    for number in numbers:
        one = found.grouping.sets[number]
        part_G[one.start : one.stop] = keep_G[one.start : one.stop]
    return part_G


def _problem(
    model: nn.Module,
    found: ChannelGroups,
    keep_G: Tensor,
    part_G: Tensor,
    comparison: Comparison,
    masked: Outputs,
    graphs: Iterable[ExportedGraph],
) -> str:
    """Why the model is not what it was masked once a part is removed and the rest is masked; "" if it is."""
    surgery = Surgery()
    try:
        try:
            remove(model, found, part_G, graphs=graphs, surgery=surgery)
        except ModelError as error:
            return str(error)
        rest = found.restrict(model, part_G)
        masks = Masks.coupled(model, rest)
        try:
            masks.set(keep_G[part_G])
            difference = comparison.verdict(masked, comparison.outputs()).difference
        finally:
            masks.clear()
    except ModelError as error:
        return f"without its masked channels the model does not run ({first_line(error.__cause__ or error)})"
    finally:
        surgery.undo()
    if not difference:
        return ""
    return f"removed, its masked channels would change the outputs by {difference:.2g} of their scale"
