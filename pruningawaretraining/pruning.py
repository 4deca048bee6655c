"""Pruning: the facade and its hooks; Pruner: the three-line form."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.channel_pruner import ChannelPruner, Surroundings
from pruningawaretraining.checkpoint import describe_with, record_of
from pruningawaretraining.config.load import load_config
from pruningawaretraining.config.schema import PruningConfig, Rule
from pruningawaretraining.costs.macs import count_macs
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.inputs import ForwardFn, from_shapes, move, tensors_of
from pruningawaretraining.optimizer_state import clear_state
from pruningawaretraining.patterns.channel import Channel, find_channels, producer_names
from pruningawaretraining.patterns.selection import select
from pruningawaretraining.registry import build
from pruningawaretraining.regularizers import Regularizer
from pruningawaretraining.report.summary import Report
from pruningawaretraining.steps import Steps

log = logging.getLogger(__name__)

Log = Callable[[str], None] | logging.Logger


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass on the example inputs: of the dense model, and of what is kept."""

    dense: int
    kept: int

    @property
    def fraction(self) -> float:
        return self.kept / self.dense if self.dense else 1.0


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DataParallel, DistributedDataParallel or torch.compile."""
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = inner.module
    return inner if inner is model else unwrap(inner)


class Pruning:
    """Prunes a model while it trains.

    Args:
        model: the model; it may be wrapped by DataParallel or torch.compile.
        config: a path to a .json, .yaml or .yml file, a folder that holds ``pruning_config.*``, a dict, or a
            ``PruningConfig``. The user's file is only read.
        forward_fn: how to run the model on example inputs, if not as ``model(*inputs)``: ``model.forward`` itself, or a
            function of ``(model, inputs)`` or ``(inputs)``.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs. Without it the config's
            shapes are used, and without those the first forward pass of the model shows them.
        optimizer: the optimizer; masks and regularisers then act by themselves in every step, and removal keeps its
            state. Without it the optimizer is found at its first step.
        ema: a moving average of the model (``AveragedModel`` or a copy), or several; sliced as the model is.

    Raises:
        ValueError: a configuration, layer, target or input that cannot be used; one line that names it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: str | Path | Mapping[str, Any] | PruningConfig,
        forward_fn: ForwardFn | None = None,
        *,
        example_inputs: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        ema: nn.Module | list[nn.Module] | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.config = load_config(config)
        self._forward_fn = forward_fn
        self._steps = Steps(self.model, self)
        self._penalties: list[tuple[Regularizer, Tensor]] = []
        self._followers = [] if ema is None else list(ema) if isinstance(ema, (list, tuple)) else [ema]
        self._channels: ChannelPruner | None = None
        self._inputs = self._first_inputs(example_inputs)
        self._capture: Any = None
        self._ended = False
        self.record = record_of(self.model)
        if self._inputs is None:
            self._capture = self.model.register_forward_pre_hook(self._see_inputs, with_kwargs=True)
        else:
            self._build()
        if optimizer is not None:
            self.attach(optimizer)
        this = weakref.ref(self)
        describe_with(self.model, lambda: {} if (pruner := this()) is None else pruner.describe())

    # --- construction -------------------------------------------------------------------------------------------

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
            self._inputs = _one_example(_as_inputs(module, args, kwargs))
            self._capture.remove()

    def _build(self) -> None:
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        self._inputs = move(self._inputs, device)
        rules = [(rule.name or f"rules[{number}]", rule) for number, rule in enumerate(self.config.rules)]
        for key, rule in rules:
            pattern = build("pattern", rule.pattern, f"{key}.pattern")
            if not isinstance(pattern, Channel):
                raise ConfigError(f"{key}.pattern: {rule.pattern!r} cannot be trained yet. Allowed: channel")
        active = [(key, rule) for key, rule in rules if rule.enabled]
        if not active or self.config.infer:
            return
        self._channels = self._build_channels(active)
        if self._loaded_pruned:
            for one in self._channels.rules:
                one.state.phase = "finetune"
        for one in self._channels.rules:
            if one.rule.at_init and one.rule.start <= 0 and one.state.phase == "regularize":
                self._channels.prune(one.rule.start, self._surroundings())

    def _build_channels(self, rules: list[tuple[str, Rule]]) -> ChannelPruner:
        names = producer_names(self.model)
        chosen: list[tuple[str, Rule, set[str]]] = []
        for key, rule in rules:
            selected = select(self.model, rule.layers, names, f"{key}.layers")
            chosen.append((key, rule, selected - select(self.model, rule.exclude, names, f"{key}.exclude")))
        union = set().union(*(layers for _, _, layers in chosen))
        found = find_channels(self.model, self._inputs, union, self._forward_fn)
        for name, reason in found.skipped.items():
            log.info("%s stays as it is: %s", name, reason)
        return ChannelPruner(self.model, found, chosen, self._inputs, self._forward_fn)

    @property
    def channel_pruner(self) -> ChannelPruner:
        """The engine of the channel rules (its ``reset_optimizer`` is set by a removal).

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

    def _surroundings(self) -> Surroundings:
        return Surroundings(self._steps.optimizers, self._followers, self._after_removal)

    def _after_removal(self) -> None:
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
        self._steps.attach(optimizer)

    def on_round(self) -> None:
        """A real step begins; see :mod:`pruningawaretraining.steps`."""
        acts = self._active and not self._ended and self._inputs is not None
        self._penalties = self.channel_pruner.penalties() if acts else []

    def on_gradients(self, scale: Tensor | float, only: set[int] | None) -> None:
        """Add the regularisers to gradients that are about to be used."""
        for ready, factor_G in self._penalties:
            ready.add(factor_G * scale, only)

    def on_stepped(self) -> None:
        """Weights have moved: masked ones go back to 0."""
        if self._channels is not None:
            self._channels.masks.apply()

    # --- hooks of a training loop -------------------------------------------------------------------------------

    def on_train_begin(self, dataloader: Any = None) -> None:
        """Before the first epoch."""

    def on_epoch_begin(self, epoch: int) -> None:
        """At the start of an epoch (counted from 0)."""

    def on_step_begin(self, step: int) -> None:
        """At the start of a step."""

    def on_before_optimizer_step(self) -> None:
        """After backward, before clipping and the optimizer's step: regularise, and mask the gradients."""
        self._steps.look_around()
        if not self._steps.optimizers and not self._steps.by_hand:
            self._steps.gradients_by_hand()
        if self._channels is not None:
            self._channels.masks.apply_to_gradients()

    def on_after_optimizer_step(self) -> None:
        """After the optimizer's step: masked weights are set to 0 again."""
        if not self._steps.optimizers:  # else the optimizer's own hooks have done it
            self._steps.stepped_by_hand()

    def on_epoch_end(self, epoch: int) -> None:
        """At the end of an epoch."""

    def on_train_end(self) -> None:
        """After the last epoch: nothing prunes or regularises any more; masks stay."""
        self._ended = True
        log.info("training ended: sparsity %.4f", self.sparsity)

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
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        return torch.zeros((), device=device)

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
        if not self._active or self._ended:
            return
        for line in self.channel_pruner.prune(int(epoch), self._surroundings()):
            _tell(log, line)
        self._steps.end_round()

    def remove(self) -> None:
        """Physically remove what is masked now, whatever the schedule says."""
        self.channel_pruner.remove(self._surroundings())
        self._steps.end_round()

    def _check_same(self, model: nn.Module | None) -> None:
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
        if self._channels is None:
            return "regularize" if self._active and not self._loaded_pruned else "finetune"
        return self._channels.phase

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable groups that are masked or removed."""
        if self.record and self._channels is not None and not self._channels.removed:
            return max(float(self.record["sparsity"]), self._channels.sparsity)
        return self._channels.sparsity if self._channels is not None else 0.0

    @property
    def macs(self) -> Macs:
        """MACs of the dense model and of what is kept, on the example inputs; counted on a removed model."""
        engine = self._channels
        if engine is None:
            counted = count_macs(self.model, self._inputs, self._forward_fn) if self._inputs is not None else 0
            return Macs(counted, counted)
        dense = int(self.record["macs"]) if self.record else int(engine.macs_cost.dense)
        if engine.masks.active or not engine.removed:
            return Macs(dense, round(engine.macs_cost(engine.keep_D)))
        return Macs(dense, count_macs(self.model, self._inputs, self._forward_fn))

    @property
    def masks(self) -> dict[str, Tensor]:
        """Group name -> keep mask over the dense model's groups (True = keep)."""
        return self._channels.keep_by_set() if self._channels is not None else {}

    def norms(self) -> dict[str, Tensor]:
        """Group name -> L2 norms of the groups that are there, on the CPU."""
        return self.channel_pruner.norms()

    def describe_groups(self) -> list[dict[str, Any]]:
        """One dict for each set of coupled layers: number, source, dependencies, size and kept groups."""
        keep = self.masks
        engine = self.channel_pruner
        return [
            {
                "number": number,
                "source": one.name,
                "dependencies": list(one.layers[1:]),
                "size": one.size * one.width,
                "kept": int(keep[one.name].sum()) * one.width,
            }
            for number, one in enumerate(engine.dense_sets, start=1)
        ]

    def report(self) -> Report:
        """What has been reached: per layer, and in all; prints as a table, has ``to_dict()``."""
        engine, macs = self.channel_pruner, self.macs
        kept_parameters = round(engine.parameters_cost(engine.keep_D))
        dense_parameters = int(self.record["parameters"]) if self.record else engine.dense_parameters
        counts = {"dense": dense_parameters, "kept": kept_parameters}
        return Report(
            phase=self.phase,
            sparsity=self.sparsity,
            macs={"dense": macs.dense, "kept": macs.kept, "fraction": macs.fraction},
            parameters={**counts, "fraction": kept_parameters / max(dense_parameters, 1)},
            layers=self._layer_rows(),
            groups=self.describe_groups(),
        )

    def _layer_rows(self) -> list[dict[str, Any]]:
        engine = self.channel_pruner
        kept_macs = dict(zip(engine.macs_cost.names, engine.macs_cost.layers(engine.keep_D).tolist(), strict=True))
        modules = dict(self.model.named_modules())
        kept = engine.kept_widths()
        rows = []
        for name, (dense_out, dense_in) in engine.dense_widths.items():
            module = modules[name]
            kept_out, kept_in = kept[name]
            dense_macs = engine.dense_per_layer.get(name, 0)
            rows.append(
                {
                    "name": name,
                    "type": type(module).__name__,
                    "set": engine.set_of_layer.get(name),
                    "dense_out": dense_out,
                    "kept_out": kept_out,
                    "dense_in": dense_in,
                    "kept_in": kept_in,
                    "dense_macs": dense_macs,
                    "kept_macs": round(kept_macs.get(name, dense_macs)),
                    "parameters": sum(parameter.numel() for parameter in module.parameters(recurse=False)),
                }
            )
        return rows

    def describe(self) -> dict[str, Any]:
        """What ``save_pruned`` writes beside the tensors: phase, sparsity, MACs, parameters and widths."""
        if self._channels is None:
            return dict(self.record or {})
        report = self.report()
        return {
            "phase": report.phase,
            "sparsity": report.sparsity,
            "macs": report.macs["dense"],
            "kept_macs": report.macs["kept"],
            "parameters": report.parameters["dense"],
            "groups": {row["source"]: [row["size"], row["kept"]] for row in report.groups},
        }

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside the weights: tensors and plain data."""
        channels = None if self._channels is None else self._channels.state_dict()
        return {"version": 1, "steps": self.steps, "ended": self._ended, "channels": channels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring a freshly built dense model to a checkpoint's architecture and masks; load the weights after it.

        Raises:
            ModelError: the state is of another model, or the model has been pruned already.
        """
        self._steps.count, self._ended = int(state["steps"]), bool(state["ended"])
        if state["channels"] is not None:
            self.channel_pruner.load_state_dict(state["channels"], self._surroundings())


def _tell(target: Log | None, line: str) -> None:
    log.info(line)
    if target is not None:
        (target.info if isinstance(target, logging.Logger) else target)(line)


def _as_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call's arguments as a tuple of positional inputs, or a dict of keyword inputs."""
    if not kwargs:
        return args
    if not args:
        return kwargs
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def _one_example(inputs: Any) -> Any:
    """The first example of a batch, detached; the whole batch where tensors do not share a first dimension."""
    tensors = list(tensors_of(inputs))
    batch = {tensor.shape[0] for tensor in tensors if tensor.dim() > 0}
    single = len(batch) == 1 and all(tensor.dim() > 0 for tensor in tensors)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (value[:1] if single else value).detach().clone()
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(cut(item) for item in value)
        return value

    return cut(inputs)


class Pruner:
    """The three-line form: ``pruner = Pruner(model, target_sparsity=0.5)``, then ``pruner.step()`` after every epoch.

    Channels are masked on the schedule and removed at its last step.

    Args:
        model: the model.
        target_sparsity: fraction of the channels to remove, in (0, 1].
        schedule: a registered schedule.
        start_epoch: the first call of ``step`` that prunes, counted from 0.
        end_epoch: the call that reaches the target.
        total_steps: calls from ``start_epoch`` to ``end_epoch``, instead of ``end_epoch``; 10 if neither is given.
        example_inputs: as for :class:`Pruning`; without it the model's first forward pass shows them.
        optimizer: as for :class:`Pruning`.
        macs: fraction of the MACs to keep, instead of ``target_sparsity``.
        options: any other field of a rule (criterion, layers, regularizer ...).
    """

    def __init__(
        self,
        model: nn.Module,
        target_sparsity: float | None = None,
        schedule: str = "linear",
        *,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        total_steps: int | None = None,
        example_inputs: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        macs: float | None = None,
        **options: Any,
    ) -> None:
        if end_epoch is None:
            end_epoch = start_epoch + (10 if total_steps is None else total_steps) - 1
        elif total_steps is not None:
            raise ConfigError(f"total_steps: {total_steps} and end_epoch: {end_epoch} say the same; give one of them")
        target = {key: value for key, value in {"sparsity": target_sparsity, "macs": macs}.items() if value is not None}
        rule = {"schedule": schedule, "start": start_epoch, "end": end_epoch, "target": target, **options}
        self.pruning = Pruning(model, {"rules": [rule]}, example_inputs=example_inputs, optimizer=optimizer)
        self.epoch = 0

    def step(self) -> None:
        """One epoch has ended: mask, or at the last step mask and remove."""
        self.pruning.prune(epoch=self.epoch)
        self.epoch += 1

    def regularize(self) -> None:
        """Add the regulariser to the gradients; see :meth:`Pruning.channel_regularize`."""
        self.pruning.channel_regularize()

    @property
    def phase(self) -> str:
        """See :attr:`Pruning.phase`."""
        return self.pruning.phase

    @property
    def sparsity(self) -> float:
        """See :attr:`Pruning.sparsity`."""
        return self.pruning.sparsity

    @property
    def macs(self) -> Macs:
        """See :attr:`Pruning.macs`."""
        return self.pruning.macs

    @property
    def masks(self) -> dict[str, Tensor]:
        """See :attr:`Pruning.masks`."""
        return self.pruning.masks

    def report(self) -> Report:
        """See :meth:`Pruning.report`."""
        return self.pruning.report()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside the weights."""
        return {"epoch": self.epoch, "pruning": self.pruning.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Pruning.load_state_dict`."""
        self.epoch = int(state["epoch"])
        self.pruning.load_state_dict(state["pruning"])
