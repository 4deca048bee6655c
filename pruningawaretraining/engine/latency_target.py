"""A latency to reach: predicted for any masks by a fitted cost, measured on copies of the model for some.

Shape suffixes: ``_D`` groups of the dense model, ``_A`` anchors.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.allocation.goals import UNUSED
from pruningawaretraining.costs.latency.layer_shapes import layer_shapes
from pruningawaretraining.costs.latency.meter import Meter
from pruningawaretraining.costs.latency.model import LatencyCost
from pruningawaretraining.costs.macs import LinearCost
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.masks.pruned_copy import bare_copy, pruned_copy
from pruningawaretraining.models.calling import ForwardFn, tensors_of
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.report.summary import latency_text
from pruningawaretraining.runtimes.runtime import Model

logger = logging.getLogger(__name__)

ANCHORS = (0.5, 0.25)  # widths of the copies that are measured at first, beside the dense model and one of mixed widths
ROUNDED = 8
NOISY = (
    "latency: %.4g ms measured, with 95%% confidence %.4g to %.4g ms: the machine is too noisy to promise milliseconds "
    "(turns of the dense model spread by %.0f%%). The masks are chosen by the tables, which predict %.4g ms. Allowed: "
    "a quiet machine, or a target of MACs"
)

UNDERCUT = (
    "%s: the target is undercut: %.4g ms measured, %.4g ms asked for (%.1f%% less). No other choice of groups that "
    "was tried comes closer. Allowed: another target, or a pattern and a multiple of finer steps"
)
MISSED = (
    "%s: the target is missed: %.4g ms measured, %.4g ms asked for. Other work on the machine disturbs measurements: "
    "compare once more with pat latency, or lower the target"
)


@dataclass(frozen=True)
class LatencyReached:
    """A prediction and the measurement after it.

    Attributes:
        predicted_ms: of the masked model's removed copy, before it was measured.
        measured_ms: what it took.
        dense_ms: what the dense model took.
        budget_ms: the target, or None where the event had none yet.
        low_ms, high_ms: the 95% confidence interval of ``measured_ms``.
        spread: of the dense model's turns, from the 10th to the 90th percentile, as a fraction of their median.
        is_noisy: whether that interval is too wide for the measurement to decide anything.
    """

    predicted_ms: float
    measured_ms: float
    dense_ms: float
    budget_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    spread: float | None = None
    is_noisy: bool = False


class LatencyTarget:
    """The latency of one model on one runtime: predicted for any mask, measured for some.

    Args:
        model: dense; it is copied.
        found: its channels.
        macs: its MACs.
        inputs, forward_fn: how to run it.
        meter: measures.
    """

    def __init__(
        self,
        model: nn.Module,
        found: ChannelGroups,
        macs: LinearCost,
        inputs: Any,
        forward_fn: ForwardFn | None,
        meter: Meter,
    ) -> None:
        if forward_fn is not None:
            raise ConfigError(
                "target.latency: a model that is called through a forward_fn cannot be handed to a runtime. Allowed: "
                "example_inputs that the model takes itself"
            )
        self.meter, self.inputs = meter, meter.inputs(inputs)
        dense = bare_copy(model)  # runs where the model does; copies wait on the CPU until the runtime takes them
        shapes = layer_shapes(dense, self.inputs, macs.names)
        dense.to("cpu")
        self.cost = LatencyCost(found.grouping, macs, shapes, meter.tables(shapes))
        keeps_A = _anchors(found)

        def measure() -> list[float]:
            copies = {str(n): (pruned_copy(model, found, keep, "cpu"), self.inputs) for n, keep in enumerate(keeps_A)}
            return list(meter.milliseconds(copies).values())

        ms_A = meter.remembered({"model": _signature(dense, self.inputs), "anchors": len(keeps_A)}, measure)
        self.dense_ms = ms_A[0]
        self.cost.anchor(keeps_A, ms_A)
        self._dense: Model = meter.ready(dense, self.inputs)

    def measure(self, keep_D: Tensor, copied: nn.Module, budget: float | None = None) -> LatencyReached:
        """Measure a copy beside the dense model, and let predictions follow.

        Args:
            keep_D: its masks.
            copied: the copy, without what is masked.
            budget: what was aimed at.
        """
        predicted = self.cost(keep_D)
        ratio = self.meter.ratio((self._dense, self.inputs), (copied, self.inputs))
        scale = self.dense_ms  # of the first measurement
        measured, low, high = scale * ratio.value, scale * ratio.low, scale * ratio.high
        if ratio.is_noisy:
            logger.warning(NOISY, measured, low, high, 100 * ratio.spread, predicted)
        else:
            self.cost.correct(keep_D, measured)
        found = LatencyReached(predicted, measured, scale, budget, low, high, ratio.spread, ratio.is_noisy)
        logger.info("%s; %.4g ms predicted", latency_text(vars(found)), predicted)
        return found


def _anchors(found: ChannelGroups) -> list[Tensor]:
    """Masks of the copies that are measured at first: round widths, as pruned models should have."""
    generator = torch.Generator().manual_seed(0)
    grouping = found.grouping
    keeps = [torch.ones(grouping.size, dtype=torch.bool) for _ in range(len(ANCHORS) + 2)]
    for one in grouping.sets:
        mixed = 0.2 + 0.8 * float(torch.rand(1, generator=generator))
        for keep_D, fraction in zip(keeps[1:], (*ANCHORS, mixed), strict=True):
            rounded = min(ROUNDED, max(one.size // 4, 1))
            kept = max(max(round(one.size * fraction / rounded), 1) * rounded, one.least)
            keep_D[one.start + min(kept, one.size) : one.stop] = False
    return keeps


def _signature(model: nn.Module, inputs: Any) -> str:
    """Everything that decides how long a model takes: its structure and its inputs."""
    shapes = [(name, list(one.shape), str(one.dtype)) for name, one in model.state_dict().items()]
    given = [(list(one.shape), str(one.dtype)) for one in tensors_of(inputs)]
    text = json.dumps([str(model), shapes, given])
    return f"{type(model).__name__} {hashlib.sha256(text.encode()).hexdigest()}"


def say_undercut(key: str, reached: LatencyReached) -> None:
    """Warn of a model that is much faster than was asked for: channels may have gone that could have stayed."""
    assert reached.budget_ms is not None
    unused = 1 - reached.measured_ms / reached.budget_ms
    if unused > UNUSED:
        logger.warning(UNDERCUT, key, reached.measured_ms, reached.budget_ms, 100 * unused)


def say_missed(key: str, reached: LatencyReached, why: str = "") -> None:
    """Warn of a model that is slower than was asked for.

    Args:
        key: of the target.
        reached: the measurement.
        why: what follows the message, if anything.
    """
    logger.warning(MISSED + "%s", key, reached.measured_ms, reached.budget_ms, why)
