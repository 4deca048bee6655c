"""Pruning: what a user's training loop talks to. Each method delegates to a module of the session."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruningawaretraining.checkpoint.records import describe_with, note
from pruningawaretraining.config.dialects.intel_update import updated
from pruningawaretraining.config.load import load_config
from pruningawaretraining.config.recovery import teaching_of, tell_of_the_loop
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.engine.books import tensors_of
from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.engine.engine import Engine
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.masks.averages import copy_in
from pruningawaretraining.models.calling import ForwardFn, outside_inference, unwrap
from pruningawaretraining.models.copies import watch_copies
from pruningawaretraining.models.fake_quant import without_zero
from pruningawaretraining.models.wrappers import watch_wrappers
from pruningawaretraining.session.arguments import (
    Given,
    check_found_by_parameter,
    check_given,
    check_prunable,
    followers_of,
    given_averages,
    nothing,
    nothing_of,
    optimizers_of,
    weak_call,
)
from pruningawaretraining.session.bound import NoChannels
from pruningawaretraining.session.companions import Companions
from pruningawaretraining.session.connections import Connections
from pruningawaretraining.session.forgotten import Shapes, shapes_of, tell_of_tensors, wrappers_around
from pruningawaretraining.session.gathering import copy_whole
from pruningawaretraining.session.loop_hooks import Log, LoopHooks
from pruningawaretraining.session.members import Member
from pruningawaretraining.session.reporting import Macs, description_of, tell_of_copies, tell_of_fading, tell_of_masked
from pruningawaretraining.session.results import Results
from pruningawaretraining.session.resume import load_session, session_state
from pruningawaretraining.session.session import Session
from pruningawaretraining.session.takeover import leave_to, take_over

logger = logging.getLogger(__name__)

Source = str | Path | Mapping[str, Any] | PruningConfig

__all__ = ["Log", "Macs", "NoChannels", "Pruning", "Source"]


class Pruning(LoopHooks, Companions, Connections, Results):
    """Prunes a model while it trains.

    Args:
        model: the model; it may be wrapped by DataParallel or torch.compile. With the config alone, as in
            ``Pruning("config.yaml")``, the model is assigned later: ``pruner.model = model``.
        config: a path to a .json, .yaml or .yml file, a folder that holds ``pruning_config.*``, a dict, or a
            ``PruningConfig``. The user's file is only read.
        forward_fn: how to run the model on example inputs, if not as ``model(*inputs)``: ``model.forward`` itself, or a
            function of ``(model, inputs)`` or ``(inputs)``.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs. Without it the config's
            shapes are used, and without those the first forward pass of the model shows them.
        optimizer: the optimizer, or several; masks and regularisers then act by themselves in every step, and removal
            keeps its state. Without it the optimizer is found at its first step.
        ema: a moving average of the model (``AveragedModel``, a copy, or an object that has one as ``.ema`` or
            ``.module``), or several; sliced as the model is.
        teacher: a module for :meth:`distill_loss`; without it a config with ``distillation`` makes a frozen copy of the
            model, before anything is pruned.

    Attributes:
        before_removal: a function without arguments that you may set: called right before channels are removed,
            when the model is masked as it will be removed.
        after_removal: likewise, called after channels have been removed from the model, optimizers and averages.
        on_member: a function of a ``Member`` that you may set: called when a member of a family is finished, before
            pruning continues with the next one, and at the end of the training.

    Raises:
        ValueError: a configuration, layer, target or input that cannot be used; one line names it.
    """

    def __init__(
        self,
        model: nn.Module | Source | None = None,
        config: Source | None = None,
        forward_fn: ForwardFn | None = None,
        *,
        example_inputs: Any = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        ema: Any = None,
        teacher: nn.Module | None = None,
    ) -> None:
        if config is None and not isinstance(model, nn.Module):
            model, config = None, model
        if config is None:
            raise ConfigError("config is required. Allowed: Pruning(model, config), or Pruning(config)")
        check_given(model, teacher, example_inputs)
        optimizers = optimizers_of(optimizer)
        self._config = load_config(config)
        tell_of_the_loop(self._config)
        followers_of(ema)
        calls = (weak_call(self, name) for name in ("_before_removal", "_after_removal", "_note", "_member_done"))
        self._given = Given(forward_fn, example_inputs, given_averages(ema), teacher, *calls)
        super().__init__()
        self._described: dict[str, Any] = {}  # what save_pruned writes once this pruner is gone
        self._shapes: Shapes = {}  # of parameters before the last removal
        self._no_channels = NoChannels()
        self.before_removal: Callable[[], None] = nothing
        self.after_removal: Callable[[], None] = nothing
        self.on_member: Callable[[Member], object] = nothing_of
        if isinstance(model, nn.Module):
            self.model = model
        for one in optimizers:
            self.attach(one)

    # --- the model ----------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model; it may be assigned once where the pruner was made without one.

        Raises:
            ModelError: no model has been assigned yet, or another one is.
        """
        return self._session.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        if self._known is not None:
            self._check_same(model)
            return
        check_prunable(model)
        plain = unwrap(model)
        earlier = take_over(plain, self)
        this, last = weakref.ref(self), self._described
        try:
            self._known = Session(plain, self._config, self._given)
        except BaseException:
            leave_to(plain, earlier)
            raise
        self._copies = watch_copies(plain)
        watch_wrappers(model, *wrappers_around(plain))
        for name in without_zero(plain):
            logger.warning(
                "%s: its fake quantizer does not keep zeros: masked weights count until they are removed",
                name,
            )
        describe_with(plain, lambda: dict(last) if (pruner := this()) is None else pruner._describe_for_file())

    def _describe_for_file(self) -> dict[str, Any]:
        described = self.describe()
        tell_of_masked(self._session)
        tell_of_fading(self._session)
        return described

    def _after_removal(self) -> None:
        if self._known is not None:  # else the pruner is being made, and nobody can know of it
            self._follow_on()
            tell_of_copies(self._copies, self._known)
        self.after_removal()
        if self._known is not None and self._shapes:
            tell_of_tensors(self._known.model, self._shapes, self._steps.optimizers)

    def _before_removal(self) -> None:
        if self._known is not None:
            check_found_by_parameter(self._steps.optimizers, self.model, told=self.after_removal is not nothing)
            self._follow_forgotten()
            self._shapes = shapes_of(self.model)
        self.before_removal()

    def _member_done(self) -> None:
        if (member := self.member) is not None:
            self.on_member(member)

    def _note(self) -> None:
        if self._known is None:
            return
        self._follow_forgotten()
        self._described.update(description_of(self._known))  # the event has just applied the masks
        names = {name for masks in self._known.engine.masks for name, _ in tensors_of(masks)}
        for one in (self._known.model, *(copy_in(each, names) for each in self._known.followers)):
            note(one, dict(self._described))

    @property
    def config(self) -> PruningConfig:
        """The config as it was read."""
        return self._config if self._known is None else self._known.config

    @property
    def record(self) -> dict[str, Any] | None:
        """The description in the file that the model came from, where that was ``load_pruned``."""
        return None if self._known is None else self._known.record

    @property
    def engine(self) -> Engine:
        """The engine: rules, masks and events.

        Raises:
            ModelError: the model has not been run yet, so there are no inputs to trace it with.
        """
        if self._session.prunes_coupled:
            _ = self._session.coupled
        return self._session.engine

    @property
    def channel_pruner(self) -> CoupledGroups | NoChannels:
        """The channels, heads or blocks that can be removed; ``reset_optimizer`` is set by a removal. Without a rule
        for them, a stand-in whose flag is never set.

        Raises:
            ModelError: the model has not been run yet, so there are no inputs to trace it with.
        """
        return self._session.coupled if self._session.prunes_coupled else self._no_channels

    def remove_channels(self, channels: Mapping[str, Sequence[int]]) -> None:
        """Remove channels by their numbers, with everything that is coupled to them: ``{"conv1": [0, 3]}``.

        Args:
            channels: layer -> numbers of its output channels, counted as the layer is now.

        Raises:
            ConfigError: a layer or channel that cannot be removed; nothing has changed.
        """
        self._session.remove_channels(channels)

    def update_items_for_all_pruners(self, **items: Any) -> None:
        """Change settings of all rules before training begins.

        Args:
            items: ``start_step``, ``end_step``, ``target_sparsity``, ``pruning_frequency``, ``pattern`` ... by any of
                their names, or fields of a rule.

        Raises:
            ConfigError: an unknown key, a value that is not allowed, or training has begun.
        """
        if self._known is not None and self._known.begun:
            raise ConfigError(f"update: {', '.join(items)}: training has begun. Allowed: before it does")
        before, self._config = self.config, updated(self.config, items)
        if self._known is not None:
            self._known.change_config(self._config, distill=teaching_of(self._config) != teaching_of(before))

    def gathered(self, model: nn.Module) -> Pruning:
        """The pruned model whole on every process, after a training under ``fully_shard``: its channels are removed.

        ``pruner = pruner.gathered(build_model())``, then go on with ``pruner.model``: save it, or ``fully_shard`` it
        again with a new optimizer. Every process has to call it.

        Args:
            model: the dense model, freshly built; it becomes the pruned one.

        Returns:
            A pruner of that model, where this one stands.

        Raises:
            ModelError: the model has other parameters, or removal would change its outputs.
        """
        plain = unwrap(model)
        copy_whole(self.model, plain)
        session = self._session
        pruner = Pruning(plain, session.config, session.forward_fn, example_inputs=session.inputs)
        pruner.load_state_dict(self.state_dict())
        if session.prunes_coupled and bool((~session.coupled.keep_D).any()):
            pruner.remove()
        return pruner

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside the weights: tensors and plain data.

        Phase and position of every rule, masks, what has been removed, what criteria have gathered, random generators,
        and the inputs where the model itself has shown them.
        """
        return session_state(self._session)

    def load_state_dict(self, state: Mapping[str, Any], generators: bool = False) -> None:
        """Bring a freshly built dense model to a checkpoint's architecture and masks; load the weights after it.

        The same state may be loaded again, or a later one.

        Args:
            state: of :meth:`state_dict`.
            generators: whether the random generators of PyTorch, NumPy and Python go back to where they were, so that a
                resumed run ends like an uninterrupted one; they belong to the whole program.

        Raises:
            CheckpointError: the state is damaged, or of another model, or this model has lost channels that it still
                has; model, optimizers and masks are as they were.
        """
        with outside_inference():
            load_session(self._session, state, generators)
