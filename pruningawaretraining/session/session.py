"""A pruning session: one model with its engine, and what happens to them in the steps and epochs of a training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from pruningawaretraining.checkpoint.records import record_of
from pruningawaretraining.config.origin import in_users_words
from pruningawaretraining.config.recovery import teaching_of
from pruningawaretraining.config.schema import Distillation, PruningConfig
from pruningawaretraining.criteria.second_order import Calibration
from pruningawaretraining.criteria.second_order.gradients import LossFn
from pruningawaretraining.distributed.fsdp import any_sharded, check_plan, reshard
from pruningawaretraining.engine.context import RemovalContext
from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.engine.engine import Engine
from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.calling import beside
from pruningawaretraining.models.exported_graph import ExportedGraph
from pruningawaretraining.models.hugging_face import follow_configs
from pruningawaretraining.models.optimizer_state import clear_state
from pruningawaretraining.session.arguments import Given, weak_call
from pruningawaretraining.session.averages import Averages
from pruningawaretraining.session.build import BuiltRules, build_coupled, build_weights, built_rules, inputs_of
from pruningawaretraining.session.by_hand import keep_without
from pruningawaretraining.session.continuing import continue_coupled, continue_weights
from pruningawaretraining.session.counted_macs import CountedMacs
from pruningawaretraining.session.distillation import Distiller
from pruningawaretraining.session.epochs import check_missing, warn_of_late
from pruningawaretraining.session.input_capture import InputCapture
from pruningawaretraining.session.members import warn_of_missed
from pruningawaretraining.session.optimizer_hooks import Steps
from pruningawaretraining.session.step_events import StepEvents
from pruningawaretraining.session.unmatched import tell_of_unmatched

logger = logging.getLogger(__name__)


class Session(StepEvents):
    """Connects an engine with the model, the optimizers and everything else that a training has.

    Args:
        model: the model, without wrappers.
        config: the config.
        given: what the user has given beside them.
    """

    def __init__(self, model: nn.Module, config: PruningConfig, given: Given) -> None:
        super().__init__(config)
        self.model = model
        self.forward_fn, self.averages, self.teacher = given.forward_fn, Averages(given.averages, model), given.teacher
        self.followers = self.averages.modules
        self.graphs: list[ExportedGraph] = []
        self.steps = Steps(model, self)
        self.record: dict[str, Any] | None = record_of(model)
        self.capture = InputCapture(model, inputs_of(config, model) if given.inputs is None else given.inputs)
        self.distiller: Distiller | None = None
        self.counted, self.rules = CountedMacs(), BuiltRules()  # MACs of a model whose widths stay
        self._weak_context = weak_call(self, "context")
        self.engine = Engine(model, None, None, self._weak_context)
        self.steps_per_epoch: int | None = None
        self.begun = self.ended = self.sharded = False
        self.unmet = frozenset[str]()  # rules whose state is of another target
        self._given, self._sought_shards = given, False
        self._calibration: tuple[Iterable[Any], LossFn] | None = None
        self.distill()
        self.prepare()

    # --- construction -------------------------------------------------------------------------------------------

    def distill(self) -> None:
        """Make a teacher, where the config asks for distillation or one was given: a copy of the model as it is."""
        if self.distiller is not None:
            self.distiller.close()
            self.distiller = None
        options = teaching_of(self.config) or (None if self.teacher is None else Distillation())
        if options is not None and not self.config.infer:
            self.distiller = Distiller(self.model, self.teacher, **options.model_dump())

    def prepare(self) -> None:
        """Build what the rules ask for: removable groups once there are inputs to trace with."""
        with in_users_words(self.config.origin):
            self.engine.release()
            for masks in self.engine.masks:
                masks.clear()
            self.rules = built_rules(self.config)
            tell_of_unmatched(self.model, self.config)
            weights = None if self.config.infer else build_weights(self.model, self.rules, self.followers)
            self.engine = Engine(self.model, None, weights, self._weak_context)
            self._hand_calibration()
            if not self.config.infer:
                continue_weights(weights, self.record or {})
            self.engine.listen()
            if self.inputs is not None:
                self.find_coupled()
            else:
                self.capture.watch()
            self.engine.at_init()

    def change_config(self, config: PruningConfig, distill: bool) -> None:
        """Start again with another config, before training; ``distill`` says whether the teacher changes."""
        self.config = config
        if distill:
            self.distill()
        self.prepare()

    @property
    def inputs(self) -> Any:
        """The example inputs, or None until the model has shown some."""
        return self.capture.inputs

    def find_coupled(self) -> None:
        """Find the groups that can be removed, with the inputs that are known."""
        with in_users_words(self.config.origin):
            self.capture.set(beside(self.model, self.inputs))
            if not self.rules.coupled or self.config.infer:
                return
            coupled = self.trace()
            if self.record:
                continue_coupled(coupled, self.record)
            coupled.check_targets()
            self.engine.coupled = coupled
            self.count_epochs(self.steps_per_epoch)
            self._hand_calibration()
            self.engine.follow_phases()
            self.engine.at_init()

    def count_epochs(self, steps: int | None) -> None:
        """Let rules that count in fractions of epochs know how many steps an epoch has."""
        self.steps_per_epoch = steps
        for one in self.engine.rules:
            one.count(steps)

    def trace(self) -> CoupledGroups:
        """The groups that can be removed from the model as it is; nothing acts on them yet."""
        limit, followers = self.config.trace_limit, self.followers
        return build_coupled(self.model, self.rules.coupled, self.inputs, self.forward_fn, limit, followers)

    @property
    def coupled(self) -> CoupledGroups:
        """The groups that can be removed, found now if they have not been yet.

        Raises:
            ModelError: there are none: nothing is enabled, or no inputs have been seen yet.
        """
        if self.engine.coupled is None and self.inputs is not None and not self.config.infer:
            self.find_coupled()
        if self.engine.coupled is None:
            idle = "no rule is enabled, or the model is loaded for inference"
            why = "the model has not been run yet; pass example_inputs=" if self.active else idle
            raise ModelError(f"pruner: there are no channel groups: {why}")
        return self.engine.coupled

    @property
    def loaded_pruned(self) -> bool:
        """Whether the model came from a file of a run that had met its target."""
        return self.record is not None and self.record.get("phase") in ("finetune", "done")

    @property
    def active(self) -> bool:
        """Whether any rule is enabled, and the model is trained."""
        return not self.config.infer and any(rule.enabled for rule in self.config.rules)

    @property
    def prunes_coupled(self) -> bool:
        """Whether an active rule prunes groups that can be removed."""
        return bool(self.rules.coupled) and self.active

    def context(self) -> RemovalContext:
        """Everything that follows a mask or a removal."""
        before, after = self._given.before_removal, weak_call(self, "after_removal")
        told, done = self._given.after_removal, self._given.member_done
        return RemovalContext(self.steps.optimizers, self.followers, self.graphs, before, after, told, done)

    def after_removal(self) -> None:
        """Update configs of transformers models; clear optimizers if ``reset_optimizer`` is set."""
        follow_configs(self.model, self.rules.are_uniform)
        if self.config.reset_optimizer:
            for optimizer in self.steps.optimizers:
                clear_state(optimizer)
        self.averages.removed()

    def follow_removal(self) -> None:
        """Channels have gone with a state that was loaded."""
        self.averages.removed()
        self._given.after_removal()

    def calibrate_with(self, dataloader: Iterable[Any], loss_fn: LossFn) -> None:
        """Remember data for criteria and compensation, and hand it to the engine."""
        with in_users_words(self.config.origin):
            self._calibration = (dataloader, loss_fn)
            self._hand_calibration()

    def _hand_calibration(self) -> None:
        if self._calibration is not None:
            self.engine.calibrate(Calibration(self.model, *self._calibration))

    @property
    def acts(self) -> bool:
        """Whether rules are at work: some are enabled, and training has not ended."""
        return self.active and not self.ended

    def before_round(self) -> None:
        """See :class:`~pruningawaretraining.session.step_events.StepEvents`."""
        if not self._sought_shards:
            self.follow_shards()
            self._sought_shards = True
        if self.acts and self.rules.coupled and self.inputs is not None:
            _ = self.coupled

    def changed(self) -> None:
        """See :class:`~pruningawaretraining.session.step_events.StepEvents`."""
        self.writes.forget()
        self._given.changed()

    # --- epochs -------------------------------------------------------------------------------------------------

    def prune(self, epoch: int | None, target: Any = None) -> str | None:
        """The events of an epoch; see :meth:`pruningawaretraining.Pruning.prune`."""
        with in_users_words(self.config.origin):
            if not self.acts:
                return None
            self.begun = True
            self.follow_shards()
            if self.sharded:
                reshard(self.model)
            if self.rules.coupled:
                _ = self.coupled
            if epoch is None:
                check_missing(self.engine.rules)
            else:
                warn_of_late(self.engine.rules, epoch)
            before, lines, self.told = self._live(), list[str](), self.told if target is None else target
            try:
                lines = self.engine.prune(epoch or 0)
                self.tell(lines)
            finally:
                self._after_events(bool(lines), before)
            return "removed" if self._live() < before else "masked" if lines else None

    def _after_events(self, changed: bool, before: int) -> None:
        """The next step begins a real one, and records follow masks or a removal, whatever has come after it."""
        self.steps.end_round()
        if changed or self._live() < before:
            self.changed()

    def _live(self) -> int:
        return 0 if self.engine.coupled is None else len(self.engine.coupled.live_D)

    def remove(self) -> None:
        """Remove what is masked now, whatever the schedule says."""
        if self.rules.coupled or not self.rules.weights:
            _, before = self.coupled, self._live()
            try:
                self.engine.remove()
            finally:
                self._after_events(False, before)

    def remove_channels(self, channels: Mapping[str, Sequence[int]]) -> None:
        """Mask channels that were chosen by hand, and remove everything that is masked."""
        coupled = self.coupled
        keep_G = keep_without(coupled, channels)
        coupled.keep_D = coupled.keep_D.index_copy(0, coupled.live_D, keep_G)
        coupled.masks.set(keep_G)
        coupled.masks.apply_to_state(self.steps.optimizers)
        self.remove()

    def end(self) -> None:
        """Nothing prunes or regularises any more; masks stay."""
        if not self.ended:
            changes = self.take_waiting()
            warn_of_missed(self.engine.rules)
            self.engine.finish()
            if any(one.state.holds for one in self.engine.rules):
                self._given.member_done()
            if changes:
                self.changed()
        self.ended = True

    def follow_shards(self) -> None:
        """Notice that ``fully_shard`` has exchanged the parameters."""
        if self.sharded or not any_sharded(self.model):
            return
        check_plan(self.model)
        if self.prunes_coupled:
            _ = self.coupled
        self.engine.rebind()
        self.sharded = True
