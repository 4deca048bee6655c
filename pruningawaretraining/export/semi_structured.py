"""2:4 weights as PyTorch's semi-structured sparse tensors: half the memory, and sparse matrix products on GPUs.

Shape suffixes: ``_OI`` the weight of a linear layer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.costs.latency.layer_shapes import layer_shapes
from pruningawaretraining.errors import ConfigError, ModelError, unknown
from pruningawaretraining.export.semi_structured_choice import Bench, GpuBench, LayerSpeed, measure_layer
from pruningawaretraining.models.calling import ForwardFn

logger = logging.getLogger(__name__)

CAPABILITY = (8, 0)
"""The first CUDA devices with sparse matrix products (Ampere)."""
DTYPES = (torch.float16, torch.bfloat16)
MULTIPLE = 64
"""Both dimensions of a weight must be a multiple of this, for every backend and type."""


def is_two_of_four(weight_OI: Tensor) -> bool:
    """Whether at most 2 of every 4 weights that follow each other along a row are not 0."""
    if weight_OI.dim() != 2 or weight_OI.shape[1] % 4:
        return False
    return bool(((weight_OI != 0).reshape(-1, 4).sum(-1) <= 2).all())


class Converted(list[str]):
    """Names of the layers that have been converted, with what was measured.

    Attributes:
        layers: of every layer that could be converted.
    """

    def __init__(self, layers: Iterable[LayerSpeed]) -> None:
        self.layers = tuple(layers)
        super().__init__(one.name for one in self.layers if one.converted)

    @property
    def speedup(self) -> float:
        """How many times as fast the measured layers are together, those that stay dense included."""
        before = math.fsum(one.dense_ms for one in self.layers)
        after = math.fsum(one.sparse_ms if one.converted and one.sparse_ms else one.dense_ms for one in self.layers)
        return before / after if after else 1.0


def to_semi_structured(
    model: nn.Module,
    layers: Iterable[str] | None = None,
    example_inputs: Any = None,
    forward_fn: ForwardFn | None = None,
    *,
    rows: int = 1024,
    only_faster: bool = True,
) -> Converted:
    """Replace the weights of linear layers by semi-structured sparse tensors, for inference.

    Each layer is timed dense, with cuSPARSELt and with CUTLASS, and takes the fastest form; layers that stay dense are
    logged. Outputs change by rounding only. Converted parameters are frozen and out of reach of masks: convert last, in
    half precision on the GPU, and save the dense weights.

    Args:
        model: changed in place.
        layers: names of linear layers; None for every one that is 2:4 and fits (others are left and logged).
        example_inputs: as the model takes them, of the size that it will run on: layers are measured on as many rows as
            they get there, and those that are not reached stay dense.
        forward_fn: how to call the model on them, if not as ``model(*example_inputs)``.
        rows: that layers are measured on without example inputs.
        only_faster: False converts what is slower too: its weights take half the memory all the same.

    Returns:
        Names of the layers that have been converted; their ``layers`` and ``speedup`` say what was measured.

    Raises:
        ModelError: the device has no sparse matrix products, a layer does not exist, or a named one is not 2:4,
            has another type, or dimensions that are no multiple of 64, or the model rejects the inputs; nothing has
            changed then.
        ConfigError: rows below 1.

    Source: Mishra et al. 2021, Accelerating Sparse Deep Neural Networks.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ConfigError(f"rows: {rows!r} is not a whole number of at least 1")
    chosen = _chosen(model, layers)
    for name, one in chosen.items():
        check_device(one.weight, name)
    rows_of = dict.fromkeys(chosen, rows)
    if example_inputs is not None:
        shapes = layer_shapes(model, example_inputs, list(chosen), forward_fn)
        rows_of = {name: shape.rows for name, shape in shapes.items()}
    return convert(chosen, rows_of, GpuBench(), only_faster)


def convert(layers: Mapping[str, nn.Linear], rows_of: Mapping[str, int], bench: Bench, only_faster: bool) -> Converted:
    """Measure layers and convert those for which it pays.

    Args:
        layers: by name; changed in place, all or none.
        rows_of: rows of the input of each; layers without stay dense.
        bench: packs weights and measures.
        only_faster: see :func:`to_semi_structured`.
    """
    found: list[LayerSpeed] = []
    sparse: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if name not in rows_of:
            logger.warning("%s stays dense: the example inputs do not reach it", name)
            continue
        speed, weight_OI = measure_layer(name, layer, rows_of[name], bench, only_faster)
        found.append(speed)
        logger.log(logging.INFO if speed.converted else logging.WARNING, "%s", speed)
        if weight_OI is not None:
            sparse[name] = weight_OI
    for name, weight_OI in sparse.items():
        layers[name].weight = nn.Parameter(weight_OI, requires_grad=False)
    converted = Converted(found)
    logger.info(
        "%d of %d layers are sparse: %.2f times as fast together", len(converted), len(found), converted.speedup
    )
    return converted


def _chosen(model: nn.Module, layers: Iterable[str] | None) -> dict[str, nn.Linear]:
    """The linear layers to convert.

    Raises:
        ModelError: no layer fits, or a named one does not exist or fit.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: a {type(model).__name__} is not allowed. Allowed: a torch.nn.Module")
    if isinstance(layers, str):
        raise ModelError(f"layers: {layers!r} is a string. Allowed: a list of names, such as [{layers!r}]")
    linear = {name: one for name, one in model.named_modules() if type(one) is nn.Linear}
    named = list(linear) if layers is None else list(layers)
    for name in named:
        if name not in linear:
            raise ModelError(unknown("layers", name, linear))
    reasons = {name: obstacle(linear[name].weight) for name in named}
    unfit = {name: reason for name, reason in reasons.items() if reason}
    if layers is not None and unfit:
        name, reason = next(iter(unfit.items()))
        raise ModelError(f"{name}.weight: {reason}")
    for name, reason in unfit.items():
        logger.info("%s stays dense: %s", name, reason)
    if len(unfit) == len(reasons):
        found = "; ".join(f"{name}: {reason}" for name, reason in list(unfit.items())[:3]) or "there is no nn.Linear"
        raise ModelError(f"model: no linear layer can become semi-structured. {found}")
    return {name: linear[name] for name in named if name not in unfit}


def obstacle(weight_OI: Tensor) -> str:
    """Why a weight cannot become semi-structured whatever the device, or an empty text."""
    if weight_OI.dtype not in DTYPES:
        return f"its type is {weight_OI.dtype}. Allowed: torch.float16, torch.bfloat16"
    if any(size % MULTIPLE for size in weight_OI.shape):
        return f"its shape {tuple(weight_OI.shape)} does not fit. Allowed: multiples of {MULTIPLE}"
    if not is_two_of_four(weight_OI):
        return "it is not 2:4. Allowed: at most 2 weights that are not 0 of every 4 along a row"
    return ""


def check_device(weight_OI: Tensor, name: str) -> None:
    """Refuse a weight on a device without sparse matrix products.

    Raises:
        ModelError: it is not on a CUDA device of capability 8.0 or above.
    """
    device = weight_OI.device
    if device.type != "cuda":
        raise ModelError(
            f"{name}.weight: it is on {str(device)!r}, which has no semi-structured sparse products. Allowed: a CUDA "
            "device of capability 8.0 or above; elsewhere the zeros save nothing by themselves"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise ModelError(
            f"{name}.weight: {torch.cuda.get_device_name(device)} has the capability {capability[0]}.{capability[1]}. "
            "Allowed: 8.0 or above"
        )
