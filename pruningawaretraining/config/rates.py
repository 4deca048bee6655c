"""Learning rates of a recipe at every moment, by the arithmetic of SparseML and of CAP's fork of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pruningawaretraining.config.dialects.sparseml_keys import RateFunction, RateSchedule, SetRate
from pruningawaretraining.registry import lookup, register
from pruningawaretraining.schedules import ROUNDING


@dataclass(frozen=True)
class Cycle:
    """Where a moment lies in its cycle.

    Args:
        passed: epochs since the cycle began.
        length: epochs of the cycle.
        steps: optimizer steps of an epoch; None: infinitely many.
    """

    passed: float
    length: float
    steps: int | None

    @property
    def progress(self) -> float:
        """From 0 to 1; 1 at the last step, where steps are known."""
        if self.steps is None:
            return self.passed / self.length
        return self.passed * self.steps / max(self.length * self.steps - 1, 1)


Curve = Callable[[Cycle, RateFunction], float]


@register("rate", "linear", "cyclic_linear")
def linear(cycle: Cycle, one: RateFunction) -> float:
    """``init_lr`` to ``final_lr`` in a straight line, which the last step of the cycle reaches."""
    return one.init_lr - cycle.progress * (one.init_lr - one.final_lr)


@register("rate", "cosine")
def cosine(cycle: Cycle, one: RateFunction) -> float:
    """``final_lr + (init_lr - final_lr) (1 + cos(pi t)) / 2``, t the part of the cycle that has passed."""
    wave = 1 + math.cos(math.pi * cycle.passed / cycle.length)
    return one.final_lr + (one.init_lr - one.final_lr) * wave / 2


@register("rate", "exponential")
def exponential(cycle: Cycle, one: RateFunction) -> float:
    """``init_lr decay_rate^(epochs / decay_epochs)``, ``final_lr`` at least."""
    rate: float = one.init_lr * one.decay_rate ** (cycle.passed / one.decay_epochs)
    return max(rate, one.final_lr)


@register("rate", "step")
def step(cycle: Cycle, one: RateFunction) -> float:
    """``init_lr decay_rate^floor(epochs / decay_epochs)``, ``final_lr`` at least."""
    return max(one.init_lr * one.decay_rate ** math.floor(cycle.passed / one.decay_epochs + ROUNDING), one.final_lr)


@dataclass(frozen=True)
class LearningRates:
    """The learning rate modifiers of a recipe.

    Args:
        modifiers: in its order.
        cap: whether ``linear`` and ``cosine`` are those of CAP's version, which go in cycles; ``linear`` has its final
            rate at the last step of one. SparseML's go from start to end, which has the final rate.
    """

    modifiers: tuple[SetRate | RateFunction | RateSchedule, ...] = ()
    cap: bool = False

    def at(self, epoch: float, steps_per_epoch: int | None = None) -> float | None:
        """The learning rate at a moment.

        Args:
            epoch: epochs that have passed, with the part of the current one.
            steps_per_epoch: optimizer steps of an epoch; with it a cycle reaches its final rate at its last step.

        Returns:
            That of the modifier that has begun last, or None before the first: the optimizer's own.
        """
        begun = [one for one in self.modifiers if one.start_epoch <= epoch + ROUNDING]
        if not begun:
            return None
        last = max(enumerate(begun), key=lambda pair: (pair[1].start_epoch, pair[0]))[1]
        if isinstance(last, SetRate):
            return last.learning_rate
        if isinstance(last, RateSchedule):
            return _scheduled(last, epoch)
        in_cycles = self.cap or last.lr_func not in WHOLE
        return _along(last, epoch, steps_per_epoch) if in_cycles else _whole(last, epoch)

    def apply(self, optimizer: Any, epoch: float, steps_per_epoch: int | None = None) -> float | None:
        """Give every parameter group of an optimizer the rate of a moment, if there is one; returns it."""
        rate = self.at(epoch, steps_per_epoch)
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rate


WHOLE = ("linear", "cosine")
"""lr_func that SparseML has without cycles."""


def _whole(one: RateFunction, epoch: float) -> float:
    """The rate in one course from start to end."""
    curve: Curve = lookup("rate", one.lr_func)
    start = max(one.start_epoch, 0.0)
    length = one.end_epoch - start
    if epoch >= one.end_epoch - ROUNDING or length <= 0:
        return one.final_lr
    return curve(Cycle(max(epoch - start, 0.0), length, None), one)


def _along(one: RateFunction, epoch: float, steps: int | None) -> float:
    curve: Curve = lookup("rate", one.lr_func)
    start = max(one.start_epoch, 0.0)
    whole = max(one.end_epoch - start, 0.0)
    length = _cycle_length(one, whole)
    if epoch >= one.end_epoch - ROUNDING:  # the rate of its last step
        cycles = max(math.ceil(whole / length - ROUNDING) - 1, 0) if length else 0
        last = Cycle(length - 1 / steps if steps else length, length, steps) if length else None
        return (curve(last, one) if last is not None else one.final_lr) * one.cycle_mul**cycles
    passed = max(epoch - start, 0.0)
    number = math.floor(passed / length + ROUNDING)
    within, size = passed - number * length, length
    complete = math.floor(whole / length + ROUNDING) * length
    if passed > complete + ROUNDING:  # in the last, incomplete cycle
        rest = whole - complete
        within, size = (math.fmod(passed + ROUNDING, rest), rest) if one.lr_func == "cyclic_linear" else (rest, length)
    within = max(within, 0.0)
    return curve(Cycle(within, size, steps), one) * _warm(one, within, steps) * one.cycle_mul**number


def _cycle_length(one: RateFunction, whole: float) -> float:
    """Epochs of a cycle."""
    if one.cycle_epochs is None or one.cycle_epochs == -1:
        return min(1.0, whole) if one.lr_func == "cyclic_linear" else whole
    return one.cycle_epochs


def _warm(one: RateFunction, passed: float, steps: int | None) -> float:
    """The factor of a warm-up inside a cycle."""
    epochs = one.warmup or one.cycle_warmup
    if not epochs:
        return 1.0
    return min(passed * steps / max(epochs * steps, 1.0) if steps else passed / epochs, 1.0)


def _scheduled(one: RateSchedule, epoch: float) -> float:
    options = one.lr_kwargs
    start = max(one.start_epoch, 0.0)
    end = epoch if one.end_epoch < 0 else min(epoch, one.end_epoch)
    passed, gamma = max(end - start, 0.0), float(options.get("gamma", 0.1))
    if one.lr_class == "MultiStepLR":
        decays = sum(mile <= end + ROUNDING for mile in options.get("milestones", ()))
        return float(one.init_lr * gamma**decays)
    if one.lr_class == "CosineAnnealingWarmRestarts":
        least, length = float(options.get("lr_min", 0.0)), float(options.get("cycle_epochs", 1.0))
        return least + (one.init_lr - least) * (1 + math.cos(math.pi * math.fmod(passed, length) / length)) / 2
    size = float(options.get("step_size", 1.0)) if one.lr_class == "StepLR" else 1.0
    rate: float = one.init_lr * gamma ** math.floor(passed / size + ROUNDING)
    return rate
