"""How much worse the layers that read a channel do without it, once they have made up for it as well as they can.

Shape suffixes: ``_G`` groups, ``_N`` groups of one set, ``_Q`` a reader's inputs of one group, ``_D`` a reader's inputs
(channels by kernel positions), ``_X`` those and a constant 1, ``_O`` its outputs, ``_2N`` two rows of groups.

With M the covariance of a reader's inputs and H its inverse, taking inputs Q away costs ``tr(W_Q (H_QQ)^-1 W_Q')`` of
the variance of its outputs, the other weights being fitted anew. Groups go one by one, the cheapest first, and H and W
follow (optimal brain surgeon on whole groups: Hassibi and Stork 1993; Kurtic, Frantar and Alistarh 2023, ZipLM). All of
it is float64 on the device of the weights: the condition of M is about a thousand times its width, more than float32
resolves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pruningawaretraining.criteria.base import Needs, Statistics
from pruningawaretraining.criteria.second_order.channels import LEAST_SQUARES_DAMP, losing_readers, measure
from pruningawaretraining.criteria.second_order.fisher import decoupled_, factor, workplace
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.criteria.second_order.group_order import POOL, IndexedReader, ReadSet, cheapest_first
from pruningawaretraining.criteria.second_order.listening import MOMENTS, InputMomentsCollector
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member
from pruningawaretraining.registry import register

logger = logging.getLogger(__name__)

TOGETHER, TOGETHER_ELSEWHERE = {"cpu": 2**28}, 2**31
"""Bytes of inverses that are worked on at once, by kind of device: off the CPU many small kernels cost time."""
TINY, RAMP = 1e-30, 1e-9


@register("criterion", "reconstruction", "structured_obs")
@dataclass(frozen=True)
class Reconstruction:
    """Share of its readers' output variance that a channel's removal costs after a least-squares fit, channel by
    channel (structured OBS; Kurtic, Frantar and Alistarh 2023, ZipLM, here in relation to each layer's variance).

    Scores of several layers add up, so with a target of MACs, latency or parameters channels go by what they cost there
    unless the rule's ``allocation`` says otherwise. Data that the pruner was given is used; without, it listens to one
    training batch in sixteen.

    Args:
        num_batches: batches of the given data that are run.
    """

    needs: ClassVar[Needs] = Needs(kinds=("channel",), adds_up=True, loss=True)

    num_batches: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.num_batches, bool) or not isinstance(self.num_batches, int) or self.num_batches < 1:
            raise ValueError(f"num_batches: {self.num_batches!r} is not allowed. Allowed: whole numbers, 1 or more")

    def collector(self) -> InputMomentsCollector:
        """A new collector."""
        return InputMomentsCollector()

    def measured(self, model: nn.Module, grouping: Grouping, calibration: Calibration) -> dict[str, Tensor]:
        """The moments of all readers' inputs, on given data."""
        found = list(losing_readers(model, grouping, torch.zeros(grouping.size, dtype=torch.bool)))
        hooks = measure(found, calibration, self.num_batches)
        names = [reader.name for reader in found if reader.name in hooks.sums]
        return {f"{MOMENTS}.{name}.weight": hooks.hessian(name)[0] / 2 for name in names}

    @torch.no_grad()
    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        """See :class:`~pruningawaretraining.criteria.base.Criterion`.

        Raises:
            ConfigError: the groups are not channels that layers read, or none of the layers can be fitted.
        """
        reading = grouping.of_role("in").members
        if not reading:
            raise ConfigError(
                "criterion: 'reconstruction' requires layers that read the channels. Allowed: with 'channel' or 'head'"
            )
        known = [(member, statistics.tensors.get(f"{MOMENTS}.{member.name}")) for member in reading]
        readings = [
            _Reading(one, [(member, found) for member, found in known if found is not None and _reads(member, one)])
            for one in grouping.sets
        ]
        unread = [one.groups.name for one in readings if not one.members]
        if len(unread) == len(grouping.sets):
            raise ConfigError(
                f"criterion: 'reconstruction' finds no layer that reads {', '.join(unread[:4])} and can be fitted; "
                "nn.MultiheadAttention does not call its output projection as a module. Allowed: another criterion"
            )
        if unread:
            logger.warning("reconstruction: no layer that can be fitted reads %s; pruned last", ", ".join(unread[:8]))
        scores_G = torch.full((grouping.size,), torch.inf, dtype=torch.float64)
        for batch in _batches([one for one in readings if one.members]):
            for one, scores_N in zip(batch, _scores(batch), strict=True):
                scores_G[one.groups.start : one.groups.stop] = scores_N
        return scores_G


def _reads(member: Member, one: GroupSet) -> bool:
    slots = member.slots
    return slots is not None and bool(((slots >= one.start) & (slots < one.stop)).any())


@dataclass(frozen=True, eq=False)
class _Reading:
    """A set and the layers that read it, each with the moments of its inputs.

    Args:
        groups: the set.
        members: (weight that reads it, moments).
    """

    groups: GroupSet
    members: list[tuple[Member, Tensor]]

    @property
    def device(self) -> torch.device:
        """Where this is worked on."""
        return workplace(self.members[0][0].parameter.device)

    @property
    def bytes(self) -> int:
        """Memory of the inverses, and of what is kept for later."""
        return sum(16 * member.parameter[0].numel() ** 2 for member, _ in self.members)

    def opened(self) -> ReadSet:
        """Ready to be taken apart."""
        readers = [_reader(member, self.groups, moments_XX, self.device) for member, moments_XX in self.members]
        return ReadSet(readers, self.groups.size)


def _reader(member: Member, one: GroupSet, moments_XX: Tensor, device: torch.device) -> IndexedReader:
    """A reader, with the covariance of its inputs inverted, and weights in units in which all of its outputs have
    variance 1."""
    weight_OD = member.parameter.detach().flatten(1).to(device, torch.float64)
    moments_XX = moments_XX.to(device, torch.float64)
    means_D = moments_XX[-1, :-1]
    square_DD = torch.addr(moments_XX[:-1, :-1], means_D, means_D, alpha=-1)
    variance = ((weight_OD @ square_DD) * weight_OD).sum().clamp(min=TINY)
    square_DD.diagonal().add_(LEAST_SQUARES_DAMP * square_DD.diagonal().mean().clamp(min=1e-12))
    inverse_DD = torch.cholesky_inverse(factor(square_DD[None], 1e-12)[0])
    weight_OD = weight_OD / variance.sqrt()
    width = weight_OD.shape[1]
    inputs_NQ = _inputs_of(member, one, width)
    inputs_D, size = inputs_NQ.flatten(), inputs_NQ.shape[1]
    if torch.equal(inputs_D, torch.arange(width)):
        return IndexedReader(weight_OD, inverse_DD, size)
    missing_D = inputs_D == width  # groups that have fewer inputs than others: filled up with what nothing depends on
    places_D = inputs_D.clamp(max=width - 1).to(device)
    weight_OD, inverse_DD = weight_OD[:, places_D], inverse_DD[places_D][:, places_D]
    if bool(missing_D.any()):
        real_D = ~missing_D.to(device)
        weight_OD, inverse_DD = weight_OD * real_D, decoupled_(inverse_DD[None], real_D[None])[0]
    return IndexedReader(weight_OD, inverse_DD, size)


def _inputs_of(member: Member, one: GroupSet, width: int) -> Tensor:
    """A reader's inputs of each group of a set, (groups, most of any group), filled up with ``width``."""
    assert member.slots is not None
    kernel = width // len(member.slots)
    label_D = (member.slots.cpu() - one.start).repeat_interleave(kernel)
    inside = torch.nonzero((label_D >= 0) & (label_D < one.size)).flatten()
    order = inside[torch.argsort(label_D[inside], stable=True)]
    counts_N = torch.bincount(label_D[inside], minlength=one.size)
    found_NQ = torch.full((one.size, int(counts_N.max())), width, dtype=torch.int64)
    first_N = counts_N.cumsum(0) - counts_N
    found_NQ[label_D[order], torch.arange(len(order)) - first_N[label_D[order]]] = order
    return found_NQ


def _batches(readings: Sequence[_Reading]) -> list[list[_Reading]]:
    """Sets that are worked on together: in one place, with pools of one size, and not too much memory."""
    alike: dict[tuple[int, torch.device], list[_Reading]] = {}
    for one in readings:
        alike.setdefault((min(POOL, one.groups.size), one.device), []).append(one)
    batches: list[list[_Reading]] = []
    for (_, device), members in alike.items():
        room = 0
        for one in members:
            if one.bytes > room:
                batches.append([])
                room = TOGETHER.get(device.type, TOGETHER_ELSEWHERE)
            batches[-1].append(one)
            room -= one.bytes
    return batches


def _scores(readings: Sequence[_Reading]) -> list[Tensor]:
    """Increase of the loss by each group of some sets in the order of removal, non-decreasing; can be read once."""
    found = cheapest_first([one.opened() for one in readings])
    joined_2N = torch.stack([torch.cat([order.double() for order, _ in found]), torch.cat([loss for _, loss in found])])
    scores = []
    for order_N, losses_N in torch.split(joined_2N.cpu(), [one.groups.size for one in readings], 1):
        scores_N = torch.zeros(len(order_N), dtype=torch.float64)
        scores_N[order_N.long()] = _rising(losses_N.tolist())
        scores.append(scores_N)
    return scores


def _rising(losses: Sequence[float]) -> Tensor:
    """The rising sequence that is nearest to some losses (pool adjacent violators), so that sums stay what they are.

    Among equals each is a billionth above the one before: the order is known.
    """
    means: list[float] = []
    counts: list[int] = []
    for loss in losses:
        mean, size = max(loss, 0.0), 1
        while means and means[-1] >= mean:
            earlier, before = means.pop(), counts.pop()
            mean, size = (mean * size + earlier * before) / (size + before), size + before
        means.append(mean)
        counts.append(size)
    level = torch.repeat_interleave(torch.tensor(means, dtype=torch.float64), torch.tensor(counts))
    return level + RAMP * level.mean().clamp(min=TINY) * torch.arange(1, len(losses) + 1)
