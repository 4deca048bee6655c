"""Output of ``pat inspect``: the prunable groups of a model, and the costs of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from pruningawaretraining.config import PruningConfig, load_config
from pruningawaretraining.config.options import support_of
from pruningawaretraining.config.recovery import for_pruner
from pruningawaretraining.costs.macs import macs_per_layer
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment.build import build_model, is_imported
from pruningawaretraining.experiment.datasets import data_shape
from pruningawaretraining.experiment.schema import ModelConfig, load_experiment
from pruningawaretraining.experiment.shipped import is_experiment
from pruningawaretraining.models.calling import from_shapes
from pruningawaretraining.models.example_inputs import batch_of
from pruningawaretraining.registry import build
from pruningawaretraining.report import coupling, svg
from pruningawaretraining.report.summary import percent, si, wrapped_name
from pruningawaretraining.session.pruning import Pruning

STARS = "*" * 13
EVERYTHING = {"rules": [{"target": {"sparsity": 0.5}}]}
DEFAULT_SHAPE = (3, 224, 224)
NAME_WIDTH = 20
"""Characters of a line of a name in a table of 80 columns."""


@dataclass(frozen=True)
class Inspected:
    """A model to look at.

    Attributes:
        model: dense.
        inputs: example inputs.
        pruning: which of its layers are prunable.
    """

    model: nn.Module
    inputs: Any
    pruning: PruningConfig


def load_inspected(
    source: str,
    input_shape: Sequence[int] | None = None,
    *,
    trusted: bool = True,
    data: Path | None = None,
    known: tuple[int, tuple[int, int, int]] | None = None,
) -> Inspected:
    """The model of an experiment config, or a model by name.

    Args:
        source: path of an experiment config, or a name as in a config's ``model.name``.
        input_shape: of the example input, with its batch dimension; without it, what the config or the model says.
        trusted: whether the config may name a ``module:callable`` to import.
        data: where the data lies, instead of the config's ``data.root``.
        known: number of classes, and channels, height and width of an image; without it the data is looked at.

    Raises:
        ConfigError: unknown config or model, or an invalid shape.
    """
    if input_shape is not None and (not input_shape or min(input_shape) < 1):
        raise ConfigError(
            f"--input-shape: {list(input_shape)} is not a shape. Allowed: sizes of 1 or more, such as 1,3,224,224"
        )
    if not is_experiment(source):
        model = build_model(ModelConfig(name=source))
        return Inspected(model, _own_inputs(model, input_shape), load_config(EVERYTHING))
    config = load_experiment(source)
    if not trusted and is_imported(config.model.name):
        raise ConfigError(
            f"{source}: model.name: {config.model.name!r} would import code that the folder of a run names. "
            "Allowed: --model with your own model, or --trust"
        )
    if input_shape is None and config.pruning.example_inputs is not None:
        spec = config.pruning.example_inputs
        inputs = from_shapes(spec.shape, spec.container, getattr(torch, spec.dtype))
        return Inspected(build_model(config.model), inputs, for_pruner(config.pruning))
    found = config.data if data is None else config.data.model_copy(update={"root": str(data)})
    classes, shape = known or data_shape(found)
    model = build_model(config.model, classes, shape[0])
    return Inspected(model, torch.zeros(list(input_shape or (1, *shape))), for_pruner(config.pruning))


def _own_inputs(model: nn.Module, shape: Sequence[int] | None) -> Any:
    """Zeros of a shape; without one, the tokens that a model of transformers names, or an image as it is declared."""
    tokens = getattr(model, "dummy_inputs", None) if getattr(model, "main_input_name", "") == "input_ids" else None
    if isinstance(tokens, Mapping):
        named = {name: value for name, value in tokens.items() if isinstance(value, Tensor)}
        return named if shape is None else {name: value.new_zeros(list(shape)) for name, value in named.items()}
    return torch.zeros(list(shape or (1, *_own_shape(model))))


def _own_shape(model: nn.Module) -> Sequence[int]:
    """The input shape that a timm model declares; that of ImageNet for any other."""
    declared = getattr(model, "default_cfg", None)
    found: Any = declared.get("input_size") if isinstance(declared, Mapping) else None
    return tuple(found) if found else DEFAULT_SHAPE


def groups_text(inspected: Inspected) -> str:
    """Every prunable group with its number, source and dependencies, a summary, and what is left as it is and why.

    Raises:
        ConfigError, ModelError: nothing can be pruned, or the model rejects the inputs.
    """
    pruner = Pruning(inspected.model, inspected.pruning, example_inputs=inspected.inputs)
    groups = pruner.describe_sets()
    lines: list[str] = []
    for group in groups:
        source = f"Source conv: {group['source']}"
        lines += [STARS, f"Group number {group['number']}:", source, "Dependencies:", *group["dependencies"], STARS, ""]
    noun = "group" if len(groups) == 1 else "groups"
    verb = "is" if len(groups) == 1 else "are"
    lines.append(f"There {verb} {len(groups)} {noun} of layers, with the following source convs:")
    lines.append(str([group["source"] for group in groups]))
    coupled = pruner.engine.coupled if has_channels(inspected.pruning) else None
    skipped = {} if coupled is None else coupled.found.skipped
    if skipped:
        lines += ["", "Left as they are:", *(f"{name}: {reason}" for name, reason in skipped.items())]
    return "\n".join(lines)


def has_channels(pruning: PruningConfig) -> bool:
    """Whether a rule that is enabled prunes channels, or what else can be removed of coupled layers."""
    return any(support_of(build("pattern", rule.pattern)).removable for rule in pruning.rules if rule.enabled)


def groups_picture(inspected: Inspected) -> str:
    """Which layers are coupled, as an SVG file; see :mod:`pruningawaretraining.report.coupling`.

    Raises:
        ConfigError, ModelError: nothing can be pruned, or the model rejects the inputs.
    """
    pruner = Pruning(inspected.model, inspected.pruning, example_inputs=inspected.inputs)
    return svg.standalone(coupling.picture(pruner.report().layers))


def layers_table(inspected: Inspected) -> Table:
    """MACs and parameters of every layer that has any, and of the whole model."""
    counts = macs_per_layer(inspected.model, inspected.inputs)
    total = counts[""] or 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("layer", "type", "weight"):
        table.add_column(heading, overflow="fold")
    macs_heading = "MACs" if batch_of(inspected.inputs) == 1 else "MACs/batch"
    for heading in (macs_heading, "of all", "parameters"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, module in inspected.model.named_modules():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if own:
            macs = counts.get(name, 0) if not list(module.children()) else 0
            cells = (
                wrapped_name(name, NAME_WIDTH),
                type(module).__name__,
                _weight(module),
                si(macs),
                percent(macs / total),
                si(own),
            )
            table.add_row(*(Text(cell) for cell in cells))
    parameters = sum(parameter.numel() for parameter in inspected.model.parameters())
    table.add_section()
    whole = ("in all", type(inspected.model).__name__, "", si(counts[""]), percent(1.0), si(parameters))
    table.add_row(*(Text(cell, style="bold") for cell in whole))
    return table


def _weight(module: nn.Module) -> str:
    weight = getattr(module, "weight", None)
    return "x".join(str(size) for size in weight.shape) if isinstance(weight, Tensor) else ""
