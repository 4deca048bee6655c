"""Results of a session: phase, sparsity, MACs, masks, and the rows of a report.

Shape suffixes: ``_G1`` groups and one more for "outside".
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pruningawaretraining.costs.macs import count_macs
from pruningawaretraining.engine.nested import masked_weights
from pruningawaretraining.models.copies import CopyWatch
from pruningawaretraining.models.example_inputs import batch_of
from pruningawaretraining.report.summary import Report, not_removed
from pruningawaretraining.session.continuing import channels_of, goals_of
from pruningawaretraining.session.report_rows import layer_rows, plain_rows, set_rows
from pruningawaretraining.session.session import Session
from pruningawaretraining.session.variables import paths_to

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass on the example inputs: of the dense model, and of what is kept."""

    dense: int
    kept: int

    @property
    def fraction(self) -> float:
        return self.kept / self.dense if self.dense else 1.0


def phase_of(session: Session) -> str:
    """See :attr:`pruningawaretraining.Pruning.phase`."""
    if session.ended:
        return "done"
    unknown = session.engine.coupled is None and (session.rules.coupled or not session.rules.weights)
    if unknown and session.active and not session.loaded_pruned:
        return "regularize"
    if not session.engine.rules:
        return "finetune"
    return session.engine.phase


def sparsity_of(session: Session) -> float:
    """Fraction of all groups that are masked or removed; of those that a loaded file has lost as well."""
    counts: list[tuple[int, float]] = []
    for domain in session.engine.domains:
        groups, masked = domain.groups
        gone: float = masked
        if domain is session.engine.coupled and session.record:
            dense, here = channels_of(session.engine.coupled, None, session.record)
            groups, gone = round(groups * dense / here), masked + groups * (dense - here) / here
        counts.append((groups, gone))
    total = sum(groups for groups, _ in counts)
    return sum(gone for _, gone in counts) / total if total else 0.0


def macs_of(session: Session) -> Macs:
    """See :attr:`pruningawaretraining.Pruning.macs`."""
    coupled = session.engine.coupled
    if coupled is None:
        counted = _plain_macs(session).get("", 0)
        return Macs(counted, counted)
    dense = int(session.record["macs"]) if session.record else int(coupled.macs_cost.dense)
    if coupled.masks.active or not coupled.removed:
        return Macs(dense, round(coupled.macs_cost(coupled.keep_D)))
    with session.engine.paused():
        return Macs(dense, count_macs(session.model, session.inputs, session.forward_fn))


def _plain_macs(session: Session) -> dict[str, int]:
    return session.counted.per_layer(session.model, session.inputs, session.forward_fn)


def masks_of(session: Session) -> dict[str, Tensor]:
    """See :attr:`pruningawaretraining.Pruning.masks`."""
    return {name: keep_G for domain in session.engine.domains for name, keep_G in domain.keep_masks().items()}


def norms_of(session: Session) -> dict[str, Tensor]:
    """See :meth:`pruningawaretraining.Pruning.norms`."""
    _need_coupled(session)
    return {name: norms_G for domain in session.engine.domains for name, norms_G in domain.norms().items()}


def _need_coupled(session: Session) -> None:
    """Find the removable groups, unless all rules are inside layers."""
    if session.rules.coupled or not session.rules.weights:
        _ = session.coupled


def sets_of(session: Session) -> list[dict[str, Any]]:
    """See :meth:`pruningawaretraining.Pruning.describe_sets`."""
    _need_coupled(session)
    coupled, weights = session.engine.coupled, session.engine.weights
    rows = [] if coupled is None else set_rows(coupled)
    rows += [] if weights is None else weights.describe_sets()
    return [{"number": number, **row} for number, row in enumerate(rows, start=1)]


def report_of(session: Session) -> Report:
    """See :meth:`pruningawaretraining.Pruning.report`."""
    _need_coupled(session)
    macs, coupled, weights = macs_of(session), session.engine.coupled, session.engine.weights
    dense_parameters = kept_parameters = sum(parameter.numel() for parameter in session.model.parameters())
    if coupled is not None:
        kept_parameters = round(coupled.parameters_cost(coupled.keep_D))
        dense_parameters = int(session.record["parameters"]) if session.record else coupled.dense_parameters
    if weights is not None:
        kept_parameters -= masked_weights(weights.rules)
    counts = {"dense": dense_parameters, "kept": kept_parameters}
    return Report(
        phase=phase_of(session),
        sparsity=sparsity_of(session),
        macs={"dense": macs.dense, "kept": macs.kept, "fraction": macs.fraction},
        parameters={**counts, "fraction": kept_parameters / max(dense_parameters, 1)},
        layers=plain_rows(session.model, _plain_macs(session)) if coupled is None else layer_rows(coupled),
        groups=sets_of(session),
        batch=batch_of(session.inputs),
        masked=masked_of(session),
        latency=latency_of(session),
    )


def latency_of(session: Session) -> dict[str, Any] | None:
    """The last event of a latency target, or None."""
    events = [event for one in session.engine.rules for event in one.state.latencies]
    return max(events, key=lambda event: int(event["at"]), default=None)


def masked_of(session: Session) -> int:
    """How many channels, or heads or blocks, are masked and still in the model."""
    coupled = session.engine.coupled
    if coupled is None or not coupled.masks.active:
        return 0
    keep_G = coupled.keep_D[coupled.live_D]
    return sum(int((~keep_G[one.start : one.stop]).sum()) * one.width for one in coupled.found.grouping.sets)


def tell_of_masked(session: Session) -> None:
    """Warn of channels that are masked and not removed: a file of the model is as large as a dense one's."""
    masked = masked_of(session)
    if masked:
        logger.warning("%s", not_removed(masked))


def tell_of_fading(session: Session) -> None:
    """Warn of rules that have had their last event, and whose masks are not all in force."""
    for one in session.engine.rules:
        if one.pending and one.state.phase == "finetune":
            logger.warning(
                "%s: the masks of its last event are not all in force yet: sparsity %.4f so far. on_train_end() puts "
                "them in force",
                *(one.key, sparsity_of(session)),
            )


def description_of(session: Session) -> dict[str, Any]:
    """Everything that ``save_pruned`` writes beside the tensors: phase, sparsity, MACs, parameters and widths."""
    if not session.engine.domains:
        return dict(session.record or {})
    report = report_of(session)
    sizes = {name: int(size) for name, (size, _) in ((session.record or {}).get("groups") or {}).items()}
    rules = [(one.key, one.rule) for one in (*session.rules.coupled, *session.rules.weights)]
    over = [one.key for one in session.engine.rules if one.state.phase == "finetune" and not one.pending]
    met = {key: key not in session.unmet for key in over}
    return {
        "phase": report.phase,
        "sparsity": report.sparsity,
        "macs": report.macs["dense"],
        "kept_macs": report.macs["kept"],
        "parameters": report.parameters["dense"],
        "groups": {
            row["source"]: [max(sizes.get(row["source"], 0), row["size"]), row["kept"]] for row in report.groups
        },
        "elements": [] if session.engine.weights is None else session.engine.weights.finished,
        "rules": goals_of(rules, met),
    }


def tell_of_copies(copies: CopyWatch, session: Session) -> None:
    """Warn of copies of the model that a removal has left behind: one of them may be a forgotten average."""
    teacher = None if session.distiller is None else session.distiller.teacher
    left = [one for one in copies.unlike(session.model) if one is not teacher]
    if left:
        ways = paths_to(left, session.model)
        averages = ", ".join(ways[id(one)] for one in left if id(one) in ways) or "average"
        logger.warning(
            "%d %s of the model made since the pruner %s all channels still. If one is a moving average, it follows no "
            "more; give it before the removal, when both are made: pruner.attach_ema(%s)",
            *(len(left), *(("copy", "has") if len(left) == 1 else ("copies", "have")), _listed(averages)),
        )


def _listed(averages: str) -> str:
    return f"[{averages}]" if ", " in averages else averages
