"""Pruning: the facade and its hooks."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.checkpoint.records import describe_with, record_of
from pruningawaretraining.config.dialects.intel_update import updated
from pruningawaretraining.config.load import load_config
from pruningawaretraining.config.schema import Distillation, PruningConfig, Rule
from pruningawaretraining.costs.macs import count_macs
from pruningawaretraining.criteria.second_order import Calibration
from pruningawaretraining.criteria.second_order.gradients import LossFn
from pruningawaretraining.distributed.ddp import outdated, rewrapped
from pruningawaretraining.distributed.fsdp import any_sharded, check_plan, full_of, reshard
from pruningawaretraining.engine.channel_pruner import ChannelPruner, RemovalContext
from pruningawaretraining.engine.channel_rules import PHASES, ChannelRule
from pruningawaretraining.engine.element_pruner import ElementPruner
from pruningawaretraining.engine.element_rules import ElementPattern, ElementRule
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.masks.dry_run import removable_blocks, removable_channels
from pruningawaretraining.masks.penalties import Regularizer
from pruningawaretraining.models.calling import ForwardFn, beside, from_shapes, tensors_of, unwrap
from pruningawaretraining.models.example_inputs import Example, as_inputs, one_example
from pruningawaretraining.models.exported_graph import ExportedGraph, is_exported
from pruningawaretraining.models.fake_quant import without_zero
from pruningawaretraining.models.optimizer_state import clear_state
from pruningawaretraining.patterns.channel import StructuredPattern
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.channel_labels import producer_names
from pruningawaretraining.patterns.depth import Depth, check_alone, check_rule
from pruningawaretraining.patterns.stacking import check_stacking
from pruningawaretraining.registry import build
from pruningawaretraining.report.summary import Report
from pruningawaretraining.session.arguments import check_inputs, check_model, epoch_of, followers_of, optimizers_of
from pruningawaretraining.session.distillation import Distiller
from pruningawaretraining.session.optimizer_hooks import Steps
from pruningawaretraining.session.reporting import CountedMacs, layer_rows, plain_rows, set_rows
from pruningawaretraining.session.state import (
    VERSION,
    all_or_nothing,
    check_version,
    plain_or_none,
    rng_state,
    set_rng_state,
)

log = logging.getLogger(__name__)

Log = Callable[[str], None] | logging.Logger
Source = str | Path | Mapping[str, Any] | PruningConfig


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass on the example inputs: of the dense model, and of what is kept."""

    dense: int
    kept: int

    @property
    def fraction(self) -> float:
        return self.kept / self.dense if self.dense else 1.0


@dataclass
class NoChannels:
    """What ``channel_pruner`` is where no rule prunes channels: loops that read the flag of a removal go on."""

    reset_optimizer: bool = False


_PRUNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Pruning]] = weakref.WeakKeyDictionary()


class Pruning:
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
        ema: a moving average of the model (``AveragedModel`` or a copy), or several; sliced as the model is.
        teacher: a module for :meth:`distill_loss`; without it a config with ``distillation`` makes a frozen copy of the
            model, before anything is pruned.

    Attributes:
        before_removal: a function of nothing, yours if you like: called when channels are about to be removed, when the
            model is masked as it will be removed.

    Raises:
        ValueError: a configuration, layer, target or input that cannot be used; one line that names it.
    """

    def __init__(
        self,
        model: nn.Module | Source | None = None,
        config: Source | None = None,
        forward_fn: ForwardFn | None = None,
        *,
        example_inputs: Any = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        ema: nn.Module | list[nn.Module] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        if config is None and not isinstance(model, nn.Module):
            model, config = None, model
        if config is None:
            raise ConfigError(f"config: {config!r} is none. Allowed: Pruning(model, config), or Pruning(config)")
        if model is not None:
            check_model(model)
        if teacher is not None:
            check_model(teacher, "teacher")
        check_inputs(example_inputs)
        optimizers = optimizers_of(optimizer)
        self.config = load_config(config)
        self._forward_fn = forward_fn
        self._penalties: list[tuple[Regularizer, Tensor]] = []
        self._followers = followers_of(ema)
        self._graphs: list[ExportedGraph] = []
        self._model: nn.Module | None = None
        self._known_steps: Steps | None = None
        self._described: dict[str, Any] = {}  # what save_pruned writes once this pruner is gone
        self._channels: ChannelPruner | None = None
        self._elements: ElementPruner | None = None
        self._counted = CountedMacs()  # of a model that loses no channels
        self._channel_rules: list[tuple[str, Rule]] = []
        self._capture: Any = None
        self._calibration: tuple[Iterable[Any], LossFn] | None = None
        self.record: dict[str, Any] | None = None
        self._example = Example(example_inputs, None)
        self._teacher = teacher
        self._distiller: Distiller | None = None
        self.before_removal: Callable[[], None] = lambda: None
        self._begun = self._ended = self._says_before = self._heard = False
        self._sharded = self._sought_shards = False
        self._no_channels = NoChannels()
        self._steps_per_epoch: int | None = None
        if isinstance(model, nn.Module):
            self.model = model
        for one in optimizers:
            self.attach(one)

    # --- construction -------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model; it may be assigned once where the pruner was made without one.

        Raises:
            ModelError: there is none yet, or another is assigned.
        """
        if self._model is None:
            raise ModelError("model: the pruner was made without one; assign it first: pruner.model = model")
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        check_model(model)
        if self._model is not None:
            self._check_same(model)
            return
        if is_exported(model):
            raise ModelError(
                f"model: {type(model).__name__} is a graph that torch.export made; its layers are gone. Give the model "
                "that it was exported from, and then the graph: pruner.follow(graph)"
            )
        if any_sharded(model):
            check_plan(model)
            raise ModelError(
                f"model: fully_shard has spread the {type(model).__name__} already, and its channels cannot be traced. "
                "Allowed: make the Pruning first, then fully_shard(model), then the optimizer"
            )
        self._model = unwrap(model)
        self._take_over()
        self._known_steps = Steps(self._model, self)
        self.record = record_of(self._model)
        self._inputs = self._first_inputs(self._inputs)
        self._make_distiller()
        self._prepare()
        for name in without_zero(self._model):
            log.warning(
                "%s: its fake quantizer does not keep zeros: what is masked has an influence until it is removed", name
            )
        this, last = weakref.ref(self), self._described
        describe_with(self._model, lambda: dict(last) if (pruner := this()) is None else pruner.describe())

    def _take_over(self) -> None:
        """Be the pruner of the model: an earlier one that has not begun yet retires, as after a notebook's second run.

        Raises:
            ModelError: the earlier one is at work.
        """
        assert self._model is not None
        known = _PRUNERS.get(self._model)
        earlier = known() if known is not None else None
        if earlier is not None and earlier.phase in ("regularize", "prune") and earlier._active:
            if earlier._begun or earlier.steps > 0:
                raise ModelError(
                    f"model: another Pruning is at work on this {type(self._model).__name__}, phase {earlier.phase!r}. "
                    "Allowed: all rules in one config, or first end the other: on_train_end()"
                )
            earlier.on_train_end()
            log.warning("model: a Pruning that was made for it before is retired: it had not begun")
        _PRUNERS[self._model] = weakref.ref(self)

    @property
    def _steps(self) -> Steps:
        if self._known_steps is None:
            self._check_same(self.model)  # says that there is none
        assert self._known_steps is not None
        return self._known_steps

    def _prepare(self) -> None:
        """Build what the rules ask for: channels once there are inputs to trace with."""
        if self._elements is not None:
            self._elements.release()
        if self._channels is not None:
            self._channels.release()
        self._channels = self._elements = None
        channels, elements = self._split()
        self._channel_rules = channels
        if elements and not self.config.infer:
            stacked = bool(channels)
            self._elements = ElementPruner(self.model, [(*one, stacked) for one in elements])
            self._check_stacking()
            self._hand_calibration()
            self._elements.adopt((self.record or {}).get("elements", ()))
        if self._inputs is not None:
            self._build()
        elif self._capture is None:
            self._capture = self.model.register_forward_pre_hook(self._see_inputs, with_kwargs=True)
        if self._elements is not None:
            self._elements.at_init(self._steps.optimizers)

    def _make_distiller(self) -> None:
        """A teacher, where the config asks for distillation or one was given; a copy of the model as it is now."""
        if self._distiller is not None:
            self._distiller.close()
            self._distiller = None
        options = self.config.distillation or (None if self._teacher is None else Distillation())
        if options is not None and not self.config.infer:
            self._distiller = Distiller(self.model, self._teacher, **options.model_dump())

    def _split(self) -> tuple[list[tuple[str, Rule]], list[tuple[str, Rule, ElementPattern]]]:
        """The rules that are enabled: those for channels, and those for what is finer."""
        channels: list[tuple[str, Rule]] = []
        elements: list[tuple[str, Rule, ElementPattern]] = []
        patterns: list[tuple[str, Any]] = []
        for number, rule in enumerate(self.config.rules):
            key = rule.name or f"rules[{number}]"
            pattern = build("pattern", rule.pattern, f"{key}.pattern")
            if not rule.enabled:
                continue
            patterns.append((key, pattern))
            check_rule(key, pattern, rule, build("criterion", rule.criterion, f"{key}.criterion"))
            if isinstance(pattern, StructuredPattern):
                channels.append((key, rule))
            elif isinstance(pattern, ElementPattern):
                elements.append((key, rule, pattern))
            else:
                raise ConfigError(f"{key}.pattern: {rule.pattern!r} cannot be trained")
        check_alone(patterns)
        return channels, elements

    def _check_stacking(self) -> None:
        assert self._elements is not None
        claims = []
        for key, rule in self._channel_rules:
            chosen = _structure(rule).chosen(self.model, rule.layers, rule.exclude, key)
            claims.append((key, "channel", sorted(chosen & set(producer_names(self.model)))))
        for one in self._elements.rules:
            claims.append((one.key, one.grouping.name, [layer.name for layer in one.grouping.sets]))
        check_stacking(claims)

    @property
    def _inputs(self) -> Any:
        return self._example.inputs

    @_inputs.setter
    def _inputs(self, inputs: Any) -> None:
        self._example = Example(inputs, self._model)

    def _first_inputs(self, given: Any) -> Any:
        if given is not None:
            return given
        if self.config.example_inputs is None:
            return None
        spec = self.config.example_inputs
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), dtype)
        return from_shapes(spec.shape, spec.container, dtype)

    def _see_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: remember one example of the first real inputs."""
        if self._inputs is None and any(True for _ in tensors_of((args, kwargs))):
            self._inputs = one_example(as_inputs(module, args, kwargs))
            self._capture.remove()

    def _build(self) -> None:
        self._inputs = beside(self.model, self._inputs)
        if not self._channel_rules or self.config.infer:
            return
        channels = self._build_channels(self._channel_rules)
        if self._loaded_pruned:
            for one in channels.rules:
                one.state.phase = "finetune"
        else:
            channels.check_targets()
        self._channels = channels
        self._count_epochs()
        self._hand_calibration()
        channels.listen()
        for one in self._channels.rules:
            if one.rule.at_init and one.rule.start <= 0 and one.state.phase == "regularize":
                self._channels.prune(one.times.first, self._surroundings())

    def _build_channels(self, rules: list[tuple[str, Rule]]) -> ChannelPruner:
        chosen = [
            (key, rule, _structure(rule).chosen(self.model, rule.layers, rule.exclude, key)) for key, rule in rules
        ]
        union = set().union(*(layers for _, _, layers in chosen))
        if any(isinstance(_structure(rule), Depth) for _, rule in rules):
            found = removable_blocks(self.model, self._inputs, union, self._forward_fn)
        else:
            found = self._removable_channels(chosen, union)
        for name, reason in found.skipped.items():
            log.info("%s stays as it is: %s", name, reason)
        return ChannelPruner(self.model, found, chosen, self._inputs, self._forward_fn)

    def _removable_channels(self, chosen: list[tuple[str, Rule, set[str]]], union: set[str]) -> ChannelGroups:
        units: dict[str, str] = {}
        for _, rule, layers in chosen:
            units |= _structure(rule).head_units(self.model, layers)
        multiples = {name: rule.multiple for _, rule, layers in chosen for name in layers}
        limit = self.config.trace_limit
        return removable_channels(self.model, self._inputs, union, self._forward_fn, multiples, units, limit)

    @property
    def channel_pruner(self) -> ChannelPruner | NoChannels:
        """The engine of the channel rules; its ``reset_optimizer`` is set by a removal. Without such a rule, a stand-in
        whose flag is never set.

        Raises:
            ModelError: the model has not been run yet, so there are no inputs to trace it with.
        """
        if self._active and self._channel_rules:
            return self.engine
        return self._no_channels

    @property
    def engine(self) -> ChannelPruner:
        """The engine of the channel rules.

        Raises:
            ModelError: there is none: nothing is enabled, or no inputs have been seen yet.
        """
        if self._channels is None and self._inputs is not None and not self.config.infer:
            self._build()
        if self._channels is None:
            idle = "no rule is enabled, or the model is loaded for inference"
            why = "the model has not been run yet; pass example_inputs=" if self._active else idle
            raise ModelError(f"pruner: there are no channel groups: {why}")
        return self._channels

    @property
    def _loaded_pruned(self) -> bool:
        """Whether the model came from a file of a run that had met its target."""
        return bool(self.record) and self.record is not None and self.record["phase"] in ("finetune", "done")

    @property
    def _active(self) -> bool:
        return not self.config.infer and any(rule.enabled for rule in self.config.rules)

    def _surroundings(self) -> RemovalContext:
        self._steps.look_around(again=self.steps == 0)  # one that has not stepped yet follows a removal all the same
        return RemovalContext(
            self._steps.optimizers, self._followers, self._graphs, self.before_removal, self._after_removal
        )

    def _after_removal(self) -> None:
        if self._elements is not None:
            self._elements.rebuild(self._steps.optimizers)
        if self.config.reset_optimizer:
            for optimizer in self._steps.optimizers:
                clear_state(optimizer)

    # --- optimizers ---------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """How many real optimizer steps there have been; reading it waits for the device."""
        return self._steps.count

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let masks and regularisers act in every step of an optimizer, and let a removal keep its state."""
        for one in optimizers_of(optimizer):
            self._steps.attach(one)

    def rewrap(self, wrapped: nn.Module) -> nn.Module:
        """The same model in a new DistributedDataParallel with the options of the old one, once channels have gone.

        ``ddp_model = pruner.rewrap(ddp_model)`` after ``pruner.prune`` costs nothing while no parameter has been
        exchanged: the given wrapper comes back. Every process has to call it.

        Args:
            wrapped: the model in its wrapper.

        Raises:
            ModelError: another model, or a wrapper whose options cannot be carried over.
        """
        self._check_same(wrapped)
        return rewrapped(wrapped) if outdated(wrapped) else wrapped

    def follow(self, graph: nn.Module) -> None:
        """Let a graph that was exported from the model, and prepared for quantization-aware training, be pruned too.

        The graph is trained and the pruner looks at the model: both have the same parameters. Masks hold in the graph,
        and a removal slices its fake quantizers as well.

        Args:
            graph: what ``torch.export.export(model, inputs).module()`` gives, prepared by a quantizer or not.

        Raises:
            ModelError: it is no such graph, was exported from another model or copied, does not run on the example
                inputs, or has a norm over channels that may be masked.
        """
        if any(known.graph is graph for known in self._graphs):
            return
        one = ExportedGraph(self.model, graph)
        if self._channel_rules and self._active:
            self.engine.spare(one)
        self._graphs.append(one)

    def on_round(self) -> None:
        """A real step begins; see :mod:`pruningawaretraining.session.optimizer_hooks`."""
        if not self._sought_shards:
            self._follow_shards()
            self._sought_shards = True
        acts = bool(self._channel_rules) and self._active and not self._ended and self._inputs is not None
        self._penalties, self._heard = self.engine.penalties() if acts else [], False
        if self._channels is not None:
            self._channels.masks.settle()

    def on_gradients(self, scale: Tensor | float, only: set[int] | None) -> None:
        """Add the regularisers to gradients that are about to be used."""
        if self._elements is not None and not self._ended:  # scores are of the loss alone, so before the penalties
            self._tell_all(self._elements.on_round(scale, self._steps.optimizers))
            self._tick_elements()
        if self._channels is not None and not self._ended and not self._heard:
            self._channels.hear(scale)
            self._heard = True
            if self._tick_channels():
                self._penalties = self._channels.penalties()
        for ready, factor_G in self._penalties:
            ready.add(factor_G * scale, only)
        if self._sharded:  # such gradients are not accumulated where they could be masked before
            self._mask_gradients()

    def on_stepped(self) -> None:
        """Weights have moved: masked ones go back to 0."""
        if self._channels is not None:
            self._channels.masks.apply()
            self._tick_channels(last=True)
        if self._elements is not None:
            self._elements.on_moved(self._steps.fresh, self._steps.rates)
            self._tick_elements(last=True)

    def _tick_elements(self, last: bool = False) -> None:
        """Let rules on weights that count steps have what is due; see :meth:`_tick_channels`."""
        steps, elements = self._steps.counts, self._elements
        if elements is not None and (len(steps) == 1 or any(one.asks(steps) for one in elements.rules)):
            now, optimizers = self._steps.count, self._steps.optimizers
            self._tell_all(elements.on_stepped(now, optimizers) if last else elements.tick("step", now, optimizers))

    def _tick_channels(self, last: bool = False) -> bool:
        """Let channel rules that count steps have what is due before the next step; true if something was. How many
        steps there have been is only asked where it matters, since the device may have to be waited for.

        Args:
            last: only the last event of a schedule, which no further step may follow.
        """
        if self._channels is None or self._ended or not self._channels.counts_steps:
            return False
        if len(steps := self._steps.counts) > 1 and not any(one.asks(steps, last) for one in self._channels.rules):
            return False
        lines = self._channels.prune(self._steps.count, self._surroundings(), "step", last)
        self._tell_all(lines)
        if lines:
            self._described.update(self.describe())
        return bool(lines)

    def _tell_all(self, lines: list[str], target: Log | None = None) -> None:
        for line in lines:
            _tell(target, line)
        if lines:
            self._begun = True

    # --- hooks of a training loop -------------------------------------------------------------------------------

    def on_train_begin(self, dataloader: Any = None) -> None:
        """Before the first epoch: from here on, settings stay as they are.

        Args:
            dataloader: the loader of the training; how many batches it has matters where events are at fractions of
                epochs.
        """
        self._check_same(self.model)
        self._begun = True
        self._steps_per_epoch = len(dataloader) if isinstance(dataloader, Sized) else None
        self._count_epochs()

    def _count_epochs(self) -> None:
        """Let rules that count in fractions of epochs know how many steps an epoch has."""
        for one in self._all_rules():
            one.times = one.rule.timeline(self._steps_per_epoch)

    def calibrate_with(self, dataloader: Iterable[Any], loss_fn: LossFn) -> None:
        """Give second-order criteria data of their own: every event of theirs then measures curvature on it and moves
        the weights that stay to where the loss rises least (OBS, CAP, FastCAP, SparseGPT; see docs/second_order.md).
        A rule's ``compensation`` is fitted on it, too.

        Args:
            dataloader: batches ``(inputs, targets)``, or mappings of keyword inputs with "labels"; the loader of the
                training, with its augmentation, as the norms are measured on it.
            loss_fn: ``(outputs, targets) -> loss``.

        Raises:
            ConfigError: the loss is no function.
        """
        if not callable(loss_fn):
            raise ConfigError(f"loss_fn: {loss_fn!r} is no function. Allowed: a function of (outputs, targets)")
        self._calibration = (dataloader, loss_fn)
        self._hand_calibration()

    def _hand_calibration(self) -> None:
        if self._calibration is None or self._model is None:
            return
        calibration = Calibration(self._model, *self._calibration)
        if self._elements is not None:
            self._elements.calibrate(calibration)
        if self._channels is not None:
            self._channels.calibrate(calibration)

    def on_epoch_begin(self, epoch: int = 0) -> None:
        """At the start of an epoch (counted from 0)."""

    def on_step_begin(self, step: int = 0) -> None:
        """At the start of a step: rules that count steps have the event that is due.

        Args:
            step: not used: loops count anew in every epoch, and the pruner counts the optimizer's real steps itself.
        """
        self._begun = True
        if self._channels is not None and self._active:
            self._tick_channels()
        if self._elements is not None and self._active and not self._ended:
            self._steps.look_around()
            self._tick_elements()

    def on_before_optimizer_step(self) -> None:
        """After backward, before clipping and the optimizer's step: regularise, and mask the gradients."""
        self._says_before = True
        self._steps.look_around()
        if not self._steps.optimizers and not self._steps.by_hand:
            self._steps.gradients_by_hand()
        self._mask_gradients()

    def _mask_gradients(self) -> None:
        if self._channels is not None:
            self._channels.masks.apply_to_gradients()
        for one in self._elements.rules if self._elements is not None else ():
            one.masks.apply_to_gradients()

    def _follow_shards(self) -> None:
        """Notice that ``fully_shard`` has exchanged the parameters."""
        if self._sharded or self._model is None or not any_sharded(self.model):
            return
        check_plan(self.model)
        if self._channel_rules and self._active:
            self.engine.rebind()
        if self._elements is not None:
            self._elements.rebind()
        self._sharded = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Optimizer steps inside the block are no training steps: some tools take one to make an optimizer's state."""
        self._steps.paused = True
        try:
            yield
        finally:
            self._steps.paused = False

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
        reshard(self.model)
        own, others = self.model.state_dict(), plain.state_dict()
        if own.keys() != others.keys():
            name = sorted(own.keys() ^ others.keys())[0]
            raise ModelError(f"model: {name!r} is in one model only. Allowed: the dense model as it was built")
        with torch.no_grad():
            for name, value in own.items():
                others[name].copy_(full_of(value))
        pruner = Pruning(plain, self.config, self._forward_fn, example_inputs=self._inputs)
        state = self.state_dict()
        pruner.load_state_dict(state)
        if pruner._channel_rules and pruner._active and not pruner.engine.keep_D.all():
            pruner.remove()
        return pruner

    def on_after_optimizer_step(self) -> None:
        """After the optimizer's step: masked weights are set to 0 again."""
        if not self._steps.optimizers and (self._steps.by_hand or not self._says_before):
            self._steps.stepped_by_hand()  # else the optimizer's own hooks have done it, or an earlier call

    def on_step_end(self) -> None:
        """At the end of a step; nothing is done then."""

    def on_epoch_end(self, epoch: int = 0) -> None:
        """At the end of an epoch."""

    def on_train_end(self) -> None:
        """After the last epoch: nothing prunes or regularises any more; masks stay."""
        if not self._ended:
            self._warn_of_idle_rules()
        if self._elements is not None and not self._ended:
            self._elements.finish(self._steps.optimizers)
        if self._channels is not None:
            self._channels.release()
        self._ended = True
        log.info("training ended: sparsity %.4f", self.sparsity)

    def _warn_of_idle_rules(self) -> None:
        """Say which rules never had an event, most often because the loop does not count what they count."""
        calls = {"epoch": "prune(model, epoch) counts epochs", "step": "the optimizer's steps are counted"}
        for one in self._all_rules():
            if one.rule.target.given and one.rule.mode == "prune" and one.state.event == 0:
                log.warning(
                    "%s: it never pruned: its first event is in %s %d (%s)",
                    *(one.key, one.times.counts, one.times.first, calls[one.times.counts]),
                )

    def _all_rules(self) -> list[ChannelRule | ElementRule]:
        """The rules that are at work."""
        channels = [] if self._channels is None else self._channels.rules
        return [*channels, *([] if self._elements is None else self._elements.rules)]

    def channel_regularize(self, model: nn.Module | None = None) -> None:
        """Add the channel regularisers to ``.grad``, in place; call it after ``loss.backward()``.

        With an optimizer attached this happens in the optimizer's step, after a gradient scaler has divided its scale
        out and once for any number of accumulated backward passes; the call then changes nothing.
        """
        self._check_same(model)
        self._steps.look_around()
        if not self._steps.optimizers:
            self._steps.gradients_by_hand()

    def slice_regularize(self, model: nn.Module | None = None) -> Tensor:
        """The penalty of the slice rules, to be added to the loss: 0 without any."""
        self._check_same(model)
        if self._elements is not None and not self._ended:
            return self._elements.penalty()
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        return torch.zeros((), device=device)

    def distill_loss(self, outputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The teacher's part of the loss, to be added to the task's: ``loss + pruner.distill_loss(outputs, inputs)``.

        Args:
            outputs: the model's for these inputs, of its last forward pass: logits, or what holds them as ``.logits``.
            args, kwargs: the inputs, for the teacher.

        Returns:
            ``weight * (logits + feature_weight * features)``; 0 without ``distillation`` or a teacher.

        Raises:
            ModelError: outputs without logits, or of another shape than the teacher's.
        """
        if self._distiller is None:
            self._check_same(self.model)
            return torch.zeros((), device=next((one.device for one in self.model.parameters()), torch.device("cpu")))
        return self._distiller.loss(outputs, *args, **kwargs)

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher of :meth:`distill_loss`, or None."""
        return None if self._distiller is None else self._distiller.teacher

    def prune(self, model: nn.Module | None = None, epoch: int = 0, log: Log | None = None) -> None:
        """Do what this epoch asks for: nothing, mask, or mask and remove.

        Args:
            model: the model given at construction (or its wrapper).
            epoch: counted from 0; an epoch fires at most once.
            log: a logger or a function of one line; told what happened.

        Raises:
            ValueError: another model, no example inputs, or a removal that would change the model's outputs.
        """
        self._check_same(model)
        epoch = epoch_of(epoch)
        if not self._active or self._ended:
            return
        self._begun = True
        self._follow_shards()
        if self._sharded:
            reshard(self.model)
        lines = self.engine.prune(epoch, self._surroundings()) if self._channel_rules else []
        self._tell_all(lines, log)
        if self._elements is not None:  # after the channels, on those that are left
            finer = self._elements.tick("epoch", epoch, self._steps.optimizers)
            self._tell_all(finer, log)
            lines = [*lines, *finer]
        self._steps.end_round()
        if lines:
            self._described.update(self.describe())

    def update_items_for_all_pruners(self, **items: Any) -> None:
        """Change settings of all rules before training begins.

        Args:
            items: ``start_step``, ``end_step``, ``target_sparsity``, ``pruning_frequency``, ``pattern`` ... by any of
                their names, or fields of a rule.

        Raises:
            ConfigError: an unknown key, a value that is not allowed, or training has begun.
        """
        if self._begun:
            raise ConfigError(f"update: {', '.join(items)}: training has begun. Allowed: before it does")
        before = self.config.distillation
        self.config = updated(self.config, items)
        if self._model is not None:
            if self.config.distillation != before:
                self._make_distiller()
            self._prepare()

    def remove(self) -> None:
        """Physically remove what is masked now, whatever the schedule says; zeros inside a weight stay there."""
        if self._elements is not None and not self._channel_rules:
            return
        self.engine.remove(self._surroundings())
        self._steps.end_round()
        self._described.update(self.describe())

    def _check_same(self, model: nn.Module | None) -> None:
        if model is not None:
            check_model(model)
        if model is not None and unwrap(model) is not self.model:
            raise ModelError(
                f"model: this {type(model).__name__} is not the {type(self.model).__name__} that the pruner was "
                "made for"
            )

    # --- what has been reached ----------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """One of "regularize" (no event yet), "prune" (target not met), "finetune" and "done" (training has ended)."""
        if self._ended:
            return "done"
        if self._elements is not None:
            ours = self._elements.phase
            return min(ours, self._channel_phase, key=PHASES.index) if self._channel_rules else ours
        return self._channel_phase

    @property
    def _channel_phase(self) -> str:
        if self._channels is None:
            return "regularize" if self._active and not self._loaded_pruned else "finetune"
        return self._channels.phase

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable groups that are masked or removed; of channels, slices ... together."""
        if self._elements is None:
            return self._channel_sparsity
        groups, gone = self._elements.groups
        if self._channels is not None:
            groups += len(self._channels.keep_D)
            gone += round(self._channel_sparsity * len(self._channels.keep_D))
        return gone / groups if groups else 0.0

    @property
    def _channel_sparsity(self) -> float:
        if self.record and self._channels is not None and not self._channels.removed:
            return max(float(self.record["sparsity"]), self._channels.sparsity)
        return self._channels.sparsity if self._channels is not None else 0.0

    @property
    def macs(self) -> Macs:
        """MACs of the dense model and of what is kept, on the example inputs; counted on a removed model."""
        engine = self._channels
        if engine is None:
            counted = self._plain_macs().get("", 0)
            return Macs(counted, counted)
        dense = int(self.record["macs"]) if self.record else int(engine.macs_cost.dense)
        if engine.masks.active or not engine.removed:
            return Macs(dense, round(engine.macs_cost(engine.keep_D)))
        with engine.deaf():
            return Macs(dense, count_macs(self.model, self._inputs, self._forward_fn))

    def _plain_macs(self) -> dict[str, int]:
        return self._counted.per_layer(self.model, self._inputs, self._forward_fn)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name -> keep mask (True = keep): of a set of channels over the dense model's, and of a weight, such as
        "conv1.weight", over its slices, blocks or entries."""
        masks = self._channels.keep_by_set() if self._channels is not None else {}
        for one in self._elements.rules if self._elements is not None else ():
            masks.update(one.masks.by_parameter())
        return masks

    def norms(self) -> dict[str, Tensor]:
        """Group name -> L2 norms of the groups that are there, on the CPU."""
        norms = self.engine.norms() if self._channel_rules else {}
        if self._elements is not None:
            norms.update(self._elements.norms())
        return norms

    def describe_groups(self) -> list[dict[str, Any]]:
        """One dict for each set of coupled layers: number, source, dependencies, size and kept groups."""
        finer = self._elements.describe_groups() if self._elements is not None else []
        channels = set_rows(self.engine) if self._channel_rules or not finer else []
        rows = [*channels, *finer]
        return [{"number": number, **row} for number, row in enumerate(rows, start=1)]

    def report(self) -> Report:
        """What has been reached: per layer, and in all; prints as a table, has ``to_dict()``."""
        macs = self.macs
        engine = None if self._elements is not None and not self._channel_rules else self.engine
        dense_parameters = kept_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        if engine is not None:
            kept_parameters = round(engine.parameters_cost(engine.keep_D))
            dense_parameters = int(self.record["parameters"]) if self.record else engine.dense_parameters
        if self._elements is not None:
            kept_parameters -= sum(one.masks.masked_weights() for one in self._elements.rules)
        counts = {"dense": dense_parameters, "kept": kept_parameters}
        return Report(
            phase=self.phase,
            sparsity=self.sparsity,
            macs={"dense": macs.dense, "kept": macs.kept, "fraction": macs.fraction},
            parameters={**counts, "fraction": kept_parameters / max(dense_parameters, 1)},
            layers=plain_rows(self.model, self._plain_macs()) if engine is None else layer_rows(engine),
            groups=self.describe_groups(),
        )

    def describe(self) -> dict[str, Any]:
        """What ``save_pruned`` writes beside the tensors: phase, sparsity, MACs, parameters and widths."""
        if self._channels is None and self._elements is None:
            return dict(self.record or {})
        report = self.report()
        return {
            "phase": report.phase,
            "sparsity": report.sparsity,
            "macs": report.macs["dense"],
            "kept_macs": report.macs["kept"],
            "parameters": report.parameters["dense"],
            "groups": {row["source"]: [row["size"], row["kept"]] for row in report.groups},
            "elements": [] if self._elements is None else self._elements.finished,
        }

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside the weights: tensors and plain data.

        Phase and position of every rule, masks, what has been removed, what criteria have gathered, random generators,
        and the inputs where the model itself has shown them.
        """
        return {
            "version": VERSION,
            "config": self.config.model_dump(mode="json"),
            "steps": self.steps,
            "ended": self._ended,
            "channels": None if self._channels is None else self._channels.state_dict(),
            "elements": None if self._elements is None else self._elements.state_dict(),
            "inputs": None if self._capture is None else plain_or_none(self._inputs),
            "distillation": None if self._distiller is None else self._distiller.state_dict(),
            "rng": rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring a freshly built dense model to a checkpoint's architecture and masks; load the weights after it.

        Random generators are put back as well. A state may be loaded again, or one that is further on.

        Raises:
            CheckpointError: the state is damaged, or of another model, or this model has lost channels that it still
                has; model, optimizers and masks are as they were.
        """
        check_version(state)
        self._warn_of_another_config(state.get("config"))
        with all_or_nothing([self.model, *self._followers]) as undo:
            steps, ended = int(state["steps"]), bool(state["ended"])
            if self._inputs is None and state["inputs"] is not None:
                self._inputs = state["inputs"]
            if self._elements is not None:
                undo.append(self._memory_of_elements())
            if state["channels"] is not None:
                self._load_channels(state["channels"], undo)
            if self._elements is not None and state["elements"] is not None:
                self._elements.load_state_dict(state["elements"])
            if self._distiller is not None and state.get("distillation") is not None:
                undo.append(partial(self._distiller.load_state_dict, self._distiller.state_dict()))
                self._distiller.load_state_dict(state["distillation"])
            set_rng_state(state["rng"])
        self._steps.count, self._ended = steps, ended
        self._begun = self._begun or steps > 0

    def _warn_of_another_config(self, before: Any) -> None:
        """Rules may be changed between runs, but not by mistake."""
        now = self.config.model_dump(mode="json")
        for number, (mine, saved) in enumerate(zip(now["rules"], (before or now)["rules"], strict=False)):
            different = [
                f"{key} was {saved.get(key)!r} and is {mine[key]!r}" for key in mine if saved.get(key) != mine[key]
            ]
            if different:
                log.warning("state: it was saved with another rules[%d]: %s", number, "; ".join(different))

    def _load_channels(self, state: Mapping[str, Any], undo: list[Callable[[], None]]) -> None:
        if self._channels is None and self._inputs is not None and self.config.infer and self._channel_rules:
            self._channels = self._build_channels(self._channel_rules)  # for the architecture; nothing acts on it
        engine = self._channels or self.engine
        before = len(engine.live_D)
        undo.append(engine.load_state_dict(state, self._surroundings()))
        if len(engine.live_D) < before:
            self._after_removal()

    def _memory_of_elements(self) -> Callable[[], None]:
        """A function that puts the element rules back as they are now, once the channels are."""
        elements = self._elements
        assert elements is not None
        state = elements.state_dict()

        def undo() -> None:
            elements.rebuild(self._steps.optimizers)
            elements.load_state_dict(state)

        return undo


def _structure(rule: Rule) -> StructuredPattern:
    """The pattern of a rule for channels or heads."""
    pattern: StructuredPattern = build("pattern", rule.pattern)
    return pattern


def _tell(target: Log | None, line: str) -> None:
    log.info(line)
    if target is not None:
        (target.info if isinstance(target, logging.Logger) else target)(line)
