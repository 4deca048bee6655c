"""Removing what is masked from a model: all or nothing, and only if the removed model computes the same.

Shape suffixes: ``_G`` groups that are still there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pruningawaretraining.engine.commit import Commit
from pruningawaretraining.engine.context import RemovalContext
from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.engine.memory import Remembered, memory
from pruningawaretraining.errors import ModelError
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.masks.partial_removal import removable_part
from pruningawaretraining.masks.removal import remove
from pruningawaretraining.models.comparison import Comparison, Outputs
from pruningawaretraining.models.compiling import forget_compiled
from pruningawaretraining.models.exported_graph import ExportedGraph
from pruningawaretraining.models.surgery import Surgery

logger = logging.getLogger(__name__)


class Removing(Remembered, Protocol):
    """An engine, as far as a removal has to know it."""

    def after_removal(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Groups have been removed: everything else follows."""


def remove_masked(engine: Removing, context: RemovalContext, commit: Commit) -> bool:
    """Remove the groups that are masked now, physically: all or nothing, under an interrupt too.

    Args:
        engine: its groups, and what follows them.
        context: optimizers, averages and graphs that follow.
        commit: called once the removal has happened; what follows it is finished, whatever comes in between.

    Returns:
        Whether anything was removed.

    Raises:
        ModelError: the removed model does not compute what the masked one did; everything is put back first.
    """
    coupled = engine.coupled
    if coupled is None or not _can_begin(coupled):
        return False
    context.before_removal()
    surgeries: list[Surgery] = []
    undo = memory(engine, surgeries)
    try:
        _remove(coupled, context, surgeries)
        engine.after_removal(context.optimizers)
        commit()
        context.after_removal()
    except BaseException:
        if commit.is_over:
            context.after_removal()
        else:
            undo()
        raise
    context.told()
    return True


def _can_begin(coupled: CoupledGroups) -> bool:
    """Whether there is anything to remove.

    Raises:
        ModelError: the parameters are spread, or a layer has been wrapped since its groups were found.
    """
    if coupled.sharded:
        raise ModelError(
            "removal: fully_shard has spread the parameters. Allowed: pruner = pruner.gathered(build_model()), "
            "and fully_shard(pruner.model) again"
        )
    if bool(coupled.keep_D[coupled.live_D].all()):
        return False
    now = {id(one): name for name, one in coupled.model.named_parameters()}
    for name, tensor in [(one.name, one.parameter) for one in coupled.masks.grouping.members]:
        here = now.get(id(tensor))
        if (
            here is not None
            and here != name
            and name not in dict(coupled.model.named_parameters(remove_duplicate=False))
        ):
            raise ModelError(
                f"{name}: it is called {here} since a layer was wrapped after the pruner was made, as an adapter does, "
                "and cannot be sliced there. Allowed: merge the adapter into the layer, then remove"
            )
    return True


def _remove(coupled: CoupledGroups, context: RemovalContext, surgeries: list[Surgery]) -> None:
    """Remove what is masked, and go on with what is left."""
    keep_G = coupled.keep_D[coupled.live_D]
    comparison = Comparison(coupled.model, coupled.example.inputs, coupled.forward_fn, context.graphs)
    before = comparison.outputs()
    coupled.masks.clear()
    part_G = _removed_part(coupled, keep_G, comparison, before, context, surgeries)
    forget_compiled(coupled.model)
    coupled.follow_removal(part_G)
    coupled.masks.set(keep_G[part_G])
    coupled.reset_optimizer = True


def _removed_part(
    coupled: CoupledGroups,
    keep_G: Tensor,
    comparison: Comparison,
    before: Outputs,
    context: RemovalContext,
    surgeries: list[Surgery],
) -> Tensor:
    """Remove all masked groups, or those of the sets that can go, and say which cannot and why.

    Raises:
        ModelError: nothing can go; the model is as it was.
    """
    try:
        _remove_checked(coupled, keep_G, keep_G, comparison, before, context, surgeries)
    except ModelError:
        with torch.no_grad():
            part_G, reasons = removable_part(coupled.model, coupled.found, keep_G, comparison, before, context.graphs)
        if bool(part_G.all()):
            raise
        _remove_checked(coupled, part_G, keep_G, comparison, before, context, surgeries)
        for name, reason in reasons.items():
            logger.warning("%s stays masked and is not removed: %s", name, reason)
        return part_G
    return keep_G


def _remove_checked(
    coupled: CoupledGroups,
    part_G: Tensor,
    keep_G: Tensor,
    comparison: Comparison,
    before: Outputs,
    context: RemovalContext,
    surgeries: list[Surgery],
) -> None:
    """Remove some groups; if the model then computes something else, put everything back."""
    surgery = Surgery()
    surgeries.append(surgery)
    followers, graphs = context.followers, context.graphs
    remove(coupled.model, coupled.found, part_G, context.optimizers, followers, graphs, surgery)
    try:
        rest = Masks.coupled(coupled.model, coupled.found.restrict(coupled.model, part_G), coupled.spared)
        try:
            rest.set(keep_G[part_G])
            _check(comparison, before)
        finally:
            rest.clear()
    except BaseException:
        surgery.undo()
        raise


def _check(comparison: Comparison, before: Outputs) -> None:
    try:
        difference = comparison.verdict(before, comparison.outputs()).difference
    except ModelError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ModelError(
            f"removal: the removed model does not run: {reason}; the model is put back as it "
            "was, masked. Some width is written into its code: leave those layers out with 'exclude'"
        ) from error
    if difference:
        raise ModelError(
            f"removal: the removed model's outputs differ from the masked model's by {difference:.2g} of their "
            "scale; the model is put back as it was, masked. Some operation mixes channels in a way that is "
            "not understood: leave its layers out with 'exclude'"
        )


def spare(coupled: CoupledGroups, graph: ExportedGraph) -> None:
    """Let masks hold in a graph that was exported from the model.

    A quantizer folds batch norms into layers and divides by their weights, so those of masked channels are 1, not
    0; they have no influence, since everything that reads them is masked.

    Args:
        coupled: the groups.
        graph: exported from their model.

    Raises:
        ModelError: masks need hooks (of a norm over channels, say), which a graph does not have; or the graph does
            not run on the example inputs.
    """
    problems = (one.graph_problem(coupled.model) for one in coupled.found.attachments)
    problem = next(filter(None, problems), "")
    if problem:
        raise ModelError(f"graph: {problem}")
    graph.outputs(coupled.example.inputs, coupled.forward_fn)
    keep_G, divisors = coupled.masks.keep_G, graph.divisors()
    coupled.spared |= divisors
    coupled.masks.clear()
    coupled.mask_again(keep_G)
    _set_divisors(coupled, keep_G, divisors)


@torch.no_grad()
def _set_divisors(coupled: CoupledGroups, keep_G: Tensor, divisors: frozenset[str]) -> None:
    for member, keep_W in coupled.found.grouping.expand(keep_G.float(), outside=1.0):
        if member.name in divisors:
            member.parameter[(keep_W == 0).to(member.parameter.device)] = 1.0
