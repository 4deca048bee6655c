"""Names of the modules that may be residual blocks, and those of them that a rule chooses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pruningawaretraining.patterns.selection import select


def candidates(model: nn.Module) -> list[str]:
    """Children of containers that have parameters and children themselves, in the order of the model."""
    modules = dict(model.named_modules())
    return [
        name
        for name, module in modules.items()
        if name and isinstance(modules.get(name.rpartition(".")[0]), (nn.Sequential, nn.ModuleList))
        if any(True for _ in module.children()) and any(True for _ in module.parameters())
    ]


def chosen_blocks(
    model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str] = (), key: str = ""
) -> set[str]:
    """The candidates that a rule on several structures selects; one that holds a layer to be left alone stays.

    Raises:
        ConfigError: a name that is not a module of the model.
    """
    names, prefix = candidates(model), f"{key}." if key else ""
    modules = [name for name, _ in model.named_modules() if name]
    spared = select(model, list(exclude), modules, f"{prefix}exclude")
    chosen = select(model, layers, names, f"{prefix}layers")
    return {name for name in chosen if name not in spared and not any(one.startswith(f"{name}.") for one in spared)}
