"""Widths of layers from the shapes of their tensors: ``in_channels``, ``groups``, ``normalized_shape`` and others.

Shapes decide, and where they leave two readings the layer in front of it does; where that is silent too, the caller is
told so instead of being given a guess.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import CheckpointError

logger = logging.getLogger(__name__)

Conv = nn.modules.conv._ConvNd
Widths = dict[str, Any]
ADVICE = "save the model with save_pruned and load it with load_pruned, which knows"
HEADS = (
    "num_heads", "head_dim", "n_heads", "nhead", "n_head", "num_attention_heads", "attention_head_size",
    "num_key_value_heads", "num_key_value_groups",
)  # fmt: skip
"""Attributes of attention modules that no shape tells."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A module whose tensors have their new shapes already.

    Args:
        name: in the model.
        module: still with the dense model's widths.
        old_shapes: attribute -> shape in the dense model, of the tensors that changed.
    """

    name: str
    module: nn.Module
    old_shapes: dict[str, torch.Size] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return bool(self.old_shapes)

    def old_shape(self, attribute: str) -> torch.Size:
        """A tensor's shape in the dense model."""
        shape: torch.Size = getattr(self.module, attribute).shape
        return self.old_shapes.get(attribute, shape)

    def ambiguous(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.name} ({type(self.module).__name__}): {why}; {ADVICE}")


@dataclass
class Context:
    """The neighbourhood of a layer.

    Args:
        before: (outputs in the dense model, outputs now) of the convolution or linear layer defined before it.
        shrunk: widths of the dense model that some tensor no longer has.
    """

    before: tuple[int, int] | None = None
    shrunk: frozenset[int] = frozenset()


def read_widths(layers: Sequence[Layer]) -> list[tuple[Layer, Widths]]:
    """The widths of every layer that has to change.

    Args:
        layers: every module of a model, in the order of definition.

    Raises:
        CheckpointError: shapes contradict each other, or can be read in more than one way.
    """
    pairs = ((old, new) for layer in layers for old, new in _dimensions(layer))
    context = Context(shrunk=frozenset(old for old, new in pairs if old != new))
    found: list[tuple[Layer, Widths]] = []
    for layer in layers:
        reader = next((read for kinds, read in READERS if isinstance(layer.module, kinds)), None)
        widths = {}
        if reader is not None and (layer.changed or not _has_tensors(layer.module)):
            widths = reader(layer, context)
            found.append((layer, widths))
        elif layer.changed and _is_unread(layer.module):
            raise layer.ambiguous("its widths cannot be read from shapes")
        if isinstance(layer.module, (Conv, nn.Linear)):
            context.before = _outputs(layer, widths)
    _refuse_heads(layers)
    return found


def _is_unread(module: nn.Module) -> bool:
    """Whether a layer of torch has widths that no reader knows."""
    raw = isinstance(module, (nn.ParameterList, nn.ParameterDict))
    return not raw and type(module).__module__.startswith("torch.nn.modules.")


def _has_tensors(module: nn.Module) -> bool:
    own = [*module._parameters.values(), *module._buffers.values()]
    return any(tensor is not None for tensor in own) or nn.utils.parametrize.is_parametrized(module)


def _dimensions(layer: Layer) -> Iterator[tuple[int, int]]:
    for attribute, old in layer.old_shapes.items():
        yield from zip(old, getattr(layer.module, attribute).shape, strict=True)


def _outputs(layer: Layer, widths: Widths) -> tuple[int, int]:
    key = "out_features" if isinstance(layer.module, nn.Linear) else "out_channels"
    old = int(getattr(layer.module, key))
    return old, int(widths.get(key, old))


def _check_vectors(layer: Layer, width: int, attributes: Sequence[str]) -> None:
    """Check that tensors with one entry per output agree with the weight."""
    for attribute in attributes:
        tensor = getattr(layer.module, attribute, None)
        if isinstance(tensor, Tensor) and tensor.shape[0] != width:
            raise CheckpointError(
                f"weights: {layer.name}.{attribute} has {tensor.shape[0]} entries, its layer {width} outputs; "
                "is one of the two missing in the weights?"
            )


def _linear(layer: Layer, context: Context) -> Widths:
    outputs, inputs = layer.module.weight.shape  # type: ignore[union-attr,misc]
    _check_vectors(layer, outputs, ("bias",))
    return {"out_features": outputs, "in_features": inputs}


def _conv(layer: Layer, context: Context) -> Widths:
    module = layer.module
    assert isinstance(module, Conv)
    first, second = module.weight.shape[:2]
    groups = _conv_groups(layer, context)
    inputs, outputs = (first, second * groups) if module.transposed else (second * groups, first)
    _check_vectors(layer, outputs, ("bias",))
    return {"groups": groups, "in_channels": inputs, "out_channels": outputs}


def _conv_groups(layer: Layer, context: Context) -> int:
    """How many groups a convolution has now: as many as before, or fewer of the same size."""
    module = layer.module
    assert isinstance(module, Conv)
    if module.groups == 1:
        return 1
    (old_first, old_second), (first, second) = layer.old_shape("weight")[:2], module.weight.shape[:2]
    size = old_first // module.groups
    readings = [module.groups] if first % module.groups == 0 else []
    if second == old_second and first % size == 0 and first // size not in readings:
        readings.append(first // size)
    if len(readings) == 2:
        readings = [groups for groups in readings if _fits_neighbours(layer, context, groups)]
    if len(readings) == 1:
        return readings[0]
    raise layer.ambiguous(
        f"a weight of shape {tuple(module.weight.shape)} does not tell how many groups are left of {module.groups}"
    )


def _fits_neighbours(layer: Layer, context: Context, groups: int) -> bool:
    """Whether a number of groups agrees with the bias of a transposed convolution, or with the layer in front."""
    module = layer.module
    assert isinstance(module, Conv)
    if module.transposed:
        return module.bias is None or len(module.bias) == module.weight.shape[1] * groups
    inputs = module.in_channels if context.before is None else context.before[1]
    return int(module.weight.shape[1]) * groups == inputs


def _batch_norm(layer: Layer, context: Context) -> Widths:
    parts = [getattr(layer.module, name, None) for name in ("weight", "running_mean", "running_var")]
    width = next((len(tensor) for tensor in parts if isinstance(tensor, Tensor)), None)
    if width is None:  # the attribute is not used then
        width = context.before[1] if context.before else int(layer.module.num_features)  # type: ignore[arg-type]
    _check_vectors(layer, width, ("weight", "bias", "running_mean", "running_var"))
    return {"num_features": width}


def _layer_norm(layer: Layer, context: Context) -> Widths:
    module = layer.module
    assert isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    if not _has_tensors(module):
        last = _bare_width(layer, context, module.normalized_shape[-1])
        return {"normalized_shape": (*module.normalized_shape[:-1], last)}
    _check_vectors(layer, module.weight.shape[0], ("bias",))
    return {"normalized_shape": tuple(module.weight.shape)}


def _group_norm(layer: Layer, context: Context) -> Widths:
    module = layer.module
    assert isinstance(module, nn.GroupNorm)
    if not _has_tensors(module):
        width = _bare_width(layer, context, module.num_channels)
    else:
        width = len(module.weight)
        _check_vectors(layer, width, ("bias",))
    size = module.num_channels // module.num_groups
    fewer = width // size if width % size == 0 else None
    if width % module.num_groups:
        if fewer is None:
            raise layer.ambiguous(f"{width} channels cannot be shared by {module.num_groups} groups")
        return {"num_channels": width, "num_groups": fewer}
    if fewer not in (None, module.num_groups):
        logger.warning(
            "%s: %d channels are read as %d groups; %d groups of %d would have the same shapes: %s",
            layer.name, width, module.num_groups, fewer, size, ADVICE,
        )  # fmt: skip
    return {"num_channels": width, "num_groups": module.num_groups}


def _bare_width(layer: Layer, context: Context, width: int) -> int:
    """The width of a norm without tensors, from the layer in front of it.

    Raises:
        CheckpointError: that layer has another width, and something of this norm's width has changed.
    """
    if context.before is not None and context.before[0] == width:
        return context.before[1]
    if width in context.shrunk:
        raise layer.ambiguous(f"it has no tensor that tells whether its width is still {width}")
    return width


def _prelu(layer: Layer, context: Context) -> Widths:
    return {"num_parameters": len(layer.module.weight)}  # type: ignore[arg-type]


def _embedding(layer: Layer, context: Context) -> Widths:
    rows, width = layer.module.weight.shape  # type: ignore[union-attr,misc]
    padding = layer.module.padding_idx
    if isinstance(padding, int) and padding >= rows:
        raise layer.ambiguous(f"its padding index {padding} is beyond the {rows} rows that are left")
    return {"num_embeddings": rows, "embedding_dim": width}


READERS: tuple[tuple[Any, Callable[[Layer, Context], Widths]], ...] = (
    (Conv, _conv),
    (nn.Linear, _linear),
    (nn.modules.batchnorm._NormBase, _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.GroupNorm, _group_norm),
    (nn.PReLU, _prelu),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
)


def _refuse_heads(layers: Sequence[Layer]) -> None:
    """Attention whose projections have changed: the number of heads and their width cannot both be read.

    The last projection only leads back to the residual stream; its outputs say nothing about heads.
    """
    changed = {layer.name: layer for layer in layers if layer.changed}
    for layer in layers:
        counts = [name for name in HEADS if isinstance(layer.module.__dict__.get(name), int)]
        if not counts:
            continue
        path = f"{layer.name}." if layer.name else ""
        children = [(f"{path}{name}", child) for name, child in layer.module.named_children()]
        projections = [name for name, child in children if isinstance(child, (Conv, nn.Linear))]
        widened = [name for name in projections[:-1] if _outputs_changed(changed.get(name))]
        if widened or layer.changed:
            raise layer.ambiguous(f"the shapes of {(widened or [layer.name])[0]} do not tell {' and '.join(counts)}")


def _outputs_changed(layer: Layer | None) -> bool:
    if layer is None or "weight" not in layer.old_shapes:
        return False
    dim = 1 if isinstance(layer.module, Conv) and layer.module.transposed else 0
    weight: Tensor = layer.module.weight  # type: ignore[assignment]
    return layer.old_shapes["weight"][dim] != weight.shape[dim]
