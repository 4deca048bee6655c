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

from pruningawaretraining.errors import ModelError
from pruningawaretraining.grouping import Grouping, Member
from pruningawaretraining.inputs import ForwardFn
from pruningawaretraining.patterns.channel import Channel, ChannelGroups
from pruningawaretraining.registry import register
from pruningawaretraining.statistics import Statistics

log = logging.getLogger(__name__)

PRODUCING = ("out", "norm", "bias", "raw", "element")


class CoupledGrouper:
    """Groups over several weights, from any :class:`Grouping` of the library.

    One object stands for one proximal step: param groups that share it (with other learning rates or weight decays,
    say) are thresholded together, with the lambda and gamma of the first.

    Args:
        grouping: the groups; members that are buffers or consumers' input columns are left out.
        keep_one: never shrink the largest group of a set, so that no layer dies.
    """

    def __init__(self, grouping: Grouping, keep_one: bool = False) -> None:
        self.keep_one = keep_one
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
            ModelError: there is no model to look at.
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
        keep_one: never shrink the largest group of a set, so that no layer dies.
        forward_fn: how to call the model, if not as ``model(*inputs)``.

    Raises:
        ConfigError: a name that is no layer of the model.
        ModelError: the inputs are rejected, or nothing can be removed.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        keep_one: bool = False,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        self.model, self.example_inputs, self.forward_fn = model, example_inputs, forward_fn
        self.layers, self.exclude = layers, tuple(exclude)
        self.channels = self._trace()
        super().__init__(self.channels.grouping, keep_one)

    def _trace(self) -> ChannelGroups:
        return Channel().build(self.model, self.example_inputs, self.layers, self.exclude, self.forward_fn)

    def refresh(self) -> None:
        """Follow the model after its weights were replaced; it is traced again if channels have been removed."""
        if self.rebind(self.model):
            return
        try:
            self.channels = self._trace()
        except ModelError as error:
            log.info("no channel is left to be chosen from: %s", error)
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
        """
        gone = int(self.zeroed_G().sum())
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
