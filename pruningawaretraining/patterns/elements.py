"""Base of slices, blocks, N:M and single weights: they label the weights of layers, one set per layer.

Shape suffixes: ``_O`` output channels, ``_I`` input channels, ``_K`` kernel positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pruningawaretraining.config.computed_weights import COMPUTED, why_computed
from pruningawaretraining.errors import ConfigError, ModelError, unknown
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member, concat
from pruningawaretraining.patterns.selection import select

logger = logging.getLogger(__name__)

Conv = nn.modules.conv._ConvNd
LAYERS = (Conv, nn.Linear)
LAYER_TYPES = ("Conv", "Linear")
CLASS_NAMES = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear")

Labels = tuple[Tensor | None, int]
"""The labels of one dimension, and how many there are; see :class:`~pruningawaretraining.groups.grouping.Member`."""


@dataclass(frozen=True, eq=False)
class LayerWeight:
    """The weight of a layer, and which of its dimensions are what.

    Args:
        name: the layer's name.
        layer: the layer.
        parameter: its weight.
        out_dim, in_dim: dimensions of output and input channels; those after them are the kernel's.
    """

    name: str
    layer: nn.Module
    parameter: Tensor
    out_dim: int
    in_dim: int

    @property
    def kernel_dims(self) -> range:
        return range(2, self.parameter.dim())

    @property
    def depthwise(self) -> bool:
        groups = getattr(self.layer, "groups", 1)
        return groups > 1 and groups == getattr(self.layer, "in_channels", 0)


def layer_weights(
    model: nn.Module,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    types: Sequence[str] = LAYER_TYPES,
    spare_last: bool = False,
) -> list[LayerWeight]:
    """The weights of the selected convolutions and linear layers, each tensor once, in the model's order.

    Args:
        model: the model.
        layers, exclude: see :func:`pruningawaretraining.patterns.selection.select`; None for all.
        types: parts of the names of the layers' classes, such as "Conv" or "Linear".
        spare_last: leave out the last linear layer (most often a classifier), unless ``layers`` are given.

    Raises:
        ConfigError: a name that is not a layer or class of the model.
        ModelError: nothing is selected.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    _check_types(model, types)
    typed = {name for name, module in found.items() if any(part in type(module).__name__ for part in types)}
    chosen = select(model, layers, typed, "layers") - select(model, list(exclude), typed, "exclude")
    if spare_last and layers is None:
        linear = [name for name, module in found.items() if isinstance(module, nn.Linear)]
        chosen -= set(linear[-1:])
    weights: dict[int, LayerWeight] = {}
    for name, module in found.items():
        if name in chosen and _has_plain_weight(name, module):
            weights.setdefault(id(module.weight), _layer_weight(name, module))
    if not weights:
        computed = [f"{name}: {_why_not_plain(module)}" for name, module in found.items() if name in chosen]
        raise ModelError(_nothing_selected(type(model).__name__, len(found), layers, exclude, types, computed))
    return list(weights.values())


def _nothing_selected(
    model: str,
    found: int,
    layers: Sequence[str] | None,
    exclude: Sequence[str],
    types: Sequence[str],
    computed: Sequence[str],
) -> str:
    if not found:
        return f"layers: {model} has no convolution or linear layer"
    if computed:
        return f"layers: none of {model} has a weight of its own. {'; '.join(computed[:3])}"
    whole = f"the {found} convolutions and linear layers of {model}"
    given = f"exclude: {list(exclude)!r}, types: {list(types)!r}"
    if layers is None:
        return f"layers: nothing is left of {whole} without {given}"
    return f"layers: {list(layers)!r} selects none of {whole} ({given})"


def _layer_weight(name: str, module: nn.Module) -> LayerWeight:
    transposed = bool(getattr(module, "transposed", False))
    assert isinstance(module.weight, Tensor)
    return LayerWeight(name, module, module.weight, int(transposed), int(not transposed))


def _has_plain_weight(name: str, module: nn.Module) -> bool:
    if isinstance(getattr(module, "weight", None), nn.UninitializedParameter):
        raise ModelError(f"layers: {name!r} has no weight yet; run the model once before pruning it")
    if isinstance(getattr(module, "weight", None), nn.Parameter):
        return True
    logger.info("%s stays as it is: %s", name, _why_not_plain(module))
    return False


def _why_not_plain(module: nn.Module) -> str:
    return why_computed(module) or f"its weight {COMPUTED}"


def _check_types(model: nn.Module, types: Sequence[str]) -> None:
    known = {*CLASS_NAMES, *(type(module).__name__ for module in model.modules() if isinstance(module, LAYERS))}
    for part in types:
        if not part or not any(part in name for name in known):
            raise ConfigError(unknown("types", part, known))


def build_grouping(
    name: str, weights: Iterable[LayerWeight], label: Callable[[LayerWeight], Sequence[Labels] | str]
) -> Grouping:
    """Label the weights of layers, one set of groups for each.

    Args:
        name: of the grouping.
        weights: the layers.
        label: gives labels for each dimension, or the reason why it has none.

    Raises:
        ModelError: no layer has any group.
    """
    parts, skipped = [], []
    for weight in weights:
        labels = label(weight)
        if isinstance(labels, str):
            logger.info("%s stays as it is: %s", weight.name, labels)
            skipped.append(f"{weight.name}: {labels}")
        else:
            parts.append(_one_layer(name, weight, [_checked(weight, one) for one in labels]))
    if not parts:
        raise ModelError(f"pattern: {name!r} finds no group in the selected layers. {'; '.join(skipped[:4])}")
    return replace(concat(parts, name), skipped=tuple(skipped))


def _checked(weight: LayerWeight, labels: Labels | None) -> Labels:
    """The labels of one dimension; None stands for a dimension that does not matter."""
    pair = (None, 1) if labels is None else labels
    good = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], int) and pair[1] > 0
    if good and pair[0] is not None:
        good = isinstance(pair[0], Tensor) and pair[0].ndim == 1
        good = good and not pair[0].is_floating_point() and pair[0].dtype is not torch.bool
    if not good:
        raise TypeError(f"labels of {weight.name} are {pair!r:.80}, not (vector of whole numbers, how many) or None")
    return pair


def _one_layer(name: str, weight: LayerWeight, labels: Sequence[Labels]) -> Grouping:
    member = Member(
        f"{weight.name}.weight" if weight.name else "weight",
        weight.parameter,
        tuple(label for label, _ in labels),
        tuple(size for _, size in labels),
    )
    signature = f"{type(weight.layer).__name__}:{tuple(weight.parameter.shape)}"
    return Grouping(name, (member,), (GroupSet(weight.name, 0, member.n_slots, 1, signature, (weight.name,)),))


def each(length: int) -> Labels:
    """Every entry by itself."""
    return torch.arange(length), length


def whole(length: int) -> Labels:
    """All entries together."""
    return None, 1


def blocks(length: int, width: int) -> Labels:
    """Neighbours in blocks; the last block may be short (it is padded)."""
    if width == 1:
        return each(length)
    return (None, 1) if width >= length else (torch.arange(length) // width, -(-length // width))


def layer_module(model: nn.Module, member: Member) -> nn.Module:
    """The layer that a member's parameter belongs to."""
    return model.get_submodule(member.name.rpartition(".")[0])


def input_dims(model: nn.Module, grouping: Grouping) -> list[int]:
    """For each member, the dimension of its input channels."""
    return [0 if getattr(layer_module(model, member), "transposed", False) else 1 for member in grouping.members]
