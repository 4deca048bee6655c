"""A grouping labels weights: it says which of them live or die together.

Shape suffixes: ``_G`` groups, ``_W`` the shape of a weight, ``_S`` slots (distinct label combinations of one member).
All else composes with :meth:`Grouping.reduce` and :meth:`Grouping.expand`: a mask is ``w *= expand(keep)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import across, full_of, is_sharded, local_member, local_of
from pruningawaretraining.groups.placed import placed
from pruningawaretraining.groups.products import Product

ROLES = ("out", "in", "norm", "bias", "raw", "made", "read", "element", "buffer", "block")


@dataclass(frozen=True, eq=False)
class Member:
    """One tensor's part in a grouping.

    Args:
        name, parameter: the tensor, and its qualified name in the model.
        labels: for each dimension of the tensor, an int64 vector as long as that dimension with labels in
            ``[0, size]``, where ``size`` means "outside every group"; None where the dimension does not matter.
        sizes: how many labels each dimension has (1 for None).
        slots: int64 vector, as long as the product of ``sizes``, that maps the raveled labels to groups, the number
            of groups meaning "outside"; None when slot s simply is group ``offset + s``.
        offset: the group of slot 0 when ``slots`` is None.
        role: "out" and "in" weights of a layer, a "norm" weight, a "bias", a "raw" parameter, an "element" of a pattern
            inside layers, a "buffer" such as a running mean, or part of a residual "block" beside groups in it.
    """

    name: str
    parameter: Tensor
    labels: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    slots: Tensor | None = None
    offset: int = 0
    role: str = "element"

    @classmethod
    def along(cls, name: str, parameter: Tensor, dim: int, groups: Tensor, size: int, role: str = "element") -> Member:
        """A member whose entries along one dimension belong to groups: ``groups`` has that dimension's length, with
        values in ``[0, size]``, where ``size`` (the number of groups) means outside."""
        dim = dim % parameter.dim()
        labels: list[Tensor | None] = [None] * parameter.dim()
        labels[dim] = torch.arange(parameter.shape[dim])
        sizes = [1] * parameter.dim()
        sizes[dim] = parameter.shape[dim]
        return cls(name, parameter, tuple(labels), tuple(sizes), groups, 0, role)

    @property
    def n_slots(self) -> int:
        return math.prod(self.sizes)

    @cached_property
    def identity(self) -> tuple[bool, ...]:
        """For each dimension, whether its labels simply count 0, 1, 2 ... (nothing to gather)."""
        return tuple(
            label is not None and len(label) == size and bool((label.cpu() == torch.arange(size)).all())
            for label, size in zip(self.labels, self.sizes, strict=True)
        )

    @cached_property
    def has_outside(self) -> tuple[bool, ...]:
        return tuple(
            label is not None and len(label) > 0 and int(label.max()) >= size
            for label, size in zip(self.labels, self.sizes, strict=True)
        )

    def to(self, device: torch.device) -> Member:
        """The same member with its index vectors on ``device``."""
        labels = tuple(None if label is None else label.to(device) for label in self.labels)
        return replace(self, labels=labels, slots=None if self.slots is None else self.slots.to(device))

    def slot_sums(self, values_W: Tensor) -> Tensor:
        """Sum the entries of a tensor shaped like the member over each slot: vector of ``n_slots``."""
        free = [dim for dim, label in enumerate(self.labels) if label is None]
        sums = values_W.sum(dim=free, keepdim=True) if free else values_W
        for dim, label in enumerate(self.labels):
            if label is None or self.identity[dim]:
                continue
            shape = list(sums.shape)
            shape[dim] = self.sizes[dim] + 1
            here = placed(label, sums.device)
            sums = sums.new_zeros(shape).index_add_(dim, here, sums).narrow(dim, 0, self.sizes[dim])
        return sums.reshape(-1)

    def spread(self, slots_S: Tensor, outside: float) -> Tensor:
        """The adjoint of :meth:`slot_sums`: a tensor that broadcasts to the member's shape."""
        spread = slots_S.reshape(self.sizes)
        for dim, label in enumerate(self.labels):
            if label is None or self.identity[dim]:
                continue
            if self.has_outside[dim]:
                shape = list(spread.shape)
                shape[dim] = 1
                spread = torch.cat([spread, spread.new_full(shape, outside)], dim)
            spread = spread.index_select(dim, placed(label, spread.device))
        return spread


@dataclass(frozen=True)
class GroupSet:
    """A run of groups that are ranked, capped and counted together: a layer, or the channels of coupled layers.

    Args:
        name, start, stop: the layer that stands for the set, whose groups are ``start .. stop - 1``.
        width: how many channels a group stands for (more than 1 where groups of a grouped convolution are tied).
        signature, kind: equal for sets of one topology, and for sets whose size is one number of the config.
        layers, least: names of the layers that belong to the set, the source first; how many groups always stay.
    """

    name: str
    start: int
    stop: int
    width: int = 1
    signature: str = ""
    layers: tuple[str, ...] = ()
    least: int = 1
    kind: str = ""

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Grouping:
    """``size`` groups over one or more tensors; see the module's docstring.

    Args:
        name: the pattern that made it.
        members: the tensors and their labels; a tensor may appear more than once (out and in channels).
        sets: consecutive runs of groups that cover ``0 .. size - 1``.
        skipped: layers that were selected and have no group, each with the reason.
        products: sums of products of the groups in the code of modules; for costs of the dense model.
    """

    name: str
    members: tuple[Member, ...]
    sets: tuple[GroupSet, ...]
    skipped: tuple[str, ...] = ()
    products: tuple[Product, ...] = ()
    _cache: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def size(self) -> int:
        return self.sets[-1].stop if self.sets else 0

    @cached_property
    def set_sizes(self) -> Tensor:
        """Groups in each set."""
        return torch.tensor([group_set.size for group_set in self.sets], dtype=torch.int64)

    @cached_property
    def set_ids(self) -> Tensor:
        """For each group, the index of its set, int64."""
        return torch.repeat_interleave(torch.arange(len(self.sets)), self.set_sizes)

    def of_role(self, *roles: str) -> Grouping:
        """The same groups over only the members of the given roles."""
        return replace(self, members=tuple(member for member in self.members if member.role in roles), _cache={})

    def without_role(self, *roles: str) -> Grouping:
        """The same groups over the members of every other role."""
        return replace(self, members=tuple(member for member in self.members if member.role not in roles), _cache={})

    def without_tensors(self, names: Collection[str]) -> Grouping:
        """The same groups over the members of every other tensor."""
        members = tuple(member for member in self.members if member.name not in names)
        return replace(self, members=members, _cache={}) if names else self

    def select_sets(self, numbers: Sequence[int]) -> Grouping:
        """The groups of some sets alone, renumbered in the order of ``numbers``; members index channels by slots."""
        chosen = [self.sets[number] for number in numbers]
        size = sum(one.size for one in chosen)
        renumbered = torch.full((self.size + 1,), size, dtype=torch.int64)
        sets, start = [], 0
        for one in chosen:
            renumbered[one.start : one.stop] = torch.arange(start, start + one.size)
            sets.append(replace(one, start=start, stop=start + one.size))
            start += one.size
        members = []
        for member in self.members:
            if member.slots is None:
                raise ValueError(f"{member.name}: only members with slots can be renumbered")
            slots = renumbered[member.slots.cpu()]
            if bool((slots < size).any()):
                members.append(replace(member, slots=slots))
        products = tuple(one.renumbered(renumbered) for one in self.products)
        return Grouping(self.name, tuple(members), tuple(sets), (), products)

    def to(self, device: torch.device | str) -> Grouping:
        """The same grouping with its index vectors on ``device``."""
        where = torch.device(device)
        return replace(self, members=tuple(member.to(where) for member in self.members), _cache={})

    def reduce(self, values: Iterable[Tensor]) -> Tensor:
        """Sum element values over each group.

        Args:
            values: one tensor for each member, in order, shaped like the member's tensor.

        Returns:
            Vector of ``size`` sums; elements outside every group are left out.
        """
        total_G: Tensor | None = None
        part_G: Tensor | None = None  # of what lies on this process
        for member, values_W in zip(self.members, values, strict=True):
            if is_sharded(values_W):
                sums_S = local_member(member).slot_sums(local_of(values_W))
                part_G = sums_S.new_zeros(self.size + 1) if part_G is None else part_G
                add_slots(part_G, member, sums_S)
                continue
            sums_S = member.slot_sums(values_W)
            if total_G is None:
                total_G = sums_S.new_zeros(self.size + 1)
            add_slots(total_G, member, sums_S)
        if part_G is not None:
            part_G = across(part_G, (member.parameter for member in self.members))
            total_G = part_G if total_G is None else total_G + part_G
        return torch.zeros(self.size) if total_G is None else total_G[:-1]

    def reduce_of(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``reduce`` of a function of each member's tensor, evaluated once for each distinct tensor."""
        distinct = {id(member.parameter): member.parameter for member in self.members}
        if len(distinct) == len(self.members):  # the values of one at a time are held
            return self.reduce(function(member.parameter.detach()) for member in self.members)
        known = {number: function(parameter.detach()) for number, parameter in distinct.items()}
        return self.reduce(known[id(member.parameter)] for member in self.members)

    def gathered(self) -> Grouping:
        """The same groups over whole tensors where processes hold parts of them: a collective, a copy of them all."""
        whole = {id(one.parameter): full_of(one.parameter) for one in self.members if is_sharded(one.parameter)}
        if not whole:
            return self
        members = tuple(replace(one, parameter=whole.get(id(one.parameter), one.parameter)) for one in self.members)
        return replace(self, members=members, _cache={})

    def expand(self, values_G: Tensor, outside: float = 0.0) -> list[tuple[Member, Tensor]]:
        """The adjoint of :meth:`reduce`: every member with a tensor that broadcasts to its shape.

        Args:
            values_G: one value for each group.
            outside: the value of elements that are in no group (1 for masks, 0 for penalties).
        """
        padded = torch.cat([values_G, values_G.new_full((1,), outside)])
        out = []
        for member in self.members:
            if member.slots is None:
                slots_S = values_G[member.offset : member.offset + member.n_slots]
            else:
                slots_S = padded[placed(member.slots, padded.device)]
            out.append((member, member.spread(slots_S, outside)))
        return out

    def counts(self) -> Tensor:
        """How many elements (over all members) each group has."""
        if "counts" not in self._cache:
            ones = (torch.ones((), dtype=torch.float64).expand(member.parameter.shape) for member in self.members)
            self._cache["counts"] = self.reduce(ones).long()
        return self._cache["counts"]


def add_slots(total_G1: Tensor, member: Member, sums_S: Tensor) -> None:
    """Add one number for each slot of a member to its group's, in place; the last entry is for what is outside."""
    if member.slots is None:
        total_G1[member.offset : member.offset + member.n_slots].add_(sums_S)
    else:
        total_G1.index_add_(0, placed(member.slots, sums_S.device), sums_S)


def concat(groupings: Sequence[Grouping], name: str | None = None) -> Grouping:
    """One grouping of all the groups of several, in order."""
    total = sum(grouping.size for grouping in groupings)
    members: list[Member] = []
    sets: list[GroupSet] = []
    products: list[Product] = []
    start = 0
    for grouping in groupings:
        for member in grouping.members:
            slots = member.slots
            if slots is not None:
                slots = torch.where(slots >= grouping.size, total, slots + start)
            members.append(replace(member, slots=slots, offset=member.offset + start))
        sets.extend(replace(one, start=one.start + start, stop=one.stop + start) for one in grouping.sets)
        whole_G1 = torch.cat([torch.arange(start, start + grouping.size), torch.tensor([total])])
        products += [one.renumbered(whole_G1) for one in grouping.products]
        start += grouping.size
    return Grouping(
        name or (groupings[0].name if groupings else ""), tuple(members), tuple(sets), products=tuple(products)
    )
