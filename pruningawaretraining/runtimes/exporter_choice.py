"""Which of PyTorch's exporters to ONNX writes a graph."""

from __future__ import annotations

import inspect

import torch

from pruningawaretraining.registry import canonical, register

AUTO = "auto"


@register("exporter", AUTO, "default")
def usual_exporter() -> str:
    """Default exporter of ``torch.onnx.export``: "dynamo" from PyTorch 2.9 on, "torchscript" before.

    Before it became PyTorch's own choice, "dynamo" ran with the onnxscript of its time only.
    """
    return "dynamo" if inspect.signature(torch.onnx.export).parameters["dynamo"].default else "torchscript"


def chosen_exporter(name: str) -> str:
    """The exporter of a name, an alias or "auto".

    Raises:
        ConfigError: unknown exporter.
    """
    known = canonical("exporter", name, "exporter")
    return usual_exporter() if known == AUTO else known
