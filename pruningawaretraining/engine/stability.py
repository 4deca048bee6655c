"""Rules that begin to prune once their decisions are stable: the masks of successive looks agree.

Shape suffixes: ``_G`` groups of one rule.

After one-cycle structured pruning with stability-driven search (OCSPruner, Ghimire et al. 2025): pruning too early
follows noise, too late wastes training, and the moment differs from one training to the next.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import Tensor

from pruningawaretraining.criteria.second_order import Calibration
from pruningawaretraining.distributed.collectives import agreed
from pruningawaretraining.engine.domain import Domain
from pruningawaretraining.engine.rule import ActiveRule

logger = logging.getLogger(__name__)


def agreement(one_G: Tensor, other_G: Tensor) -> float:
    """Intersection over union of two masks: of what goes and of what stays, the smaller of the two; 1 where equal."""
    return min(_overlap(one_G, other_G), _overlap(~one_G, ~other_G))


def _overlap(one_G: Tensor, other_G: Tensor) -> float:
    union = int((one_G | other_G).sum())
    return int((one_G & other_G).sum()) / union if union else 1.0


def opens(domain: Domain, one: ActiveRule, now: int, calibration: Calibration | None) -> bool:
    """Whether a rule that waits for stable masks begins to prune at ``now``; the model stays as it is.

    Args:
        domain: of the rule.
        one: the rule.
        now: the epoch or step of the look.
        calibration: data of the criterion's own, if it was given any.
    """
    before = replace(one.state)
    decision = domain.decide(one, one.times.last, calibration, trial=True)
    one.state = before
    (keep_G,) = agreed(decision.keep_G.cpu())
    agree = None if before.would is None else agreement(before.would, keep_G)
    where = f"{one.key}: {one.times.counts} {now}"
    if agree is not None and agree >= (one.rule.stable or 0.0):
        logger.info("%s: masks agree by %.4f with those of the look before: pruning begins", where, agree)
    elif one.is_last(now):
        logger.warning("%s: masks have not become stable by 'end': everything is pruned at once", where)
    else:
        logger.info("%s: masks agree by %s with those of the look before", where, agree and f"{agree:.4f}")
        one.state.would, one.state.last = keep_G, now
        return False
    one.state.opened, one.state.would = now, None
    return True
