"""Channels: a group is one channel of a layer and everything that the dependency graph couples to it.

That is the filter and its bias, the same channel of every layer in the same residual stream, the weights of norms
behind it, and the input columns of all consumers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member, concat
from pruningawaretraining.models.calling import ForwardFn
from pruningawaretraining.models.fake_quant import is_converted, resting
from pruningawaretraining.models.masked_norms import is_foreign_rms_norm
from pruningawaretraining.models.skipped_blocks import Block
from pruningawaretraining.patterns.attention import is_transposed_linear
from pruningawaretraining.patterns.dependency import TRACE_LIMIT, DependencyMap, Space, trace
from pruningawaretraining.patterns.head import Heads, chosen_heads, find_heads, is_of_heads
from pruningawaretraining.patterns.selection import select
from pruningawaretraining.registry import register

log = logging.getLogger(__name__)

Conv = nn.modules.conv._ConvNd
Norm = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def is_producer(module: object) -> bool:
    """Whether a layer makes channels: convolutions and linear layers."""
    return isinstance(module, (Conv, nn.Linear)) or (isinstance(module, nn.Module) and is_transposed_linear(module))


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """What the channel pattern found.

    Args:
        grouping: one group per removable channel, one set per run of coupled layers.
        skipped: layer -> why its channels stay.
        norms: norm layer -> the group of each of its channels (``grouping.size`` for channels outside every group).
        heads: attention block -> its heads, where they are groups too.
        blocks: residual block -> its group, where whole blocks are groups.
    """

    grouping: Grouping
    skipped: dict[str, str] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Heads] = field(default_factory=dict)
    blocks: dict[str, Block] = field(default_factory=dict)

    def restrict(self, model: nn.Module, keep_G: Tensor) -> ChannelGroups:
        """The groups that are left after the others have been removed from the model."""
        keep_G = keep_G.cpu()
        size = int(keep_G.sum())
        renumbered = torch.full((self.grouping.size + 1,), size, dtype=torch.int64)
        renumbered[:-1][keep_G] = torch.arange(size)
        alive_G1 = torch.cat([keep_G, torch.ones(1, dtype=torch.bool)])
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        members = []
        for member in self.grouping.members:
            dim = next(index for index, label in enumerate(member.labels) if label is not None)
            slots = _restricted(member.slots, alive_G1, renumbered)
            if len(slots) == 0:  # of a block that is gone
                continue
            members.append(Member.along(member.name, tensors[member.name], dim, slots, size, member.role))
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(keep_G.long(), 0)])
        sets = tuple(
            replace(one, start=int(bounds[one.start]), stop=int(bounds[one.stop])) for one in self.grouping.sets
        )
        norms = {name: _restricted(groups, alive_G1, renumbered) for name, groups in self.norms.items()}
        heads = {
            name: replace(one, groups_H=_restricted(one.groups_H, alive_G1, renumbered))
            for name, one in self.heads.items()
        }
        blocks = {
            name: replace(one, group=int(renumbered[one.group]))
            for name, one in self.blocks.items()
            if keep_G[one.group]
        }
        if blocks:  # the layers of a set of blocks are its groups
            sets = tuple(replace(one, layers=tuple(name for name in one.layers if name in blocks)) for one in sets)
        return ChannelGroups(Grouping(self.grouping.name, tuple(members), sets), self.skipped, norms, heads, blocks)

    def on(self, copy: nn.Module) -> ChannelGroups:
        """The same groups on the tensors of a copy of the model."""
        return self.restrict(copy, torch.ones(self.grouping.size, dtype=torch.bool))

    def without(self, reasons: dict[int, str]) -> ChannelGroups:
        """The same without some sets, whose channels all stay.

        Args:
            reasons: number of a set -> why.
        """
        left = [number for number in range(len(self.grouping.sets)) if number not in reasons]
        grouping = self.grouping.select_sets(left)
        renumbered = torch.full((self.grouping.size + 1,), grouping.size, dtype=torch.int64)
        for number, one in zip(left, grouping.sets, strict=True):
            before = self.grouping.sets[number]
            renumbered[before.start : before.stop] = torch.arange(one.start, one.stop)
        norms = {name: renumbered[groups.cpu()] for name, groups in self.norms.items()}
        norms = {name: groups for name, groups in norms.items() if bool((groups < grouping.size).any())}
        heads = {name: replace(one, groups_H=renumbered[one.groups_H.cpu()]) for name, one in self.heads.items()}
        heads = {name: one for name, one in heads.items() if bool((one.groups_H < grouping.size).any())}
        blocks = {name: replace(one, group=int(renumbered[one.group])) for name, one in self.blocks.items()}
        blocks = {name: one for name, one in blocks.items() if one.group < grouping.size}
        skipped = {self.grouping.sets[number].name: reason for number, reason in reasons.items()}
        return ChannelGroups(grouping, {**self.skipped, **skipped}, norms, heads, blocks)

    def beside(self, grouping: Grouping, heads: dict[str, Heads], skipped: dict[str, str]) -> ChannelGroups:
        """These groups, and heads behind them."""
        first, both = self.grouping.size, concat([self.grouping, grouping], self.grouping.name)
        norms = {name: torch.where(groups >= first, both.size, groups) for name, groups in self.norms.items()}
        moved = {name: replace(one, groups_H=one.groups_H + first) for name, one in heads.items()}
        return ChannelGroups(both, {**self.skipped, **skipped}, norms, {**self.heads, **moved}, self.blocks)


def _restricted(groups: Tensor | None, alive_G1: Tensor, renumbered_G1: Tensor) -> Tensor:
    assert groups is not None
    groups = groups.cpu()
    return renumbered_G1[groups[alive_G1[groups]]]


@runtime_checkable
class StructuredPattern(Protocol):
    """A pattern whose groups can be removed physically."""

    def chosen(
        self, model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str] = (), key: str = ""
    ) -> set[str]:
        """The layers and blocks that a rule selects."""
        ...

    def head_units(self, model: nn.Module, chosen: set[str]) -> dict[str, str]:
        """Selected attention block -> what goes together there."""
        ...


@register("pattern", "channel", "channels")
@dataclass(frozen=True)
class Channel:
    """Whole channels, coupled through the dependency graph; they can be removed physically.

    Args:
        heads: attention heads too, in the same ranking and towards the same target.
    """

    heads: bool = False

    def build(
        self,
        model: nn.Module,
        inputs: Any,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        forward_fn: ForwardFn | None = None,
    ) -> ChannelGroups:
        """Trace the model and label its channels.

        Args:
            model: the model.
            inputs: example inputs.
            layers: only sets whose every layer that loses output channels is selected here; None for all.
            exclude: sets with one of these layers are left out.
            forward_fn: see :func:`pruningawaretraining.models.calling.call`.

        Raises:
            ConfigError: a name that is no layer of the model.
            ModelError: the inputs are rejected, or nothing can be pruned.
        """
        chosen = self.chosen(model, layers, exclude)
        return find_channels(model, inputs, chosen, forward_fn, self.head_units(model, chosen))

    def chosen(
        self, model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str] = (), key: str = ""
    ) -> set[str]:
        """The layers that a rule selects, and attention blocks if heads are wanted."""
        chosen = chosen_layers(model, layers, exclude, key)
        return chosen | chosen_heads(model, layers, exclude, key) if self.heads else chosen

    def head_units(self, model: nn.Module, chosen: set[str]) -> dict[str, str]:
        """Attention block -> what goes together there."""
        return dict.fromkeys(chosen - set(producer_names(model)), "group")


def producer_names(model: nn.Module) -> list[str]:
    """The layers that make channels: convolutions and linear layers."""
    return [name for name, module in model.named_modules() if is_producer(module)]


def chosen_layers(
    model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str] = (), key: str = ""
) -> set[str]:
    """The layers that may lose output channels.

    Args:
        model: the model.
        layers, exclude: layers or containers, as in a rule.
        key: of the rule, for messages.

    Raises:
        ConfigError: a name that is no layer of the model.
    """
    names, prefix = producer_names(model), f"{key}." if key else ""
    return select(model, layers, names, f"{prefix}layers") - select(model, list(exclude), names, f"{prefix}exclude")


def find_channels(
    model: nn.Module,
    inputs: Any,
    chosen: set[str],
    forward_fn: ForwardFn | None = None,
    units: Mapping[str, str] | None = None,
    limit: float = TRACE_LIMIT,
) -> ChannelGroups:
    """Trace a model and group its channels and heads.

    Args:
        model: the model.
        inputs, forward_fn: how to run it.
        chosen: the layers that may lose output channels; without any the model is not traced.
        units: attention blocks that may lose heads -> what goes together there, see
            :class:`pruningawaretraining.patterns.head.Head`.
        limit: seconds that the search for coupled channels may take; what is not finished then is left out.

    Raises:
        ModelError: the inputs are rejected, or nothing can be pruned.
    """
    units = units or {}
    found = ChannelGroups(Grouping("channel", (), ()))
    if chosen - units.keys() or not units:
        with resting(model):
            dependencies = trace(model, inputs, forward_fn, limit)
        found = channel_groups(model, dependencies, chosen)
    if units:
        found = found.beside(*find_heads(model, units))
        found = found.without(dict(_useless_heads(found)))
    if found.grouping.size == 0:
        reasons = "; ".join(f"{name or 'the model itself'}: {why}" for name, why in list(found.skipped.items())[:4])
        raise ModelError(
            f"model: {type(model).__name__} has no prunable channel group among {len(chosen)} selected layers. "
            f"{reasons}"
        )
    return found


def _useless_heads(found: ChannelGroups) -> Iterator[tuple[int, str]]:
    """Sets of heads that cannot be pruned beside the others: single heads, and what is cut into channels already."""
    taken: dict[tuple[str, int], int] = {}
    for member in found.grouping.members:
        assert member.slots is not None
        groups = member.slots[member.slots < found.grouping.size]
        dim = next(index for index, label in enumerate(member.labels) if label is not None)
        number = int(found.grouping.set_ids[groups[0]]) if len(groups) else -1
        if number >= 0 and taken.setdefault((member.name, dim), number) != number:
            first = found.grouping.sets[taken[member.name, dim]]
            if is_of_heads(found.grouping.sets[number]) and not is_of_heads(first):
                yield number, f"{member.name} is cut into channels of {first.name}"
    for number, one in enumerate(found.grouping.sets):
        if is_of_heads(one) and one.size == 1:
            yield number, "it has one head"


def channel_groups(model: nn.Module, dependencies: DependencyMap, chosen: set[str]) -> ChannelGroups:
    """Group the coupled channels into sets, and label every tensor that they index.

    Args:
        model: the traced model.
        dependencies: its coupled channels.
        chosen: names of the layers that may lose output channels.
    """
    blocked = {**dependencies.blocked, **_blocked_by_parameters(model, dependencies)}
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    producers = _producers_of_components(dependencies)
    skipped: dict[str, str] = {}
    members: dict[tuple[int, ...], list[int]] = {}
    for component, spaces in producers.items():
        names = sorted((dependencies.spaces[index].name for index in spaces), key=order.__getitem__)
        reason = blocked.get(component) or _not_chosen(names, chosen)
        if reason:
            for name in names:
                skipped.setdefault(name, reason if name in chosen or component in blocked else "not selected")
        else:
            members.setdefault(tuple(sorted(spaces)), []).append(component)
    runs = sorted(members.items(), key=lambda run: min(order[dependencies.spaces[index].name] for index in run[0]))
    return _label(model, dependencies, [(key, parts) for key, parts in runs if len(parts) > 1], order, skipped)


def _not_chosen(names: list[str], chosen: set[str]) -> str:
    missing = [name for name in names if name not in chosen]
    return f"coupled to {missing[0]}, which is not selected" if missing else ""


def _producers_of_components(dependencies: DependencyMap) -> dict[int, set[int]]:
    """For each component, the conv and linear layers whose outputs it holds (indices of spaces)."""
    producers: dict[int, set[int]] = {}
    for index, (space, components) in enumerate(zip(dependencies.spaces, dependencies.components, strict=True)):
        if is_producer(space.owner) and space.side != "in":
            for component in np.unique(components):
                producers.setdefault(int(component), set()).add(index)
    return producers


def _blocked_by_parameters(model: nn.Module, dependencies: DependencyMap) -> dict[int, str]:
    """Components of layers whose tensors cannot be sliced: tied, parametrized or of an unusual shape."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    blocked: dict[int, str] = {}
    for space, components in zip(dependencies.spaces, dependencies.components, strict=True):
        problem = _layer_problem(space, owners)
        if problem:
            for component in np.unique(components):
                blocked.setdefault(int(component), f"{space.name}: {problem}")
    return blocked


def _layer_problem(space: Space, owners: Counter[int]) -> str:
    module = space.owner
    if isinstance(module, nn.Parameter):
        return "a parameter that several modules share" if owners[id(module)] > 1 else ""
    assert module is not None
    if any(owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
        return "its weight is shared with another module"
    if any(is_converted(parameter) for parameter in module.parameters(recurse=False)):
        return "its weight is quantized already; prune before it is converted"
    if nn.utils.parametrize.is_parametrized(module) or hasattr(module, "weight_g"):
        return "its weight is parametrized"
    if isinstance(module, Conv) and module.groups > 1:
        if space.side == "both" and module.in_channels != module.out_channels:
            return "a depthwise convolution with fewer outputs than inputs"
        if space.side != "both" and module.transposed:
            return "a grouped transposed convolution"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return "a LayerNorm over several dimensions"
    if space.width is not None and len(space.seen) > space.width:
        return "indices beyond its width"
    return ""


def _label(
    model: nn.Module,
    dependencies: DependencyMap,
    runs: list[tuple[tuple[int, ...], list[int]]],
    order: dict[str, int],
    skipped: dict[str, str],
) -> ChannelGroups:
    modules = dict(model.named_modules())
    total = sum(len(components) for _, components in runs)
    highest = max((int(part.max()) for part in dependencies.components if len(part)), default=0)
    group_of = np.full(highest + 1, total, dtype=np.int64)
    sets: list[GroupSet] = []
    start = 0
    for key, parts in runs:
        source = min(key, key=lambda index: order[dependencies.spaces[index].name])
        channels = dependencies.components[source]
        mine = channels[np.isin(channels, parts)]
        ordered = mine[np.sort(np.unique(mine, return_index=True)[1])]
        group_of[ordered] = np.arange(start, start + len(ordered))
        width = max(1, len(mine) // max(1, len(ordered)))
        sets.append(GroupSet(dependencies.spaces[source].name, start, start + len(ordered), width))
        start += len(ordered)
    members: list[Member] = []
    norms: dict[str, Tensor] = {}
    touched: list[list[str]] = [[] for _ in sets]
    topology: list[list[str]] = [[] for _ in sets]
    set_of = np.repeat(np.arange(len(sets)), [one.size for one in sets])
    for space, components in zip(dependencies.spaces, dependencies.components, strict=True):
        groups = group_of[components]
        if len(groups) == 0 or (groups == total).all():
            continue
        members += _members(space, torch.from_numpy(groups), total)
        norm = _norm_of(space, modules)
        if norm is not None:
            norms[norm] = torch.from_numpy(groups)
        for number in np.unique(set_of[groups[groups < total]]):
            touched[number].append(space.name)
            topology[number].append(f"{type(space.owner).__name__}:{space.side}")
    named = tuple(_finish(one, touched[index], topology[index], order, model) for index, one in enumerate(sets))
    return ChannelGroups(Grouping("channel", tuple(members), named), skipped, norms)


def _norm_of(space: Space, modules: dict[str, nn.Module]) -> str | None:
    """The norm layer whose channels a space has, if it is one's."""
    if isinstance(space.owner, Norm):
        return space.name
    owner = space.name.rpartition(".")[0]
    norm = modules.get(owner)
    is_norm = isinstance(norm, nn.RMSNorm) or is_foreign_rms_norm(norm)
    return owner if isinstance(space.owner, nn.Parameter) and is_norm else None


def _finish(one: GroupSet, names: list[str], topology: list[str], order: dict[str, int], model: nn.Module) -> GroupSet:
    modules = dict(model.named_modules())
    layers = [name for name in dict.fromkeys(names) if is_producer(modules.get(name)) and name != one.name]
    layers.sort(key=order.__getitem__)
    return GroupSet(one.name, one.start, one.stop, one.width, "|".join(sorted(topology)), (one.name, *layers))


def _members(space: Space, groups: Tensor, total: int) -> list[Member]:
    """The tensors of a layer that its channel indices slice."""
    owner = space.owner
    if isinstance(owner, nn.Parameter):
        return [Member.along(space.name, owner, space.dim, groups, total, "raw")]
    assert owner is not None
    transposed = is_transposed_linear(owner) or (isinstance(owner, Conv) and owner.transposed)
    if is_producer(owner) and space.side == "in":
        return _input_members(space, owner, groups, total, transposed)
    if is_producer(owner):
        dim = 1 if transposed and space.side == "out" else 0
        return _along(space, groups, total, {"weight": (dim, "out"), "bias": (0, "bias"), **_extra(owner, len(groups))})
    if isinstance(owner, nn.Embedding):
        return _along(space, groups, total, {"weight": (1, "out")})
    if isinstance(owner, nn.PReLU):
        return _along(space, groups, total, {"weight": (0, "raw")} if owner.num_parameters > 1 else {})
    tensors = {"weight": (0, "norm"), "bias": (0, "bias"), "running_mean": (0, "buffer"), "running_var": (0, "buffer")}
    return _along(space, groups, total, tensors)


def _input_members(space: Space, layer: nn.Module, groups: Tensor, total: int, transposed: bool) -> list[Member]:
    if isinstance(layer, Conv) and layer.groups > 1:
        # Only the position inside a convolution group is indexed; equal positions are tied, so the first group tells.
        # With one input channel for each group there is nothing to slice: its filters are.
        per_group = layer.in_channels // layer.groups
        if per_group == 1:
            return []
        groups = groups[:per_group]
    return _along(space, groups, total, {"weight": (0 if transposed else 1, "in")})


def _along(space: Space, groups: Tensor, total: int, tensors: dict[str, tuple[int, str]]) -> list[Member]:
    members = []
    for attribute, (dim, role) in tensors.items():
        tensor = getattr(space.owner, attribute, None)
        if isinstance(tensor, Tensor):
            members.append(Member.along(f"{space.name}.{attribute}", tensor, dim, groups, total, role))
    return members


def _extra(layer: nn.Module, outputs: int) -> dict[str, tuple[int, str]]:
    """Parameters of a layer's own kind with one entry for each output, such as the gains of scaled convolutions."""
    own = {name: one for name, one in layer._parameters.items() if name not in ("weight", "bias") and one is not None}
    return {name: (0, "raw") for name, one in own.items() if one.dim() and one.numel() == one.shape[0] == outputs}
