"""Nests of tensors in lists, tuples, mappings and dataclasses, on PyTorch's pytree.

Other types that are registered with pytree, such as caches of keys and values, count as leaves without tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def tensors_of(nest: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nest in order."""
    for leaf in pytree.tree_leaves(nest, is_leaf=_is_leaf):
        if isinstance(leaf, Tensor):
            yield leaf
        else:
            for value in _entries(leaf).values():
                yield from tensors_of(value)


def float_tensors_of(nest: Any) -> list[Tensor]:
    """The floating point tensors of :func:`tensors_of`."""
    return [tensor for tensor in tensors_of(nest) if tensor.is_floating_point()]


def map_tensors(function: Callable[[Tensor], Any], nest: Any) -> Any:
    """Rebuild a nest with ``function(tensor)`` for each tensor, in the order of :func:`tensors_of`.

    A mapping that is not registered with pytree becomes a dict.
    """

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not any(True for _ in tensors_of(leaf)):
            return leaf
        mapped = {key: map_tensors(function, value) for key, value in _entries(leaf).items()}
        if isinstance(leaf, (list, tuple)):
            return type(leaf)(mapped.values())
        return mapped if isinstance(leaf, Mapping) else dataclasses.replace(leaf, **mapped)

    return pytree.tree_map(of_leaf, nest, is_leaf=_is_leaf)


def with_tensors(nest: Any, tensors: Iterable[Tensor]) -> Any:
    """Rebuild a nest with other tensors, in order."""
    left = iter(tensors)
    return map_tensors(lambda _: next(left), nest)


def _is_leaf(node: Any) -> bool:
    return not isinstance(node, (list, tuple, Mapping))


def _entries(leaf: Any) -> Mapping[Any, Any]:
    """The entries of a container that pytree does not know; empty for a value."""
    if isinstance(leaf, Mapping):
        return leaf
    if isinstance(leaf, (list, tuple)):
        return dict(enumerate(leaf))
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return {item.name: getattr(leaf, item.name) for item in dataclasses.fields(leaf) if item.init}
    return {}
