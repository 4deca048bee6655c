"""Channel pruning through a whole training: score, allocate, mask on a schedule, remove when the target is met.

Shape suffixes: ``_D`` groups of the dense model, ``_G`` groups that are still there, ``_R`` groups of one rule.

Targets, caps and counts always speak of the dense model, also when every event removes channels for good.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.allocation.policies import scope_of
from pruningawaretraining.allocation.ranking import Allocator
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.costs.macs import LinearCost, macs_cost, macs_per_layer, parameters_cost
from pruningawaretraining.criteria.base import Statistics, scorable
from pruningawaretraining.criteria.second_order import Calibration
from pruningawaretraining.criteria.second_order.channels import MAKE_UP_BATCHES, compensate, recalibrate_norms
from pruningawaretraining.distributed.collectives import agreed, same_buffers
from pruningawaretraining.engine.channel_rules import (
    PHASES,
    ChannelRule,
    RuleState,
    assign,
    refuse_what_channels_lack,
)
from pruningawaretraining.engine.phases import tell_of_whole_epochs
from pruningawaretraining.engine.statistics_feed import StatisticsFeed, measures
from pruningawaretraining.engine.targets import Targets
from pruningawaretraining.errors import CheckpointError, ConfigError, ModelError, unknown
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.masks.penalties import Regularizer, prepare
from pruningawaretraining.masks.pruned_copy import pruned_copy
from pruningawaretraining.masks.removal import remove
from pruningawaretraining.models.calling import ForwardFn, full_precision
from pruningawaretraining.models.comparison import Comparison, Outputs
from pruningawaretraining.models.compiling import forget_compiled
from pruningawaretraining.models.example_inputs import Example
from pruningawaretraining.models.exported_graph import ExportedGraph
from pruningawaretraining.models.masked_norms import kept_norm_of
from pruningawaretraining.models.surgery import Surgery
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.registry import build

log = logging.getLogger(__name__)


class ChannelPruner:
    """Drives the channel rules of one model.

    Args:
        model: the model, dense.
        found: its channel groups.
        rules: (key, rule, names of the layers it may prune).
        inputs, forward_fn: how to run the model.

    Attributes:
        reset_optimizer: set by a removal, for loops that build a new optimizer then and clear it.
    """

    def __init__(
        self,
        model: nn.Module,
        found: ChannelGroups,
        rules: Sequence[tuple[str, Rule, set[str]]],
        inputs: Any,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        self.model, self.forward_fn, self._example = model, forward_fn, Example(inputs, model)
        self.found = found
        self.dense_sets = found.grouping.sets
        self.dense_per_layer = macs_per_layer(model, inputs, forward_fn)
        heads = {name: one.groups_H for name, one in found.heads.items()}
        blocks = {name: one.group for name, one in found.blocks.items()}
        self.macs_cost = macs_cost(found.grouping, self.dense_per_layer, heads, blocks)
        self.parameters_cost = parameters_cost(found.grouping, model)
        self.targets = Targets(model, found, self.macs_cost, self.parameters_cost, inputs, forward_fn)
        self.dense_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.dense_widths = layer_widths(model)
        self.dense_types = {name: type(module).__name__ for name, module in model.named_modules()}
        self.set_of_layer = _set_of_layer(found.grouping)
        self.keep_D = torch.ones(found.grouping.size, dtype=torch.bool)
        self.live_D = torch.arange(found.grouping.size)  # dense numbers of the groups that are still there
        self.rules = assign(found.grouping, rules)
        self._make_listeners()
        self._listens = False
        self.calibration: Calibration | None = None  # data that criteria may look at instead of training
        self.spared: frozenset[str] = frozenset()
        self.masks = Masks(model, found.grouping, found.norms, blocks=found.blocks)
        self.reset_optimizer = False
        self.sharded = False  # whether fully_shard has spread the parameters
        self._regularizers: list[tuple[ChannelRule, Regularizer, Tensor]] | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # for each regulariser: all masks, and its own
        self._surgery: Surgery | None = None  # the removal that a state being loaded asked for

    def check_targets(self) -> None:
        """Refuse a target that no mask within the limits reaches, before any training is spent on it."""
        for one in self.rules:
            refuse_what_channels_lack(one)
            self._check_caps(one)
            allocator = Allocator(one.grouping, torch.zeros(one.grouping.size), one.limits(), scope_of(one))
            if one.rule.target.about_costs and one.rule.enabled:
                self.targets.check(one)
            if one.rule.target.sparsity is not None:
                allocator.check_sparsity(one.rule.target.sparsity, f"{one.key}.target.sparsity")

    def _check_caps(self, one: ChannelRule) -> None:
        """Refuse caps of layers that the model does not have, and caps none of which is of this rule's sets."""
        caps, modules = one.limits().caps, dict(self.model.named_modules())
        own = [each.name for each in one.grouping.sets]
        strange = next((name for name in caps if name not in modules), None)
        if strange is None and caps and not set(caps) & set(own):
            strange = next(iter(caps))
        if strange is not None:
            raise ConfigError(unknown(f"{one.key}.max_sparsity_from", strange, own))

    # --- listening ----------------------------------------------------------------------------------------------

    def _make_listeners(self) -> None:
        for one in self.rules:
            one.listener = StatisticsFeed(one.key, one.criterion, self.model, self.found, one.sets)

    def listen(self) -> None:
        """Let criteria that need it hear of training from now on, as long as their rules have events to come."""
        self._listens = True
        self._follow_phases()

    def _follow_phases(self) -> None:
        if not self._listens:
            return
        for one in self.rules:
            if one.rule.enabled and one.state.phase in ("regularize", "prune"):
                one.listener.begin(self.calibration)
            else:
                one.listener.end()

    def calibrate(self, calibration: Calibration) -> None:
        """Data that criteria and compensation may look at; those that measure on it need not listen to training."""
        self.calibration = calibration
        self._follow_phases()

    def hear(self, scale: Tensor | float) -> None:
        """Gradients are complete and no weight has moved; ``scale`` is what they are still multiplied with."""
        for one in self.rules:
            one.listener.hear(scale)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Nothing is heard inside the block: what runs there is not training."""
        self.release()
        try:
            yield
        finally:
            self._follow_phases()

    def release(self) -> None:
        """Take every hook out; masks stay."""
        for one in self.rules:
            one.listener.end()

    @property
    def phase(self) -> str:
        """The earliest phase of any rule."""
        return min((one.state.phase for one in self.rules), key=PHASES.index, default="done")

    @property
    def removed(self) -> bool:
        """Whether any channel has been removed physically."""
        return len(self.live_D) < len(self.keep_D)

    # --- regularising -------------------------------------------------------------------------------------------

    def regularizers(self) -> list[tuple[ChannelRule, Regularizer, Tensor]]:
        """Each active rule's regulariser, with its live groups; built once after every removal."""
        if self._regularizers is None:
            self._regularizers, self._kept = [], {}
            saving_G = self.macs_cost.saving_G(self.keep_D)[self.live_D]
            for one in self.rules:
                if one.rule.regularizer is not None and one.rule.enabled:
                    mine_G = torch.nonzero(torch.isin(self.live_D, one.groups_D)).flatten()
                    options = build("regularizer", one.rule.regularizer, f"{one.key}.regularizer")
                    ready = prepare(options, self.found.grouping.select_sets(one.sets), saving_G[mine_G])
                    self._regularizers.append((one, ready, mine_G))
        return self._regularizers

    def penalties(self) -> list[tuple[Regularizer, Tensor]]:
        """Every active regulariser (while regularising and pruning, not after) with its factors at these weights."""
        found = []
        for one, ready, mine_G in self.regularizers():
            if one.state.phase in ("regularize", "prune") and ready.acts:
                found.append((ready, ready.factors(self._keep_for(ready, mine_G) if self.masks.active else None)))
        return found

    def regularize(self, scale: Tensor | float = 1.0) -> None:
        """Add every active regulariser to the gradients in place, in the gradients' own ``scale``."""
        for ready, factor_G in self.penalties():
            ready.add(factor_G * scale)

    def _keep_for(self, ready: Regularizer, mine_G: Tensor) -> Tensor:
        keep_G = self.masks.keep_on(ready.index.device)
        if len(mine_G) == len(keep_G):
            return keep_G
        known = self._kept.get(id(ready))
        if known is None or known[0] is not keep_G:
            known = self._kept[id(ready)] = (keep_G, keep_G[mine_G.to(keep_G.device)])
        return known[1]

    # --- pruning ------------------------------------------------------------------------------------------------

    def prune(self, now: int, surroundings: RemovalContext, unit: str = "epoch", last: bool = False) -> list[str]:
        """Let every rule that is due fire.

        Args:
            now: the epoch (or step).
            surroundings: what has to follow a removal.
            unit: what ``now`` counts, "epoch" or "step"; rules that count the other are left alone.
            last: only the last event of a schedule.

        Returns:
            One line for each thing that happened.
        """
        self._check_data()
        lines = []
        for one in self.rules:
            counted = one.rule.enabled and one.times.counts == unit and one.rule.target.given
            if last and now != one.times.last:
                continue
            if counted and one.fires(now) and (unit == "epoch" or one.listener.ready(self.calibration)):
                with full_precision(self.model):
                    lines += self._fire(one, now, surroundings)
        return lines

    @property
    def counts_steps(self) -> bool:
        """Whether a rule that counts steps has events to come."""
        return any(one.times.counts == "step" and one.state.phase in ("regularize", "prune") for one in self.rules)

    def _fire(self, one: ChannelRule, now: int, surroundings: RemovalContext) -> list[str]:
        if one.state.event == 0:
            tell_of_whole_epochs(one.key, one.times)
        keep_R, met = self._agreed(*self._decide(one, now))
        one.state.event += 1
        one.state.last = now
        one.state.phase = "prune"
        self._adjusted(one, keep_R, surroundings)
        lines = [f"{one.key}: {one.times.counts} {now}: masked to {self._summary()}"]
        if self.sharded and met:
            lines.append(f"{one.key}: {one.times.counts} {now}: the target is met; gathered() removes what is masked")
        elif met or one.rule.application == "remove":
            self.remove(surroundings)
            lines.append(f"{one.key}: {one.times.counts} {now}: removed, {self._summary()}")
        if met:
            one.state.phase = "finetune"
            self._follow_phases()
        return lines

    def _check_data(self) -> None:
        """Refuse a compensation without data at the first call, and not only at the event.

        Raises:
            ConfigError: the message names the rule.
        """
        for one in self.rules:
            coming = one.rule.enabled and one.state.phase in ("regularize", "prune")
            if coming and one.rule.compensation != "none" and self.calibration is None:
                if one.rule.at_init and one.rule.start <= 0:
                    raise ConfigError(
                        f"{one.key}.at_init: True prunes when the pruner is made, before it has the data that "
                        f"compensation: {one.rule.compensation!r} needs. Allowed: False, or start: 1 or later"
                    )
                raise ConfigError(
                    f"{one.key}.compensation: {one.rule.compensation!r} needs data, and none was given. Allowed: "
                    "pruner.calibrate_with(dataloader, loss_fn) before the first prune(); or 'none'"
                )

    def _adjusted(self, one: ChannelRule, keep_R: Tensor, surroundings: RemovalContext) -> None:
        """Mask; before it the layers that read what goes make up for it, after it norms are measured anew."""
        if one.rule.compensation == "none" or self.calibration is None:
            self._mask(one, keep_R, surroundings)
            return
        keep_D = self.keep_D.clone()
        keep_D[one.groups_D] = keep_R
        with self.deaf():
            compensate(self.model, self.found.grouping, keep_D[self.live_D], self.calibration, one.rule.compensation)
            self._mask(one, keep_R, surroundings)
            recalibrate_norms(self.model, self.calibration, MAKE_UP_BATCHES)
            same_buffers(self.model)

    def _agreed(self, keep_R: Tensor, met: bool) -> tuple[Tensor, bool]:
        """The first process's decision; inputs that it was shown may give it other costs than the others."""
        keep_R, flag = agreed(keep_R, torch.tensor([met]))
        return keep_R, bool(flag)

    def _decide(self, one: ChannelRule, now: int) -> tuple[Tensor, bool]:
        """The rule's next masks, and whether its target is met with them."""
        rule = one.rule
        scores_R = self.scores(one)
        if rule.target.about_costs:
            progress = one.times.progress(now)
            keep_R, met, reached = self.targets.decide(one, scores_R, self.keep_D, progress, self._copy_of)
            if reached is not None:
                one.state.latencies = [*one.state.latencies, {"at": now, **vars(reached)}]
            return keep_R, met
        assert rule.target.sparsity is not None
        allocator = Allocator(one.grouping, scores_R, one.limits(), scope_of(one), ~self.keep_D[one.groups_D])
        return allocator.at(one.times.sparsity(now)), now >= one.times.last

    def _copy_of(self, keep_D: Tensor) -> nn.Module:
        """A copy of the model as it is now, without the groups that these masks drop."""
        return pruned_copy(self.model, self.found, keep_D[self.live_D], "cpu")

    def scores(self, one: ChannelRule) -> Tensor:
        """Scores of the rule's groups; those that are gone already score lowest."""
        grouping = self.found.grouping.select_sets(one.sets)
        mine_G = torch.isin(self.live_D, one.groups_D)
        live_R = torch.isin(one.groups_D, self.live_D)
        cost = _LiveCost(self.macs_cost, self.keep_D, self.live_D[mine_G])
        heard = one.listener.statistics(self.calibration)
        statistics = Statistics(cost, self.keep_D[self.live_D[mine_G]], one.state.scale, tensors=heard)
        if one.state.first is not None:
            statistics.first_G = one.state.first[live_R]
        scores = one.criterion.score(scorable(grouping, one.criterion), statistics)
        if one.state.first is None and statistics.first_G is not None and bool(live_R.all()):
            one.state.scale, one.state.first = statistics.scale, statistics.first_G.cpu()
        scores_R = torch.full((len(one.groups_D),), -torch.inf, dtype=torch.float64)
        scores_R[live_R] = scores.detach().cpu().double()
        if bool(torch.isnan(scores_R).any()):
            raise ModelError(f"{one.key}.criterion: {one.rule.criterion!r} gives NaN: the weights are not finite")
        return scores_R

    def _mask(self, one: ChannelRule, keep_R: Tensor, surroundings: RemovalContext) -> None:
        self.keep_D = self.keep_D.clone()
        self.keep_D[one.groups_D] = keep_R
        self.masks.set(self.keep_D[self.live_D])
        self.masks.apply_to_state(surroundings.optimizers)

    def remove(self, surroundings: RemovalContext) -> None:
        """Remove what is masked now, physically.

        Raises:
            ModelError: the removed model does not compute what the masked one did; everything is put back first.
        """
        if self.sharded:
            raise ModelError(
                "removal: fully_shard has spread the parameters. Allowed: pruner = pruner.gathered(build_model()), "
                "and fully_shard(pruner.model) again"
            )
        with self.deaf(), full_precision(self.model):
            self._remove(surroundings)

    def rebind(self) -> None:
        """Take the model's parameters as they are now, by their names: ``fully_shard`` has exchanged them.

        Raises:
            ConfigError: a rule removes at every event, has a latency to reach, or works by second order with data of
                its own.
        """
        for one in self.rules:
            self.targets.check_sharded(one)
            if one.rule.application == "remove":
                raise ConfigError(
                    f"{one.key}.application: 'remove' at every event cannot follow fully_shard. Allowed: mask"
                )
            if one.rule.compensation != "none":
                raise ConfigError(
                    f"{one.key}.compensation: {one.rule.compensation!r} needs whole layers, and fully_shard has spread "
                    "them. Allowed: 'none', or DistributedDataParallel"
                )
            if self.calibration is not None and measures(one.criterion):
                raise ConfigError(
                    f"{one.key}.criterion: {one.rule.criterion!r} with data of its own needs whole layers, and "
                    "fully_shard has spread them. Allowed: DistributedDataParallel"
                )
        keep_G, self.sharded = self.masks.keep_G, True
        self.masks.clear()
        self.found = self.found.on(self.model)
        for one in self.rules:
            one.listener.rebind(self.found)
        self.masks = Masks(self.model, self.found.grouping, self.found.norms, self.spared, self.found.blocks)
        self.masks.set(keep_G)
        self._regularizers = None

    def _remove(self, surroundings: RemovalContext) -> None:
        keep_G = self.keep_D[self.live_D]
        if bool(keep_G.all()):
            return
        surroundings.before_removal()
        graphs = surroundings.graphs
        comparison = Comparison(self.model, self._example.inputs, self.forward_fn, graphs)
        before = comparison.outputs()
        self.masks.clear()
        try:
            surgery = remove(self.model, self.found, keep_G, surroundings.optimizers, surroundings.followers, graphs)
        except ModelError:
            self.masks.set(keep_G)
            raise
        try:
            self._check_removed(comparison, before)
        except (ModelError, RuntimeError):
            surgery.undo()
            self.masks.set(keep_G)
            raise
        self._restrict(keep_G)
        self.reset_optimizer = True
        surroundings.after_removal()

    def _check_removed(self, comparison: Comparison, before: Outputs) -> None:
        try:
            difference = comparison.verdict(before, comparison.outputs()).difference
        except ModelError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ModelError(
                f"removal: the removed model does not run: {reason}; the model is put back as it "
                "was, masked. Some width is written into its code: leave those layers out with 'exclude'"
            ) from error
        if difference:
            raise ModelError(
                f"removal: the removed model's outputs differ from the masked model's by {difference:.2g} of their "
                "scale; the model is put back as it was, masked. Some operation mixes channels in a way that is "
                "not understood: leave its layers out with 'exclude'"
            )

    def _restrict(self, keep_G: Tensor) -> None:
        forget_compiled()
        self.found = self.found.restrict(self.model, keep_G)
        for one in self.rules:
            one.listener.follow(self.found, keep_G[torch.isin(self.live_D, one.groups_D)])
        self.live_D = self.live_D[keep_G]
        self.masks = Masks(self.model, self.found.grouping, self.found.norms, self.spared, self.found.blocks)
        self._regularizers = None

    # --- exported graphs ----------------------------------------------------------------------------------------

    def spare(self, graph: ExportedGraph) -> None:
        """Let masks hold in a graph that was exported from the model.

        A quantizer folds batch norms into layers and divides by their weights, so those of masked channels are 1, not
        0; they have no influence, since everything that reads them is masked.

        Raises:
            ModelError: a norm over channels, whose statistics cannot be restricted in a graph; or the graph does not
                run on the example inputs.
        """
        if self.found.blocks:
            raise ModelError(
                "graph: 'depth' takes whole blocks out of the model, and in an exported graph they cannot be found. "
                "Allowed: remove them before the export"
            )
        modules = dict(self.model.named_modules())
        for name in self.found.norms:
            if kept_norm_of(modules[name]) is not None:
                raise ModelError(
                    f"graph: {name} ({type(modules[name]).__name__}) normalises over channels, of which some may be "
                    "masked, and in an exported graph that cannot be told. Allowed: remove the channels before the "
                    "export, or exclude the layers that it normalises"
                )
        graph.outputs(self._example.inputs, self.forward_fn)
        keep_G, divisors = self.masks.keep_G, graph.divisors()
        self.spared |= divisors
        self.masks.clear()
        self.masks = Masks(self.model, self.found.grouping, self.found.norms, self.spared, self.found.blocks)
        self.masks.set(keep_G)
        with torch.no_grad():
            for member, keep_W in self.found.grouping.expand(keep_G.float(), outside=1.0):
                if member.name in divisors:
                    member.parameter[(keep_W == 0).to(member.parameter.device)] = 1.0

    # --- what has been reached ----------------------------------------------------------------------------------

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable groups that are masked or removed."""
        return 1.0 - float(self.keep_D.double().mean()) if len(self.keep_D) else 0.0

    def _summary(self) -> str:
        fraction = self.macs_cost(self.keep_D) / max(self.macs_cost.dense, 1.0)
        return f"sparsity {self.sparsity:.4f}, {fraction:.4f} of the MACs"

    def norms(self) -> dict[str, Tensor]:
        """L2 norms of the live groups by set, over output and input weights and norm weights (on the CPU)."""
        weights = self.found.grouping.of_role("out", "in", "norm")
        norms_G = weights.reduce_of(lambda weight: weight.float().square()).sqrt().cpu()
        return {one.name: norms_G[one.start : one.stop] for one in self.found.grouping.sets}

    def kept_widths(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) that every convolution and linear layer keeps, masked channels not counted; 0 for layers in
        blocks that are gone."""
        widths = {**dict.fromkeys(self.dense_widths, (0, 0)), **layer_widths(self.model)}
        modules = dict(self.model.named_modules())
        keep_G1 = torch.cat([self.keep_D[self.live_D], torch.ones(1, dtype=torch.bool)])
        for member in self.found.grouping.of_role("out", "in").members:
            name = member.name.removesuffix(".weight")
            if name not in widths or member.slots is None:
                continue
            kept, groups = int(keep_G1[member.slots].sum()), getattr(modules[name], "groups", 1)
            outputs, inputs = widths[name]
            if member.role == "in":
                widths[name] = (outputs, kept * groups)
            elif groups == inputs > 1:  # depthwise
                widths[name] = (kept, kept * inputs // outputs)
            else:
                widths[name] = (kept, inputs)
        masked = tuple(f"{name}." for name, one in self.found.blocks.items() if not bool(keep_G1[one.group]))
        return {name: (0, 0) if name.startswith(masked) else pair for name, pair in widths.items()}

    def keep_by_set(self) -> dict[str, Tensor]:
        """Masks of the dense model's groups by set, True = keep."""
        return {one.name: self.keep_D[one.start : one.stop].clone() for one in self.dense_sets}

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks, what has been removed, widths, and where each rule stands: tensors and plain data."""
        return {
            "sets": self._set_sizes(),
            "keep": self.keep_D.clone(),
            "removed": self._removed_D(),
            "widths": {name: list(widths) for name, widths in layer_widths(self.model).items()},
            "rules": [vars(one.state).copy() for one in self.rules],
            "heard": [one.listener.state_dict() for one in self.rules],
            "reset_optimizer": self.reset_optimizer,
        }

    def _set_sizes(self) -> dict[str, int]:
        return {one.name: one.size for one in self.dense_sets}

    def _removed_D(self) -> Tensor:
        removed_D = torch.ones(len(self.keep_D), dtype=torch.bool)
        removed_D[self.live_D] = False
        return removed_D

    def load_state_dict(self, state: Mapping[str, Any], surroundings: RemovalContext) -> Callable[[], None]:
        """Bring a dense model to the architecture and masks of a checkpoint (weights are loaded after that).

        Returns:
            A function that puts the architecture and the masks back as they were.

        Raises:
            CheckpointError: the checkpoint is of another model, or of a time before this one lost channels.
            KeyError, TypeError, ValueError, RuntimeError: it is damaged; the architecture is as it was.
        """
        keep_D, removed_D = self._read_masks(state)
        rules = [RuleState(**values) for _, values in zip(self.rules, state["rules"], strict=True)]
        reset = bool(state["reset_optimizer"])
        undo = self._memory()
        self.release()
        try:
            self._remove_more(removed_D, surroundings)
            self._check_widths(state["widths"])
            nothing = [None] * len(self.rules)  # as in states of versions that did not listen
            for one, heard in zip(self.rules, state.get("heard", nothing), strict=True):
                one.listener.load_state_dict(heard)
        except (CheckpointError, ModelError, KeyError, RuntimeError):
            undo()
            raise
        self.keep_D = keep_D
        self.masks.set(keep_D[self.live_D])
        for one, rule_state in zip(self.rules, rules, strict=True):
            one.state = rule_state
        self.reset_optimizer = reset
        self._follow_phases()
        return undo

    def _read_masks(self, state: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        sets = self._set_sizes()
        if state["sets"] != sets:
            other = sorted(set(sets.items()) ^ set(state["sets"].items()))[0]
            raise CheckpointError(
                f"state: it was saved for other channel groups: {other[0]!r} of {other[1]} differs. "
                "Build the model as it was before pruning"
            )
        keep_D, removed_D = state["keep"].cpu().bool().clone(), state["removed"].cpu().bool()
        if keep_D.shape != self.keep_D.shape or removed_D.shape != keep_D.shape or bool((keep_D & removed_D).any()):
            raise CheckpointError("state: its masks contradict each other, or its groups; it is damaged")
        if bool((self._removed_D() & ~removed_D).any()):
            raise CheckpointError(
                "state: this model has lost channels that the state still has; load into a freshly built dense model"
            )
        return keep_D, removed_D

    def _remove_more(self, removed_D: Tensor, surroundings: RemovalContext) -> None:
        """Remove what a checkpoint's model has lost and this one not yet; the caller remembers how to undo it."""
        keep_G = ~removed_D[self.live_D]
        if bool(keep_G.all()):
            return
        self.masks.clear()
        self._surgery = remove(
            self.model, self.found, keep_G, surroundings.optimizers, surroundings.followers, surroundings.graphs
        )
        self._restrict(keep_G)

    def _check_widths(self, widths: Mapping[str, Any]) -> None:
        now = {name: list(found) for name, found in layer_widths(self.model).items()}
        for name, (outputs, inputs) in now.items():
            if widths[name] != [outputs, inputs]:
                raise CheckpointError(
                    f"state: {name!r} has {widths[name]} outputs and inputs in it, and [{outputs}, {inputs}] here"
                )

    def _memory(self) -> Callable[[], None]:
        """A function that puts architecture, masks and rules back as they are now."""
        values = {name: getattr(self, name) for name in ("found", "live_D", "keep_D", "masks", "reset_optimizer")}
        keep_G, states = self.masks.keep_G, [replace(one.state) for one in self.rules]
        heard = [one.listener.state_dict() for one in self.rules]
        self._surgery = None

        def undo() -> None:
            self.release()
            self.masks.clear()
            if self._surgery is not None:
                self._surgery.undo()
            for name, value in values.items():
                setattr(self, name, value)
            self._regularizers = None
            self.masks.set(keep_G)
            for one, state in zip(self.rules, states, strict=True):
                one.state = state
            self._make_listeners()
            for one, known in zip(self.rules, heard, strict=True):
                one.listener.load_state_dict(known)
            self._follow_phases()

        return undo


@dataclass
class RemovalContext:
    """What has to follow a removal.

    Args:
        optimizers: their parameters and states.
        followers: moving averages of the model.
        graphs: exported from the model.
        before_removal: called when the model is masked as it will be removed.
        after_removal: called once the model has been changed.
    """

    optimizers: Sequence[torch.optim.Optimizer] = ()
    followers: Sequence[nn.Module] = ()
    graphs: Sequence[ExportedGraph] = ()
    before_removal: Callable[[], None] = lambda: None
    after_removal: Callable[[], None] = lambda: None


class _LiveCost:
    """The dense model's cost seen from one rule's live groups, for criteria."""

    def __init__(self, cost: LinearCost, keep_D: Tensor, groups_D: Tensor) -> None:
        self.names, self.base_L = cost.names, cost.base_L
        self._cost, self._keep_D, self._groups_D = cost, keep_D, groups_D

    def __call__(self, keep_G: Tensor) -> float:
        whole = self._keep_D.clone()
        whole[self._groups_D] = keep_G
        return self._cost(whole)

    def saving_G(self, keep_G: Tensor) -> Tensor:
        whole = self._keep_D.clone()
        whole[self._groups_D] = keep_G
        return self._cost.saving_G(whole)[self._groups_D]


def _set_of_layer(grouping: Grouping) -> dict[str, str]:
    """Layer -> the set that its output channels belong to."""
    found: dict[str, str] = {}
    for member in grouping.of_role("out").members:
        if member.slots is not None and bool((member.slots < grouping.size).any()):
            number = int(grouping.set_ids[int(member.slots.min())])
            found[member.name.removesuffix(".weight")] = grouping.sets[number].name
    return found


def layer_widths(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every convolution and linear layer."""
    widths = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            widths[name] = (module.out_channels, module.in_channels)
        elif isinstance(module, nn.Linear):
            widths[name] = (module.out_features, module.in_features)
    return widths
