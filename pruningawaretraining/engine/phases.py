"""A rule on the model's side: the layers that one of its phases prunes, and what it leaves as it is or cannot know yet.

Shape suffixes: ``_G`` groups of one rule, ``_S`` its sets.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pruningawaretraining.config.schema import Rule
from pruningawaretraining.engine.rule import ActiveRule
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.patterns.selection import select, spared
from pruningawaretraining.schedules import Timeline

logger = logging.getLogger(__name__)


def outside_phase(
    model: nn.Module, grouping: Grouping, entries: Sequence[str] | None, key: str, device: torch.device
) -> Tensor | None:
    """Mark (True) the groups of layers that a phase does not prune; None if it prunes all layers of its rule.

    Args:
        model: the model.
        grouping: of the rule.
        entries: layers of the phase, as in a rule's ``layers``; None for all.
        key: how messages call them.
        device: of the result.

    Raises:
        ConfigError: an entry that is no layer, or none of them is the rule's.
    """
    if entries is None:
        return None
    found = select(model, entries, [one.name for one in grouping.sets], key)
    if not found:
        raise ConfigError(f"{key}: {list(entries)!r} selects none of the layers of the rule")
    outside_S = torch.tensor([one.name not in found for one in grouping.sets])
    return outside_S.repeat_interleave(torch.tensor([one.size for one in grouping.sets])).to(device)


def tell_what_stays(model: nn.Module, key: str, rule: Rule, grouping: Grouping) -> None:
    """Warn of selected layers that the pattern does not fit, where it fits others, and of parameters that are none of a
    layer's weight."""
    if grouping.skipped:
        shown = "; ".join(grouping.skipped[:4]) + ("; ..." if len(grouping.skipped) > 4 else "")
        logger.warning("%s: %r leaves %d layers as they are: %s", key, rule.pattern, len(grouping.skipped), shown)
    others = spared(model, rule.layers, [layer for one in grouping.sets for layer in one.layers or (one.name,)])
    if others:
        shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
        logger.warning(
            "%s: its layers' expressions match %d other parameters, which stay as they are: %s", key, len(others), shown
        )


def tell_of_nothing(key: str, rule: Rule, keep_G: Tensor, last: bool) -> None:
    """Warn that a sparsity is less than one of the rule's groups, where its last event prunes nothing."""
    sparsity = rule.target.last_sparsity
    if last and rule.mode == "prune" and sparsity and int(keep_G.count_nonzero()) == keep_G.numel():
        logger.warning(
            "%s: nothing is pruned: target.sparsity %g of %d groups is less than one, or limits keep them all",
            *(key, sparsity, keep_G.numel()),
        )


def tell_of_whole_epochs(key: str, times: Timeline) -> None:
    """Warn that events at fractions of epochs wait for whole ones, for want of the number of steps."""
    if times.fractional and times.counts == "epoch":
        logger.warning(
            "%s: its events at fractions of epochs wait for whole epochs: how many steps an epoch has is not known. "
            "Give pruner.on_train_begin(dataloader), or steps_per_epoch",
            key,
        )


def warn_of_idle(rules: Iterable[ActiveRule]) -> None:
    """Warn of rules that never had an event; most often the loop counts epochs where they count steps, or none."""
    calls = {"epoch": "prune(model, epoch) counts epochs", "step": "the optimizer's steps are counted"}
    for one in rules:
        began = one.state.event > 0 or one.state.waiting is not None
        if one.rule.aims and one.rule.mode == "prune" and not began and one.works:
            logger.warning(
                "%s: it never pruned: its first event is in %s %d (%s)",
                *(one.key, one.times.counts, one.times.first, calls[one.times.counts]),
            )


def warn_of_waiting(rules: Iterable[ActiveRule]) -> None:
    """Warn of events that waited for gradients to the end of a training."""
    for one in rules:
        if one.state.waiting is not None and one.works:
            logger.warning(
                "%s: its event in %s %d waited for gradients, and none came: nothing is pruned",
                *(one.key, one.times.counts, one.state.waiting),
            )
