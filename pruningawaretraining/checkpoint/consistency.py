"""Whether what a file says of layers agrees with the tensors in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.models.calling import evaluating

Conv = nn.modules.conv._ConvNd
MAY_GROW = ("num_key_value_groups", "n_rep")
"""Attributes that may be larger in a pruned model: query heads to each key head."""


def check_smaller(name: str, attribute: str, old: Any, new: Any) -> None:
    """Refuse an attribute that a removal cannot have led to.

    Args:
        name: of the layer.
        attribute, old: what it is in the dense model: one number, or several.
        new: what the file says.

    Raises:
        CheckpointError: another number of numbers, or one that is below 1 or above the dense model's.
    """
    pairs = list(zip(_numbers(old), _numbers(new), strict=False))
    fewer = len(_numbers(old)) == len(_numbers(new)) and bool(pairs)
    if fewer and all(a == b or b >= 1 and (b <= a or attribute in MAY_GROW) for a, b in pairs):
        return
    raise CheckpointError(
        f"path: it gives {name or 'the model'} {attribute}={new!r}. Allowed: at least 1, and at most the dense {old!r}"
    )


def _numbers(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def disagreements(model: nn.Module) -> dict[str, str]:
    """Layers whose widths are not those of their tensors, each with what is wrong."""
    with evaluating(model), torch.no_grad():  # a spectral norm takes a step when its weight is asked for in training
        return {name: wrong for name, module in model.named_modules() if (wrong := _disagreement(module)) is not None}


def _disagreement(module: Any) -> str | None:
    """What is wrong with the widths of one layer."""
    if any(map(nn.parameter.is_lazy, module._parameters.values())):
        return None
    facts = (fact for kinds, widths in WIDTHS if isinstance(module, kinds) for fact in widths(module))
    return next((text for text, holds in facts if not holds), None)


Facts = Iterator[tuple[str, bool]]


def _conv(module: Any) -> Facts:
    outputs, inputs, groups = module.out_channels, module.in_channels, module.groups
    yield (
        f"{groups} groups of {inputs} and {outputs} channels",
        groups >= 1 and not (inputs % groups or outputs % groups),
    )
    first, second = (inputs, outputs) if module.transposed else (outputs, inputs)
    expected = (first, second // max(groups, 1))
    yield (
        f"{inputs} channels to {outputs} in {groups} groups with a weight of shape {tuple(module.weight.shape)}",
        tuple(module.weight.shape[:2]) == expected,
    )
    yield from _vectors(module, outputs, "bias")


def _linear(module: Any) -> Facts:
    shape = (module.out_features, module.in_features)
    yield f"a weight of shape {tuple(module.weight.shape)} for {shape}", tuple(module.weight.shape) == shape
    yield from _vectors(module, module.out_features, "bias")


def _batch_norm(module: Any) -> Facts:
    yield from _vectors(module, module.num_features, "weight", "bias", "running_mean", "running_var")


def _layer_norm(module: Any) -> Facts:
    for name in ("weight", "bias"):
        tensor = getattr(module, name, None)
        shape = tuple(module.normalized_shape)
        yield f"a {name} for {shape}", not isinstance(tensor, Tensor) or tuple(tensor.shape) == shape


def _group_norm(module: Any) -> Facts:
    yield f"{module.num_groups} groups of {module.num_channels} channels", module.num_channels % module.num_groups == 0
    yield from _vectors(module, module.num_channels, "weight", "bias")


def _prelu(module: Any) -> Facts:
    yield from _vectors(module, module.num_parameters, "weight")


def _embedding(module: Any) -> Facts:
    shape = (module.num_embeddings, module.embedding_dim)
    yield f"a weight of shape {tuple(module.weight.shape)} for {shape}", tuple(module.weight.shape) == shape


def _vectors(module: Any, width: int, *names: str) -> Facts:
    for name in names:
        tensor = getattr(module, name, None)
        yield f"a {name} for {width}", not isinstance(tensor, Tensor) or tuple(tensor.shape) == (width,)


WIDTHS: tuple[tuple[Any, Callable[[Any], Facts]], ...] = (
    (Conv, _conv),
    (nn.Linear, _linear),
    (nn.modules.batchnorm._NormBase, _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.GroupNorm, _group_norm),
    (nn.PReLU, _prelu),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
)
