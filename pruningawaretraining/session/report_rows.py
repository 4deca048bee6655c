"""Rows of a report: layers, experts and sets of coupled layers, dense and kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.models.widths import conv_linear_widths
from pruningawaretraining.patterns.expert import is_of_experts


def set_rows(coupled: CoupledGroups) -> list[dict[str, Any]]:
    """Rows of the sets of coupled layers."""
    keep = coupled.keep_masks()
    return [
        {
            "source": one.name,
            "dependencies": list(one.layers[1:]),
            "size": one.size * one.width,
            "kept": int(keep[one.name].sum()) * one.width,
        }
        for one in coupled.dense_sets
    ]


def plain_rows(model: nn.Module, macs: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows of the layers of a model whose widths stay; ``macs`` of its modules by name, those that are known."""
    modules = dict(model.named_modules())
    return [
        {
            "name": name,
            "type": type(modules[name]).__name__,
            "set": None,
            "dense_out": outputs,
            "kept_out": outputs,
            "dense_in": inputs,
            "kept_in": inputs,
            "dense_macs": macs.get(name, 0),
            "kept_macs": macs.get(name, 0),
            "parameters": sum(parameter.numel() for parameter in modules[name].parameters(recurse=False)),
        }
        for name, (outputs, inputs) in conv_linear_widths(model).items()
    ]


def layer_rows(coupled: CoupledGroups) -> list[dict[str, Any]]:
    """Rows of the layers of a model that loses channels; those in blocks that are gone included."""
    kept_macs = dict(zip(coupled.macs_cost.names, coupled.macs_cost.layers(coupled.keep_D).tolist(), strict=True))
    modules, kept, sets = dict(coupled.model.named_modules()), kept_widths(coupled), coupled.set_of_layer
    rows = []
    for name, (dense_out, dense_in) in coupled.dense_widths.items():
        module = modules.get(name)  # None in a block that is gone
        kept_out, kept_in = kept[name]
        dense_macs = coupled.dense_per_layer.get(name, 0)
        rows.append(
            {
                "name": name,
                "type": coupled.dense_types[name] if module is None else type(module).__name__,
                "set": sets.get(name),
                "dense_out": dense_out,
                "kept_out": kept_out,
                "dense_in": dense_in,
                "kept_in": kept_in,
                "dense_macs": dense_macs,
                "kept_macs": round(kept_macs.get(name, dense_macs)),
                "parameters": 0 if module is None else sum(one.numel() for one in module.parameters(recurse=False)),
            }
        )
    return rows + _expert_rows(coupled, modules)


def _expert_rows(coupled: CoupledGroups, modules: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """Rows of the modules with the stacked weights of experts, which are no layers; their width is their number."""
    kept = coupled.keep_masks()
    rows: list[dict[str, Any]] = []
    for one in coupled.dense_sets:
        if is_of_experts(one) and (name := one.layers[-1]) not in coupled.dense_widths:
            module = modules.get(name)  # None in a block that is gone
            rows.append(
                {
                    "name": name,
                    "type": coupled.dense_types[name],
                    "set": one.name,
                    "dense_out": one.size,
                    "kept_out": int(kept[one.name].sum()),
                    "dense_in": None,
                    "kept_in": None,
                    "dense_macs": None,
                    "kept_macs": None,
                    "parameters": 0 if module is None else sum(weight.numel() for weight in module.parameters()),
                }
            )
    return rows


def kept_widths(coupled: CoupledGroups) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) that every convolution and linear layer keeps, masked channels not counted; 0 for layers in
    blocks that are gone."""
    widths = {**dict.fromkeys(coupled.dense_widths, (0, 0)), **conv_linear_widths(coupled.model)}
    modules = dict(coupled.model.named_modules())
    keep_G1 = torch.cat([coupled.keep_D[coupled.live_D], torch.ones(1, dtype=torch.bool)])
    for member in coupled.found.grouping.of_role("out", "in").members:
        name = member.name.removesuffix(".weight")
        if name not in widths or member.slots is None:
            continue
        kept, groups = int(keep_G1[member.slots].sum()), getattr(modules[name], "groups", 1)
        outputs, inputs = widths[name]
        if member.role == "in":
            widths[name] = (outputs, kept * groups)
        elif groups == inputs > 1:  # depthwise
            widths[name] = (kept, kept * inputs // outputs)
        else:
            widths[name] = (kept, inputs)
    masked = coupled.found.taken_prefixes(keep_G1[:-1])
    return {name: (0, 0) if name.startswith(masked) else pair for name, pair in widths.items()}
