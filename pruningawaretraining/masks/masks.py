"""Masks: the groups that are switched off while training goes on.

Shape suffixes: ``_G`` groups, ``_W`` any weight.

A masked group is 0 in every member, the input columns of its consumers included, so an activation with f(0) != 0 does
no harm. A *writer* holds the masked entries of the parameters in the form that is fastest for the grouping's labels;
hooks of the groups' *attachments* let modules (norms over channels, blocks that are skipped) know what is masked, so
that the masked model equals the removed one. A *dynamic* says what masked weights do meanwhile: those that live on have
their dense values in a store, and are 0 in the parameters between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.criteria.base import checked_masks
from pruningawaretraining.groups.attachment import MaskHooks
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.groups.lowest import counts_of
from pruningawaretraining.masks.averages import Averages
from pruningawaretraining.masks.dense_store import DenseStore, check_optimizer
from pruningawaretraining.masks.dynamics import FROZEN, Dynamic
from pruningawaretraining.masks.factor_writer import FactorWriter
from pruningawaretraining.masks.hooks import hook_all, tell
from pruningawaretraining.masks.protocols import Ids, Writer
from pruningawaretraining.masks.snapshot import Snapshot
from pruningawaretraining.masks.view_writer import ViewWriter, kept_of_members
from pruningawaretraining.models.fake_quant import folded_norms
from pruningawaretraining.models.optimizer_state import mask_state
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.registry import calling


class Masks:
    """Holds and applies the masks of one grouping.

    Args:
        grouping: its groups.
        writer: holds the masked entries; by default in views of the weights, which needs consecutive slots.
        hooks: told of every change.
        dynamic: what masked weights do.
        followers: moving averages, masked as the model is; the list may grow.
        found: the groups of which modules of the averages have to know, or None.

    Attributes:
        passing: whether gradients of masked weights pass, as these train on or their gradients are asked for.
        choose: gives masks by the weights that there are now, for dynamics that change them between events.
        steps, names: optimizer steps so far; id of each parameter -> its name.
        next_G, snapshot: masks that a dynamic is on the way to; the weights that one goes back to.
        watched: a few parameters with masked entries.
    """

    def __init__(
        self,
        grouping: Grouping,
        writer: Writer | None = None,
        hooks: Sequence[MaskHooks] = (),
        dynamic: Dynamic = FROZEN,
        followers: Sequence[nn.Module] = (),
        found: ChannelGroups | None = None,
    ) -> None:
        self.grouping, self.dynamic, self._hooks, self.followers = grouping, dynamic, hooks, followers
        self.store = DenseStore() if dynamic.lives else None
        self.passing, self.steps = dynamic.lives, 0
        self.choose: Callable[[], Tensor] | None = None
        self.next_G: Tensor | None = None
        self.snapshot: Snapshot | None = None
        self._writer = ViewWriter(grouping) if writer is None else writer
        self.names = {id(member.parameter): member.name for member in grouping.members}
        self.averages = Averages(followers, self.names, self._writer, found)
        self._keep_G = torch.ones(grouping.size, dtype=torch.bool, device=self._writer.device)
        self.kept_by_set = [one.size for one in grouping.sets]  # groups of each set that are not masked
        self._keep_on: dict[torch.device, Tensor] = {}
        self._handles, self.watched = list[RemovableHandle](), list[Tensor]()
        self.active = False  # whether anything is masked

    @classmethod
    def coupled(
        cls,
        model: nn.Module,
        found: ChannelGroups,
        spared: frozenset[str] = frozenset(),
        dynamic: Dynamic = FROZEN,
        followers: Sequence[nn.Module] = (),
    ) -> Masks:
        """Masks of coupled groups; buffers are never masked, so that a norm's statistics survive.

        Args:
            model: the model.
            found: its groups.
            spared: tensors that are not masked: those that an exported graph divides by.
            dynamic: what masked weights do.
            followers: moving averages of the model.
        """
        grouping = found.grouping.without_role("buffer").without_tensors(spared | folded_norms(model))
        return cls(grouping, FactorWriter(grouping), found.hooks(model), dynamic, followers, found)

    @property
    def keep_G(self) -> Tensor:
        """For each group, whether it is kept; where the writer wants it: on the CPU, or with the first weight."""
        if self._keep_G.device != self._writer.device:
            self._keep_G = self._keep_G.to(self._writer.device)
        return self._keep_G

    def keep_on(self, device: torch.device) -> Tensor:
        """``keep_G`` on a device, copied there once after every change."""
        if device not in self._keep_on:
            self._keep_on[device] = self.keep_G.to(device)
        return self._keep_on[device]

    def set(self, keep_G: Tensor) -> None:
        """Take new masks (True = keep) and zero what they switch off; dense values that live on follow them."""
        checked_masks("dynamic", self.dynamic, keep_G, self.grouping.size)
        was_open, before_G = self._open(), self._keep_G
        self._take(keep_G)
        try:
            if self._hooks:
                tell(self._hooks, before_G, self.keep_on(torch.device("cpu")), self._writer.parameters())
        except BaseException:
            self._take(before_G)
            raise
        finally:
            self._close(was_open)
        if self.followers:
            self.averages.mask(self.keep_on(torch.device("cpu")))

    def _take(self, keep_G: Tensor) -> None:
        """Take masks, but do not write them over the weights yet. Gradients of parameters with masked entries (frozen
        ones too) are masked as they are accumulated, so a norm taken between backward and step has none of them."""
        for handle in self._handles:
            handle.remove()
        self._keep_G, self._keep_on = keep_G.detach().to(self._writer.device, torch.bool, copy=True), {}
        self.kept_by_set = counts_of(self.keep_G, [one.size for one in self.grouping.sets])
        self.active = sum(self.kept_by_set) < self.grouping.size
        self._writer.build(self.keep_G, self.kept_by_set)
        self._handles = []
        self.watched = hook_all(self._writer.parameters(), self._accumulated, self._handles)

    def exchange(self, keep_G: Tensor) -> None:
        """Take new masks that keep as many groups of every set, without counting: nothing waits for the device."""
        checked_masks("dynamic", self.dynamic, keep_G, self.grouping.size)
        was_open = self._open()
        self._keep_G, self._keep_on = keep_G, {}
        self._writer.build(keep_G, self.kept_by_set)
        self._close(was_open)
        self.averages.apply()

    def clear(self) -> None:
        """Forget the masks and take the hooks out; the weights stay as they are."""
        self.set(torch.ones_like(self._keep_G))
        for one in self._hooks:
            one.release()
        self.averages.release()

    def on(self, grouping: Grouping) -> Masks:
        """The same masks on the same groups of other tensors, whose slots are consecutive."""
        return hand_on(self, Masks(grouping, dynamic=self.dynamic, followers=self.followers))

    # --- dense values -------------------------------------------------------------------------------------------

    def _open(self) -> bool:
        """Let the weights hold their dense values; returns whether they did."""
        if self.store is None or self.store.is_open:
            return self.store is not None
        self.apply()  # what has come back meanwhile, from a loaded state, does not count
        self.store.put_back()
        return False

    def _close(self, stay_open: bool = False) -> None:
        """Mask the weights for the masks that there are now, and keep their dense values."""
        if self.store is not None:
            self.store.follow(self._writer.factors() if self.active else ())
            self.store.take_out()
        self.apply()
        if stay_open and self.store is not None:
            self.store.put_back()

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside the block the weights hold their dense values, where masked ones live on."""
        was_open = self._open()
        try:
            yield
        finally:
            if self.store is not None and not was_open:
                self.apply()

    def before_step(self, optimizer: torch.optim.Optimizer | None, ready: bool = True) -> None:
        """An optimizer is about to step: masked weights that live on get their dense values, and their decay once the
        gradients are ``ready``; it is None without step hooks.

        Raises:
            ConfigError: see :func:`~pruningawaretraining.masks.dense_store.check_optimizer`.
        """
        if self.snapshot is not None and optimizer is not None:
            self.snapshot.before_step(optimizer, self.steps)
        if self.store is not None:
            check_optimizer(type(self.dynamic).__name__, optimizer)
            self._open()
            if ready and self.dynamic.decay and optimizer is not None:
                self.store.pull(self.dynamic.decay, optimizer)

    def settle_for_good(self) -> None:
        """Masked weights are 0 from now on, whatever the dynamic was."""
        self.apply()
        self.dynamic, self.store, self.passing = FROZEN, None, False
        if self.next_G is not None:
            self.set(self.next_G)
            self.next_G = None

    def after_step(self, only: Ids | None = None) -> None:
        """Weights have moved, of the parameters with these ids or any: mask them, and let the dynamic act."""
        self.steps += 1
        if self.snapshot is not None:
            self.snapshot.after_step(self.steps)
        try:
            with calling("dynamic", self.dynamic, "nothing"):
                self.dynamic.stepped(self)
        finally:
            self.apply(only if self.store is None else None)

    @torch.no_grad()
    def apply(self, only: Ids | None = None) -> None:
        """Set masked weights to exactly 0: of the parameters with these ids, or of all. Dense values that are in the
        weights are kept aside first."""
        if self.store is not None and self.store.is_open:
            self.store.take_out()
        if self.active:
            self._writer.clear_weights(only)

    @torch.no_grad()
    def restore(self) -> dict[str, int]:
        """Set masked weights to 0, in averages too; return the names of tensors where they were not -> how many."""
        if not self.active:
            return {}
        found = self._writer.restore()
        self.averages.apply()
        return {self.names[number]: count for number, count in found.items()}

    @torch.no_grad()
    def apply_to_gradients(self, only: Ids | None = None) -> None:
        """Set the gradients of masked weights to 0 (see :meth:`apply`), so that they enter no norm and no average."""
        if self.active and not self.passing:
            self._writer.clear_gradients(only)

    @torch.no_grad()
    def apply_to_state(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Set the optimizers' state of masked weights (momenta, averages) to 0."""
        known = list(optimizers)
        if known and self.active and self.store is None:
            for parameter, keep_W in self._writer.factors():
                mask_state(known, [parameter], [keep_W])

    def settle(self) -> None:
        """Gradients are about to be used: mask those of which that has been left for later."""
        self._writer.settle()

    @torch.no_grad()
    def _accumulated(self, parameter: Tensor) -> None:
        # a removal by another pruner hands hooks on to what it puts in place
        if not self.passing and id(parameter) in self.names:
            self._writer.accumulated(parameter)

    # --- what is masked -----------------------------------------------------------------------------------------

    def masked_weights(self) -> int:
        """How many weights are masked."""
        return self._writer.masked_weights() if self.active else 0

    def kept_of_members(self) -> list[int]:
        """For each member with consecutive slots, how many of its groups are kept; counted once where each is a set."""
        return kept_of_members(self.grouping, self.keep_G, self.kept_by_set)

    def by_parameter(self) -> dict[str, Tensor]:
        """Name of each weight with consecutive slots -> keep mask of its groups, on the CPU."""
        return {
            member.name: self.keep_G[member.offset : member.offset + member.n_slots].detach().cpu().clone()
            for member in self.grouping.members
        }


def hand_on(masks: Masks, other: Masks) -> Masks:
    """Let masks of the same groups of other tensors go on where some are; these are cleared, the others returned."""
    keep_G, active = masks.keep_G, masks.active
    aside = None if masks.store is None else masks.store.packed(masks.names)
    other.steps, other.passing, other.choose = masks.steps, masks.passing, masks.choose
    other.next_G, other.snapshot = masks.next_G, masks.snapshot
    masks.clear()
    if active:
        other.set(keep_G)
    if masks.store is None:
        other.store = None
    elif other.store is not None and aside is not None:
        other.store.load(aside, other.names)
    return other
