"""The widths of a model's convolutions and linear layers."""

from __future__ import annotations

from torch import nn


def conv_linear_widths(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every convolution and linear layer."""
    widths = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            widths[name] = (module.out_channels, module.in_channels)
        elif isinstance(module, nn.Linear):
            widths[name] = (module.out_features, module.in_features)
    return widths
