"""The rows of a report: what each layer and each set of coupled layers has kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pruningawaretraining.costs.macs import macs_per_layer
from pruningawaretraining.engine.channel_pruner import ChannelPruner, layer_widths
from pruningawaretraining.models.calling import ForwardFn
from pruningawaretraining.models.trees import tensors_of


def set_rows(engine: ChannelPruner) -> list[dict[str, Any]]:
    """One row for each set of coupled layers."""
    keep = engine.keep_by_set()
    return [
        {
            "source": one.name,
            "dependencies": list(one.layers[1:]),
            "size": one.size * one.width,
            "kept": int(keep[one.name].sum()) * one.width,
        }
        for one in engine.dense_sets
    ]


class CountedMacs:
    """MACs of the modules of a model whose widths stay: it is run once, and again when its modules are others."""

    def __init__(self) -> None:
        self._counted_of: Any = None
        self._macs: dict[str, int] = {}

    def per_layer(self, model: nn.Module, inputs: Any, forward_fn: ForwardFn | None) -> dict[str, int]:
        """As :func:`~pruningawaretraining.costs.macs.macs_per_layer`; nothing is known without inputs."""
        if inputs is None:
            return {}
        kinds = [(name, type(module).__name__) for name, module in model.named_modules()]
        shapes = [tuple(one.shape) for one in (*model.parameters(), *tensors_of(inputs))]
        if self._counted_of != (kinds, shapes):
            self._macs = macs_per_layer(model, inputs, forward_fn)
            self._counted_of = kinds, shapes
        return self._macs


def plain_rows(model: nn.Module, macs: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows of the layers of a model whose widths stay.

    Args:
        model: the model.
        macs: of its modules by name, those that are known.
    """
    modules = dict(model.named_modules())
    return [
        {
            "name": name,
            "type": type(modules[name]).__name__,
            "set": None,
            "dense_out": outputs,
            "kept_out": outputs,
            "dense_in": inputs_of,
            "kept_in": inputs_of,
            "dense_macs": macs.get(name, 0),
            "kept_macs": macs.get(name, 0),
            "parameters": sum(parameter.numel() for parameter in modules[name].parameters(recurse=False)),
        }
        for name, (outputs, inputs_of) in layer_widths(model).items()
    ]


def layer_rows(engine: ChannelPruner) -> list[dict[str, Any]]:
    """Rows of the layers of a model that loses channels; those in blocks that are gone included."""
    kept_macs = dict(zip(engine.macs_cost.names, engine.macs_cost.layers(engine.keep_D).tolist(), strict=True))
    modules = dict(engine.model.named_modules())
    kept = engine.kept_widths()
    rows = []
    for name, (dense_out, dense_in) in engine.dense_widths.items():
        module = modules.get(name)  # None in a block that is gone
        kept_out, kept_in = kept[name]
        dense_macs = engine.dense_per_layer.get(name, 0)
        rows.append(
            {
                "name": name,
                "type": engine.dense_types[name] if module is None else type(module).__name__,
                "set": engine.set_of_layer.get(name),
                "dense_out": dense_out,
                "kept_out": kept_out,
                "dense_in": dense_in,
                "kept_in": kept_in,
                "dense_macs": dense_macs,
                "kept_macs": round(kept_macs.get(name, dense_macs)),
                "parameters": 0 if module is None else sum(one.numel() for one in module.parameters(recurse=False)),
            }
        )
    return rows
