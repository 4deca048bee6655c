"""Optimizers and learning rate schedules by their torch names."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from pruningawaretraining.errors import ConfigError, unknown
from pruningawaretraining.experiment.schema import ExperimentConfig, OptimizerConfig, SchedulerConfig

Scheduler = lr_scheduler.LRScheduler | lr_scheduler.ReduceLROnPlateau


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a config over all parameters of the model.

    Raises:
        ConfigError: a keyword argument that the optimizer does not take, or a value that it refuses.
    """
    kind = getattr(torch.optim, config.name)
    _check_keywords(kind, config.kwargs, f"optimizer.kwargs ({config.name})")
    try:
        optimizer: torch.optim.Optimizer = kind(model.parameters(), lr=config.lr, **config.kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {config.name} refuses {_given(config.lr, config.kwargs)}: {error}") from error
    return optimizer


def check_scheduler(config: ExperimentConfig) -> None:
    """Refuse a schedule that does not last as long as the training, before the training.

    Raises:
        ConfigError: a step of it fails.
    """
    scheduler = build_scheduler(config, build_optimizer(config.optimizer, nn.Linear(1, 1)))
    if scheduler is None or config.scheduler is None:
        return
    for epoch in range(config.epochs):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no step of the optimizer came before
                step_scheduler(scheduler, 0.0)
        except (ValueError, RuntimeError, ZeroDivisionError, IndexError) as error:
            raise ConfigError(
                f"scheduler.kwargs: {config.scheduler.name} fails after epoch {epoch} of {config.epochs}: {error}"
            ) from error


def build_scheduler(config: ExperimentConfig, optimizer: torch.optim.Optimizer) -> Scheduler | None:
    """The learning rate schedule of an experiment, to be stepped after every epoch; None without one, or with rates.

    Lengths that the user left open (T_max, total_steps, total_iters of a polynomial) span the epochs after warm-up.

    Raises:
        ConfigError: a keyword argument that the schedule does not take, lacks or refuses.
    """
    if config.scheduler is None or config.rates:
        return None
    spec = config.scheduler
    spec_kwargs = {**_spans(spec, max(1, config.epochs - spec.warmup)), **spec.kwargs}
    kind = getattr(lr_scheduler, spec.name)
    _check_keywords(kind, spec.kwargs, f"scheduler.kwargs ({spec.name})")
    try:
        main: Scheduler = kind(optimizer, **spec_kwargs)
        if not spec.warmup:
            return main
        if isinstance(main, lr_scheduler.ReduceLROnPlateau):
            raise ConfigError("scheduler.warmup: ReduceLROnPlateau cannot follow a warm-up. Allowed: 0")
        start = lr_scheduler.LinearLR(optimizer, 1 / (spec.warmup + 1), total_iters=spec.warmup)
        return lr_scheduler.SequentialLR(optimizer, [start, main], [spec.warmup])
    except (TypeError, ValueError) as error:
        raise (
            error
            if isinstance(error, ConfigError)
            else ConfigError(f"scheduler: {spec.name} refuses {_given(None, spec.kwargs)}: {error}")
        ) from error


def step_scheduler(scheduler: Scheduler | None, loss: float) -> None:
    """After an epoch whose mean training loss was ``loss``."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(loss)
    elif scheduler is not None:
        scheduler.step()


def _spans(spec: SchedulerConfig, epochs: int) -> dict[str, Any]:
    """The lengths that a schedule has by default."""
    lengths: dict[str, dict[str, Any]] = {
        "CosineAnnealingLR": {"T_max": epochs},
        "OneCycleLR": {"total_steps": epochs + 1},
        "PolynomialLR": {"total_iters": epochs},
        "LinearLR": {"total_iters": epochs},
    }
    return lengths.get(spec.name, {})


def _check_keywords(kind: Any, given: Mapping[str, Any], where: str) -> None:
    parameters = inspect.signature(kind).parameters
    allowed = [name for name in parameters if name not in ("self", "params", "optimizer", "lr", "last_epoch")]
    for key in given:
        if key not in allowed:
            raise ConfigError(unknown(f"{where}.{key}", key, allowed))


def _given(lr: float | None, kwargs: Mapping[str, Any]) -> str:
    values = {**({} if lr is None else {"lr": lr}), **kwargs}
    return ", ".join(f"{key}={value!r}" for key, value in values.items()) or "no arguments"
