"""Coupled groups: a proximal step on whole channels (or heads), so that what becomes zero can be removed.

Shape suffixes: ``_G`` groups, ``_S`` slots of one member.

A channel of a residual stream is made by many layers. Penalised layer by layer they go to zero in different rows and
almost nothing can be removed. Here a channel is one group: the rows of all its producers and the weights and biases of
the norms behind them, with one norm and one multiplier. The columns of its consumers stay out, so that groups do not
overlap and the proximal step is exact; a channel at 0 puts out 0, and leaves without loss.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.criteria.base import Statistics
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.masks.dry_run import removable_channels
from pruningawaretraining.models.calling import ForwardFn
from pruningawaretraining.patterns.channel import chosen_layers
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.proximal.maps import SLACK
from pruningawaretraining.registry import register

logger = logging.getLogger(__name__)

PRODUCING = ("out", "norm", "bias", "raw", "made", "element")


@dataclass(frozen=True, eq=False)
class Balance:
    """How the groups of different sets compare, and how many of each stay.

    Args:
        set_ids_G: the set of each group.
        sizes_S: groups of each set.
        floors_S: how many groups of each set always stay; None for any number.
        relative: whether norms count in units of their set's mean.
    """

    set_ids_G: Tensor
    sizes_S: Tensor
    floors_S: Tensor | None = None
    relative: bool = False

    def to(self, device: torch.device) -> Balance:
        """The same on a device."""
        floors_S = None if self.floors_S is None else self.floors_S.to(device)
        return Balance(self.set_ids_G.to(device), self.sizes_S.to(device), floors_S, self.relative)

    def units_G(self, ratio_G: Tensor) -> Tensor:
        """Divisor of each group's norm: the mean of its set, or 1."""
        if not self.relative:
            return torch.ones_like(ratio_G)
        means_S = torch.zeros_like(self.sizes_S, dtype=ratio_G.dtype).index_add_(0, self.set_ids_G, ratio_G)
        means_S = (means_S / self.sizes_S).clamp_(min=torch.finfo(ratio_G.dtype).tiny)
        return means_S[self.set_ids_G]

    def protected_G(self, ratio_G: Tensor) -> Tensor | None:
        """True for the largest groups of each set, those that always stay; the first of equals goes before."""
        if self.floors_S is None:
            return None
        by_norm = torch.argsort(ratio_G, descending=True, stable=True)
        order = by_norm[torch.argsort(self.set_ids_G[by_norm], stable=True)]
        starts_S = torch.cumsum(self.sizes_S, 0) - self.sizes_S
        places = torch.arange(len(order), device=order.device)
        rank_G = torch.empty_like(order).index_copy_(0, order, places - starts_S[self.set_ids_G[order]])
        return rank_G < self.floors_S[self.set_ids_G]


class CoupledGrouper:
    """Groups over several weights, from any :class:`Grouping` of the library.

    One object stands for one proximal step: param groups that share it (with other learning rates or weight decays,
    say) are thresholded together, with the lambda and gamma of the first.

    Args:
        grouping: the groups; members that are buffers or consumers' input columns are left out.
        max_sparsity: largest fraction of the groups of a set that goes; its largest groups, at least one, are then
            never shrunk, so that no layer dies. None for no limit.
        relative: count norms in units of their set's mean (of the latents, now), so that sets of different scale
            compare; without it a network loses first the layers whose weights are smallest.

    Raises:
        ConfigError: ``max_sparsity`` is outside [0, 1].
    """

    def __init__(self, grouping: Grouping, max_sparsity: float | None = None, relative: bool = False) -> None:
        if max_sparsity is not None and not 0 <= max_sparsity <= 1:
            raise ConfigError(f"max_sparsity: {max_sparsity!r} is not allowed. Allowed: a number in [0, 1], or None")
        self.max_sparsity, self.relative = max_sparsity, relative
        self.bystanders: dict[int, Tensor] = {}
        self._take(grouping)

    def _take(self, grouping: Grouping) -> None:
        self.grouping = grouping.of_role(*PRODUCING)
        self._index()

    def _index(self) -> None:
        self.members: dict[int, list[Member]] = {}
        for member in self.grouping.members:
            if isinstance(member.parameter, nn.Parameter):
                self.members.setdefault(id(member.parameter), []).append(member)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and unpickled groupers hold other parameters than the original."""
        self.__dict__.update(state)
        self.bystanders = {id(parameter): parameter for parameter in self.bystanders.values()}
        self._index()

    def balance(self) -> Balance:
        """How the sets compare, and what stays of each."""
        sizes_S, floors_S = self.grouping.set_sizes, None
        if self.max_sparsity is not None:
            kept_S = torch.ceil((1 - self.max_sparsity) * sizes_S.double() - SLACK)
            floors_S = kept_S.long().clamp_(min=1)
        return Balance(self.grouping.set_ids, sizes_S, floors_S, self.relative)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the groups are made of, each once."""
        found = {id(member.parameter): member.parameter for member in self.grouping.members}
        return [parameter for parameter in found.values() if isinstance(parameter, nn.Parameter)]

    def knows(self, parameter: Tensor) -> bool:
        """Whether a parameter belongs to the groups, or did before channels were removed."""
        return id(parameter) in self.members or id(parameter) in self.bystanders

    def rebind(self, model: nn.Module) -> bool:
        """Take the parameters of the same names from a model (sharded since, or a copy); False if a shape differs."""
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        members = self.grouping.members
        for member in members:
            if member.name not in tensors or tensors[member.name].shape != member.parameter.shape:
                return False
        bound = tuple(replace(member, parameter=tensors[member.name]) for member in members)
        self._take(replace(self.grouping, members=bound, _cache={}))
        return True

    def refresh(self) -> None:
        """Follow a model whose weights have been replaced.

        Raises:
            ModelError: no model is known.
        """
        raise ModelError(
            "group_type: the weights of the grouping have been replaced; give the param groups a new CoupledGrouper"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.grouping.size} groups in {len(self.grouping.sets)} sets)"


@register("criterion", "producer_norm", "proximal")
@dataclass(frozen=True)
class ProducerNorm:
    """L2 norm of what makes a channel: the producers' rows and the norms' weights and biases, divided by the root of
    their size, as :class:`CoupledChannelGrouper` with group lasso compares them. A channel that a proximal step zeroed
    scores 0, so that it goes first, and without loss.
    """

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        producing = grouping.of_role(*PRODUCING)
        sums_G = producing.reduce_of(lambda weight_W: weight_W.float().square())
        return (sums_G / producing.counts().clamp(min=1).to(sums_G)).sqrt()


@register("grouper", "CoupledChannelGrouper", "coupledchannelgrouper")
class CoupledChannelGrouper(CoupledGrouper):
    """One group for each channel of the model's dependency graph that can be removed.

    Args:
        model: the model.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        layers: layers or containers whose channels may go; None for all.
        exclude: layers or containers whose channels stay.
        max_sparsity, relative: see :class:`CoupledGrouper`.
        forward_fn: how to call the model, if not as ``model(*inputs)``.

    Raises:
        ConfigError: a name that is not a layer of the model.
        ModelError: the inputs are rejected, or nothing can be removed.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        max_sparsity: float | None = None,
        relative: bool = False,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        self.model, self.example_inputs, self.forward_fn = model, example_inputs, forward_fn
        self.layers, self.exclude = layers, tuple(exclude)
        self.channels = self._trace()
        super().__init__(self.channels.grouping, max_sparsity, relative)

    def _trace(self) -> ChannelGroups:
        chosen = chosen_layers(self.model, self.layers, self.exclude)
        return removable_channels(self.model, self.example_inputs, chosen, self.forward_fn)

    def refresh(self) -> None:
        """Follow the model after its weights were replaced; it is traced again if channels have been removed."""
        if self.rebind(self.model):
            return
        try:
            self.channels = self._trace()
        except ModelError as error:
            logger.info("no channel is left to be chosen from: %s", error)
            self.channels = ChannelGroups(Grouping("channel", (), ()))
        self._take(self.channels.grouping)
        others = (parameter for parameter in self.model.parameters() if id(parameter) not in self.members)
        self.bystanders = {id(parameter): parameter for parameter in others}

    @torch.no_grad()
    def zeroed_G(self) -> Tensor:
        """For each group, True if all of it is 0 now: what can be removed without loss."""
        return self.grouping.reduce_of(lambda weight_W: (weight_W != 0).float()).cpu() == 0

    def removal_rule(self, **options: Any) -> dict[str, Any]:
        """A rule for :class:`pruningawaretraining.Pruning` that removes just what is 0 now.

        Args:
            options: other fields of the rule.

        Raises:
            ConfigError: nothing is 0.
        """
        gone = int(self.zeroed_G().sum())
        if not gone:
            raise ConfigError("removal_rule: no channel is 0 yet. Allowed: after the steps that zero some")
        rule = {"criterion": "producer_norm", "target": {"sparsity": gone / self.grouping.size}, "layers": self.layers}
        return {**rule, "exclude": list(self.exclude), **options}

    def param_groups(self, **options: Any) -> list[dict[str, Any]]:
        """Param groups of the model: the coupled parameters with ``options``, and all the others.

        Args:
            options: keys of the first group, such as ``prox_type`` and ``reg_lambda``.
        """
        coupled = self.parameters()
        inside = {id(parameter) for parameter in coupled}
        rest = [parameter for parameter in self.model.parameters() if id(parameter) not in inside]
        first = {"params": coupled, "group_type": self, "prox_type": "ProxGroupLasso", **options}
        return [first, {"params": rest}] if rest else [first]
