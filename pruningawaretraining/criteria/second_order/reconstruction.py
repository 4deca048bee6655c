"""How much worse the layers that read a channel do without it, once they have made up for it as well as they can.

Shape suffixes: ``_G`` groups, ``_N`` groups of one set, ``_P`` a pool of them, ``_Q`` a reader's inputs of one group,
``_D`` a reader's inputs (channels by kernel positions) and one more that nothing depends on, ``_X`` those and a
constant 1, ``_O`` its outputs.

With M the covariance of a reader's inputs and H its inverse, taking inputs Q away costs ``tr(W_Q (H_QQ)^-1 W_Q')`` of
the variance of its outputs, the other weights being fitted anew. Groups go one by one, the cheapest first, and H and W
follow (optimal brain surgeon on whole groups: Hassibi and Stork 1993; Kurtic, Frantar and Alistarh 2023, ZipLM).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pruningawaretraining.criteria.second_order.channels import LEAST_SQUARES_DAMP, losing_readers, measure
from pruningawaretraining.criteria.second_order.fisher import factor
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.criteria.second_order.listening import MOMENTS, InputMomentsCollector
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.grouping import Grouping, GroupSet, Member
from pruningawaretraining.registry import register
from pruningawaretraining.statistics import Statistics

log = logging.getLogger(__name__)

POOL = 32
"""The cheapest groups among which the next are found exactly; half of them go before all are looked at again."""
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

    not_for_blocks: ClassVar[bool] = True
    for_channels: ClassVar[bool] = True
    adds_up: ClassVar[bool] = True

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
        """See :class:`~pruningawaretraining.statistics.Criterion`.

        Raises:
            ConfigError: the groups are not channels that layers read, or none of the layers can be fitted.
        """
        reading = grouping.of_role("in").members
        if not reading:
            raise ConfigError(
                "criterion: 'reconstruction' scores channels by the layers that read them, and there are none. "
                "Allowed: with 'channel' or 'head'"
            )
        known = {member: statistics.tensors.get(f"{MOMENTS}.{member.name}") for member in reading}
        scores_G = torch.full((grouping.size,), torch.inf, dtype=torch.float64)
        unread: list[str] = []
        for one in grouping.sets:
            parts = [
                _part(member, one, moments_XX)
                for member, moments_XX in known.items()
                if moments_XX is not None and _reads(member, one)
            ]
            if parts:
                scores_G[one.start : one.stop] = _marginal_losses(parts, one.size).cpu()
            else:
                unread.append(one.name)
        if len(unread) == len(grouping.sets):
            raise ConfigError(
                f"criterion: 'reconstruction' knows no layer that reads {', '.join(unread[:4])} and can be fitted; "
                "nn.MultiheadAttention runs its output projection as no module of its own. Allowed: another criterion"
            )
        if unread:
            log.warning("reconstruction: no layer that can be fitted reads %s; pruned last", ", ".join(unread[:8]))
        return scores_G


def _reads(member: Member, one: GroupSet) -> bool:
    slots = member.slots
    return slots is not None and bool(((slots >= one.start) & (slots < one.stop)).any())


@dataclass(eq=False)
class _Part:
    """A reader, as far as it reads one set.

    Args:
        weight_OD: its weights, in units in which all of its outputs have variance 1.
        inverse_DD: the inverse of its inputs' covariance.
        inputs_NQ: its inputs of each group; short rows are filled with the input that nothing depends on.
    """

    weight_OD: Tensor
    inverse_DD: Tensor
    inputs_NQ: Tensor

    def losses(self, groups: Tensor) -> Tensor:
        """What each of some groups costs if it goes alone."""
        inputs_NQ = self.inputs_NQ[groups]
        square_NQQ = self.inverse_DD[inputs_NQ[:, :, None], inputs_NQ[:, None, :]]
        square_NQQ = square_NQQ + torch.diag_embed((inputs_NQ == self._spare).to(square_NQQ))
        weight_NQO = self.weight_OD[:, inputs_NQ].permute(1, 2, 0)
        fitted_NQO: Tensor = torch.linalg.solve(square_NQQ, weight_NQO)
        return (weight_NQO * fitted_NQO).sum((1, 2))

    @property
    def _spare(self) -> int:
        return self.weight_OD.shape[1] - 1

    def within(self, groups_P: Tensor) -> _Part:
        """The same of a pool of groups alone; what happens among them needs no other."""
        inputs = torch.unique(self.inputs_NQ[groups_P])
        inputs = torch.cat([inputs[inputs != self._spare], inputs.new_tensor([self._spare])])
        places = torch.searchsorted(inputs, self.inputs_NQ[groups_P])
        return _Part(self.weight_OD[:, inputs], self.inverse_DD[inputs][:, inputs], places)

    def drop(self, groups: Tensor) -> None:
        """Take groups away; the rest is fitted anew. They must not be asked for again."""
        alive = torch.ones(self.weight_OD.shape[1], dtype=torch.bool, device=self.weight_OD.device)
        alive[self.inputs_NQ[groups]] = False
        alive[self._spare] = True
        kept, gone = torch.nonzero(alive).flatten(), torch.nonzero(~alive).flatten()
        rows = self.inverse_DD[gone]
        across = rows[:, kept]
        pull = torch.cholesky_solve(across, factor(rows[:, gone][None], TINY)[0])
        self.weight_OD = self.weight_OD[:, kept] - self.weight_OD[:, gone] @ pull
        self.inverse_DD = self.inverse_DD[kept][:, kept].addmm_(across.mT, pull, alpha=-1)
        self.inputs_NQ = (alive.cumsum(0) - 1)[self.inputs_NQ]


def _part(member: Member, one: GroupSet, moments_XX: Tensor) -> _Part:
    """A reader, with the covariance of its inputs factored."""
    device = torch.device("cpu") if member.parameter.device.type == "mps" else member.parameter.device
    weight_OD = member.parameter.detach().flatten(1).to(device, torch.float64)
    moments_XX = moments_XX.to(device, torch.float64)
    means_D = moments_XX[-1, :-1]
    square_DD = moments_XX[:-1, :-1] - torch.outer(means_D, means_D)
    variance = ((weight_OD @ square_DD) * weight_OD).sum().clamp(min=TINY)
    square_DD.diagonal().add_(LEAST_SQUARES_DAMP * float(square_DD.diagonal().mean().clamp(min=1e-12)))
    width = weight_OD.shape[1]
    inverse_DD = torch.eye(width + 1, dtype=torch.float64, device=device)
    inverse_DD[:width, :width] = torch.cholesky_inverse(factor(square_DD[None], 1e-12)[0])
    weight_OD = torch.nn.functional.pad(weight_OD / variance.sqrt(), (0, 1))
    return _Part(weight_OD, inverse_DD, _inputs_of(member, one, width).to(device))


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


def _losses(parts: Sequence[_Part], groups: Tensor) -> Tensor:
    return torch.stack([part.losses(groups.to(part.inputs_NQ.device)).cpu() for part in parts]).sum(0)


def _marginal_losses(parts: Sequence[_Part], count: int) -> Tensor:
    """What each group of a set adds to the loss when its turn comes, rising in that order."""
    order: list[int] = []
    losses: list[float] = []
    left = torch.arange(count)
    while len(left):
        pool_P = left[torch.argsort(_losses(parts, left), stable=True)[:POOL]]
        going = len(left) if len(left) <= POOL else POOL // 2
        inner = [part.within(pool_P.to(part.inputs_NQ.device)) for part in parts]
        open_P = torch.ones(len(pool_P), dtype=torch.bool)
        for _ in range(going):
            among = torch.nonzero(open_P).flatten()
            found = _losses(inner, among)
            place = int(found.argmin())
            order.append(int(pool_P[among[place]]))
            losses.append(float(found[place]))
            open_P[among[place]] = False
            for part in inner:
                part.drop(among[place : place + 1].to(part.inputs_NQ.device))
        gone = pool_P[~open_P]
        if len(gone) < len(left):
            for part in parts:
                part.drop(gone.to(part.inputs_NQ.device))
        left = left[~torch.isin(left, gone)]
    scores_N = torch.zeros(count, dtype=torch.float64)
    scores_N[torch.tensor(order)] = _rising(losses)
    return scores_N


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
