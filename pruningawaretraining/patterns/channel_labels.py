"""Coupled channels as groups: their sets, and the tensors that they index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pruningawaretraining.config.computed_weights import why_computed
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member
from pruningawaretraining.groups.products import Product
from pruningawaretraining.models.fake_quant import is_converted
from pruningawaretraining.models.masked_norms import is_foreign_rms_norm
from pruningawaretraining.patterns.attachments import Counts, Norms, Reductions
from pruningawaretraining.patterns.attention import attention_blocks
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.coupling import DependencyMap, Indices, Space, WorkOf
from pruningawaretraining.patterns.projections import is_transposed_linear
from pruningawaretraining.patterns.raw_products import made_by_none, makers_in_code, raw_weights, roles_in_code

Conv = nn.modules.conv._ConvNd
Norm = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)

BY_HEADS = "(prune it by heads)"
"""How reasons end that advise it."""


def is_producer(module: object) -> bool:
    """Whether a layer makes channels: convolutions, linear and recurrent layers."""
    return isinstance(module, (Conv, nn.Linear, nn.RNNBase, nn.RNNCellBase)) or (
        isinstance(module, nn.Module) and is_transposed_linear(module)
    )


def producer_names(model: nn.Module) -> list[str]:
    """The layers that make channels: convolutions, linear and recurrent layers."""
    return [name for name, module in model.named_modules() if is_producer(module)]


def channel_groups(model: nn.Module, dependencies: DependencyMap, chosen: set[str]) -> ChannelGroups:
    """Group the coupled channels into sets, and label every tensor that they index.

    Args:
        model: the traced model.
        dependencies: its coupled channels.
        chosen: names of the layers that may lose output channels.
    """
    blocked = {**dependencies.blocked, **_blocked_by_parameters(model, dependencies)}
    raw = raw_weights(model)
    order = {name: place for place, name in enumerate([*(name for name, _ in model.named_modules()), *raw])}
    producers = _producers_of_components(dependencies)
    producers |= makers_in_code(dependencies, blocked, producers, raw)
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
    skipped = {**_advised(model, skipped), **made_by_none(dependencies, blocked, producers)}
    runs = sorted(members.items(), key=lambda run: min(order[dependencies.spaces[index].name] for index in run[0]))
    return _label(model, dependencies, [(key, parts) for key, parts in runs if len(parts) > 1], order, skipped)


def _advised(model: nn.Module, skipped: dict[str, str]) -> dict[str, str]:
    """Reasons whose advice is to prune by heads, without it where no heads are known."""
    if not any(BY_HEADS in reason for reason in skipped.values()):
        return skipped
    found, unread = attention_blocks(model)
    known = {layer for one in found for layer in one.layers}
    return {
        name: reason if name in known else reason.replace(BY_HEADS, f"({_no_heads(name, unread)})")
        for name, reason in skipped.items()
    }


def _no_heads(layer: str, unread: Mapping[str, str]) -> str:
    """Why a layer cannot be pruned by heads."""
    around = next((name for name in unread if layer == name or layer.startswith(f"{name}." if name else "")), None)
    return "its heads are not known either" + ("" if around is None else f": {unread[around]}")


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
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    owners = Counter(id(tensor) for _, tensor in named)
    blocked: dict[int, str] = {}
    for space, components in zip(dependencies.spaces, dependencies.components, strict=True):
        problem = _layer_problem(space, owners)
        if problem:
            for component in np.unique(components):
                blocked.setdefault(int(component), f"{space.name}: {problem}")
    return blocked


def _layer_problem(space: Space, owners: Counter[int]) -> str:
    module = space.owner
    if isinstance(module, Tensor):
        return "a parameter that several modules share" if owners[id(module)] > 1 else ""
    assert module is not None
    if any(owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
        return "its weight is shared with another module"
    if any(is_converted(parameter) for parameter in module.parameters(recurse=False)):
        return "its weight is quantized already; prune before it is converted"
    if nn.utils.parametrize.is_parametrized(module):
        return why_computed(module, next(iter(module.parametrizations)))  # type: ignore[arg-type]
    if problem := why_computed(module):
        return problem
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
    sets, group_of, total = _numbered(dependencies, runs, order)
    members: list[Member] = []
    norms = {name: torch.from_numpy(group_of[components]) for name, components in dependencies.norms.items()}
    norms = {name: groups for name, groups in norms.items() if bool((groups < total).any())}
    touched: list[list[str]] = [[] for _ in sets]
    topology: list[list[str]] = [[] for _ in sets]
    set_of = np.repeat(np.arange(len(sets)), [one.size for one in sets])
    roles = roles_in_code(dependencies, [key for key, _ in runs], group_of, set_of)
    for number, (space, components) in enumerate(zip(dependencies.spaces, dependencies.components, strict=True)):
        groups = group_of[components]
        if len(groups) == 0 or (groups == total).all():
            continue
        members += _members(space, torch.from_numpy(groups), total, roles.get(number, ""))
        norm = _norm_of(space, modules)
        if norm is not None:
            norms.setdefault(norm, torch.from_numpy(groups))
        for mine in np.unique(set_of[groups[groups < total]]):
            touched[mine].append(space.name)
            topology[mine].append(f"{type(space.owner).__name__}:{space.side}")
    named = tuple(_finish(one, touched[index], topology[index], order, model) for index, one in enumerate(sets))
    counted = {".".join(place): torch.from_numpy(group_of[parts]) for place, parts in dependencies.widths.items()}
    counted = {place: groups for place, groups in counted.items() if bool((groups < total).any())}
    products = tuple(_product(one, group_of, total) for one in dependencies.works)
    products = tuple(one for one in products if one.out_N is not None or one.in_N is not None)
    grouping = Grouping("channel", tuple(members), named, products=products)
    reductions = {place: torch.from_numpy(group_of[parts]) for place, parts in dependencies.reductions.items()}
    reductions = {place: groups for place, groups in reductions.items() if bool((groups < total).any())}
    return ChannelGroups(grouping, skipped, (Norms(norms), Reductions(reductions), Counts(counted)))


def _numbered(
    dependencies: DependencyMap, runs: list[tuple[tuple[int, ...], list[int]]], order: dict[str, int]
) -> tuple[list[GroupSet], Indices, int]:
    """The sets, the group of each component (their number for those outside), and the number of groups."""
    total = sum(len(components) for _, components in runs)
    known = [*dependencies.components, *dependencies.norms.values(), *dependencies.widths.values()]
    known += dependencies.reductions.values()
    known += [part for one in dependencies.works for part in (*one.outputs, *one.inputs)]
    highest = max((int(part.max()) for part in known if part.size), default=0)
    group_of = np.full(highest + 1, total, dtype=np.int64)
    sets: list[GroupSet] = []
    start = 0
    for key, parts in runs:
        names = {index: dependencies.spaces[index].name for index in key}
        source = min(key, key=lambda index: (names[index] in {one.name for one in sets}, order[names[index]]))
        channels = dependencies.components[source]
        mine = channels[np.isin(channels, parts)]
        ordered = mine[np.sort(np.unique(mine, return_index=True)[1])]
        group_of[ordered] = np.arange(start, start + len(ordered))
        width = max(1, len(mine) // max(1, len(ordered)))
        sets.append(GroupSet(dependencies.spaces[source].name, start, start + len(ordered), width))
        start += len(ordered)
    return sets, group_of, total


def _product(one: WorkOf, group_of: Indices, total: int) -> Product:
    """A module's own products, with the groups that they are about."""
    sides = []
    for parts in (one.outputs, one.inputs):
        groups = [torch.from_numpy(group_of[part]) for part in parts]
        sides.append(next((side for side in groups if bool((side < total).any())), None))
    return Product(one.layer, one.macs, *sides)


def _norm_of(space: Space, modules: dict[str, nn.Module]) -> str | None:
    """The norm layer whose channels a space has, if it is one's."""
    if isinstance(space.owner, Norm):
        return space.name
    owner = space.name.rpartition(".")[0]
    norm = modules.get(owner)
    is_norm = isinstance(norm, nn.RMSNorm) or is_foreign_rms_norm(norm)
    return owner if isinstance(space.owner, Tensor) and is_norm else None


def _finish(one: GroupSet, names: list[str], topology: list[str], order: dict[str, int], model: nn.Module) -> GroupSet:
    modules = dict(model.named_modules())
    layers = [name for name in dict.fromkeys(names) if is_producer(modules.get(name)) and name != one.name]
    layers.sort(key=order.__getitem__)
    return GroupSet(one.name, one.start, one.stop, one.width, "|".join(sorted(topology)), (one.name, *layers))


def _members(space: Space, groups: Tensor, total: int, role: str = "") -> list[Member]:
    """The tensors of a layer that its channel indices slice; ``role`` of a raw weight, "" for any other."""
    owner = space.owner
    if isinstance(owner, Tensor):
        role = role or ("raw" if isinstance(owner, nn.Parameter) else "buffer")
        return [Member.along(space.name, owner, space.dim, groups, total, role)]
    assert owner is not None
    transposed = is_transposed_linear(owner) or (isinstance(owner, Conv) and owner.transposed)
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        return []  # its weights are raw parameters
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
