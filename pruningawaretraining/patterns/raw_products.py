"""Channels that no layer makes: the hidden width of experts whose weights are raw parameters of products in code."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from torch import nn

from pruningawaretraining.patterns.coupling import DependencyMap, Indices, Space

MOST_DIMS = 2
"""Dimensions of one parameter that may lose entries: costs are counted by outputs and inputs."""


def raw_weights(model: nn.Module) -> list[str]:
    """Parameters of more than one dimension in modules that are not PyTorch's own: weights of products in code."""
    return [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn.")
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() > 1
    ]


def makers_in_code(
    dependencies: DependencyMap, blocked: Mapping[int, str], producers: Mapping[int, set[int]], known: Collection[str]
) -> dict[int, set[int]]:
    """For each component that products of raw weights alone make and sum over, the spaces of the weights that make it.

    The weight that is used first makes the channels, and so do others that have them along the same dimension and are
    of the same shape (gates).

    Args:
        dependencies: coupled channels.
        blocked: component -> why it stays.
        producers: component -> spaces of the layers that make it.
        known: see :func:`raw_weights`.
    """
    made = {int(number) for one in dependencies.works for part in one.outputs for number in part}
    summed = {int(number) for one in dependencies.works for part in one.inputs for number in part}
    inside = np.array(sorted((made & summed) - producers.keys() - blocked.keys()), dtype=np.int64)
    found: dict[int, list[int]] = {}
    free: dict[str, int] = {}
    for index, (space, components) in enumerate(zip(dependencies.spaces, dependencies.components, strict=True)):
        numbers = np.unique(components)
        if isinstance(space.owner, nn.Parameter):
            free[space.name] = free.get(space.name, 0) + any(number not in blocked for number in numbers.tolist())
        for number in numbers[np.isin(numbers, inside)].tolist():
            found.setdefault(number, []).append(index)
    return {
        number: makers
        for number, indices in found.items()
        if (makers := _makers([(index, dependencies.spaces[index]) for index in indices], known, free))
    }


def made_by_none(
    dependencies: DependencyMap, blocked: Mapping[int, str], producers: Mapping[int, set[int]]
) -> dict[str, str]:
    """Raw weights that products outside of layers sum over, and whose channels no layer makes or reads: the reason."""
    summed = {int(number): one.where for one in dependencies.works for part in one.inputs for number in part}
    held: dict[tuple[str, ...], str] = {}
    places: dict[int, list[tuple[Space, str]]] = {}
    for space, components in zip(dependencies.spaces, dependencies.components, strict=True):
        for number in np.unique(components).tolist():
            if number in summed and number not in producers:
                is_raw = isinstance(space.owner, nn.Parameter) and space.owner.dim() > 1
                places.setdefault(number, []).append((space, f"dimension {space.dim}" if is_raw else ""))
    for number, found in places.items():
        if len(found) > 1 and all(where for _, where in found):
            names = tuple(f"{where} of {space.name}" for space, where in found)
            held_by = f"only raw parameters hold its channels ({', '.join(names)}), and no layer makes them"
            reason = f"{held_by}: they are summed over {summed[number]}"
            held.setdefault((found[0][0].name, *names), blocked.get(number, reason))
    return {key[0]: reason for key, reason in held.items()}


def _makers(spaces: list[tuple[int, Space]], known: Collection[str], free: Mapping[str, int]) -> set[int]:
    """The spaces that make a component; none if it is not held by raw weights alone, one making and one reading it."""
    raw = [(index, one) for index, one in spaces if one.name in known]
    counted = all(free[one.name] <= MOST_DIMS for _, one in raw)
    if len(raw) < 2 or not counted or any(not isinstance(one.owner, nn.Parameter) for _, one in spaces):
        return set()
    first = raw[0][1]
    makers = {index for index, one in raw if one.dim == first.dim and one.width == first.width and _alike(one, first)}
    return makers if len(makers) < len(raw) else set()


def roles_in_code(
    dependencies: DependencyMap, keys: Sequence[tuple[int, ...]], group_of: Indices, set_of: Indices
) -> dict[int, str]:
    """Space of a raw weight -> its role in a set that products in code make.

    Args:
        dependencies: coupled channels.
        keys: for each set the spaces that make it.
        group_of: component -> its group.
        set_of: group -> its set.
    """
    found: dict[int, str] = {}
    for index, (space, components) in enumerate(zip(dependencies.spaces, dependencies.components, strict=True)):
        groups = group_of[components]
        for number in np.unique(set_of[groups[groups < len(set_of)]]).tolist():
            maker = dependencies.spaces[keys[number][0]].owner
            if isinstance(maker, nn.Parameter) and isinstance(space.owner, nn.Parameter):
                if index in keys[number]:
                    found[index] = "made"
                elif space.owner.dim() == maker.dim():
                    found[index] = "read"
    return found


def _alike(one: Space, other: Space) -> bool:
    return getattr(one.owner, "shape", None) == getattr(other.owner, "shape", None)
