"""Learning rates once pruning is over: a schedule that goes back, and is run to its end in the epochs that are left.

Renda et al. 2020 rewind the learning rate to that of an earlier epoch and train on from there; with ``to=0`` the
schedule restarts. Epochs may be fractions everywhere.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import lr_scheduler

from pruningawaretraining.errors import ConfigError

ROUNDING = 1e-9


def rewound(epoch: float, began: float, epochs: float, end: float, to: float | None = None) -> float:
    """The epoch of a schedule that belongs to an epoch of the training.

    Args:
        epoch: of the training.
        began: epoch at which pruning was over; before it, both are the same.
        epochs: of the whole training.
        end: epochs that the schedule was made for.
        to: epoch of the schedule to which ``began`` goes back; None for none, so that the rest of the schedule is only
            stretched over the epochs that are left.
    """
    if epoch < began:
        return epoch
    start = began if to is None else to
    part = min((epoch - began) / (epochs - began), 1.0) if epochs > began else 1.0
    return start + part * (end - start)


def warm_up(epoch: float, began: float, warmup: float) -> float:
    """The factor of a linear warm-up: 0 at ``began``, 1 from ``warmup`` epochs later on, and 1 before."""
    return min((epoch - began) / warmup, 1.0) if warmup > 0 and epoch >= began else 1.0


def course_of(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> tuple[tuple[float, ...], ...]:
    """The rates that a scheduler will give, found on a copy: neither it nor the optimizer changes.

    Args:
        optimizer: whose rates they are.
        scheduler: of ``torch.optim.lr_scheduler``, as it is before its first step; None: the rates stay as they are.
        steps: how often it will be stepped.

    Returns:
        For each step, and what is before the first, the rates of all param groups: ``steps + 1`` tuples.

    Raises:
        ConfigError: a scheduler whose rates depend on what the training comes to, or that fails before its last step.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if scheduler is None:
        return (tuple(rates),) * (steps + 1)
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        raise ConfigError("scheduler: ReduceLROnPlateau has no course that could be rewound. Allowed: another schedule")
    alike = zip(optimizer.param_groups, rates, strict=True)
    groups = [{**group, "lr": rate, "params": [torch.zeros(1)]} for group, rate in alike]
    shadow = torch.optim.SGD(groups, lr=0.0)
    copied = copy.deepcopy(scheduler, {id(optimizer): shadow})
    found = [tuple(rates)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no step of the optimizer came before
        for number in range(steps):
            try:
                copied.step()
            except (ValueError, RuntimeError, ZeroDivisionError, IndexError) as error:
                raise ConfigError(f"scheduler: {type(scheduler).__name__} fails at step {number}: {error}") from error
            found.append(tuple(float(group["lr"]) for group in shadow.param_groups))
    return tuple(found)


@dataclass(frozen=True)
class RewoundRates:
    """The learning rates of a training whose schedule goes back when pruning is over.

    Args:
        course: rates of all param groups at every step of the schedule, as :func:`course_of` gives them.
        per_epoch: steps of the schedule in an epoch.
        end: epochs that it was made for.
        began: epoch at which pruning was over; None before.
        epochs: of the whole training.
        to, warmup, peak: see :meth:`after`.
    """

    course: Sequence[Sequence[float]]
    per_epoch: int
    end: float
    began: float | None = None
    epochs: float = 0.0
    to: float | None = None
    warmup: float = 0.0
    peak: float = 1.0

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, scheduler: Any, epochs: int, per_epoch: int = 1) -> RewoundRates:
        """The rates of an optimizer and its scheduler, before the first step of both.

        Args:
            optimizer, scheduler: of the loop; see :func:`course_of`.
            epochs: that the schedule is made for.
            per_epoch: steps of the scheduler in an epoch: 1 where it is stepped after every epoch.

        Raises:
            ConfigError: as :func:`course_of`.
        """
        return cls(course_of(optimizer, scheduler, epochs * per_epoch), per_epoch, epochs, epochs=epochs)

    def after(
        self,
        began: float,
        epochs: float | None = None,
        to: float | None = 0.0,
        warmup: float = 0.0,
        peak: float = 1.0,
    ) -> RewoundRates:
        """The rates once pruning is over.

        Args:
            began: epoch at which it was.
            epochs: of the whole training from now on; None for as many as before.
            to: epoch of the schedule to go back to; 0 restarts it, None only stretches what is left of it.
            warmup: epochs over which the rate rises from 0 first.
            peak: factor of the rates from then on.

        Raises:
            ConfigError: a number that cannot be.
        """
        for name, value in (("to", to or 0.0), ("warmup", warmup)):
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name}: {value!r} is not allowed. Allowed: a number of 0 or more")
        if not 0 < peak < float("inf"):
            raise ConfigError(f"peak: {peak!r} is not allowed. Allowed: a number above 0")
        if to is not None and to >= self.end:
            raise ConfigError(f"to: {to:g} is not before the schedule's end, {self.end:g}. Allowed: an earlier epoch")
        whole = self.epochs if epochs is None else epochs
        return replace(self, began=began, epochs=whole, to=to, warmup=warmup, peak=peak)

    def at(self, epoch: float) -> tuple[float, ...]:
        """The rates of all param groups at an epoch."""
        if self.began is None or epoch < self.began:
            return self._scheduled(epoch)
        factor = self.peak * warm_up(epoch, self.began, self.warmup)
        position = rewound(epoch, self.began, self.epochs, self.end, self.to)
        return tuple(factor * rate for rate in self._scheduled(position))

    def _scheduled(self, epoch: float) -> tuple[float, ...]:
        return tuple(self.course[min(int(epoch * self.per_epoch + ROUNDING), len(self.course) - 1)])

    def apply(self, optimizer: torch.optim.Optimizer, epoch: float) -> tuple[float, ...]:
        """Give every param group its rate of an epoch; call it before a step, in place of the scheduler's."""
        rates = self.at(epoch)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return rates
