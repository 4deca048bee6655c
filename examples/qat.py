"""Pruning and quantization-aware training in one run: a graph is trained with fake quantization, and loses channels.

pip install torchao
python examples/qat.py
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)
from train_loop import TRAIN, accuracy, load

from pruningawaretraining import Pruning, export_onnx
from pruningawaretraining.experiment.models import digits_resnet

RULE = {
    "criterion": "magnitude",
    "regularizer": {"type": "growing_l2", "strength": 1e-3},
    "start": 2,
    "end": 9,
    "target": {"macs": 0.5},
    "multiple": 8,
}


def prepared_graph(model: nn.Module, images: torch.Tensor) -> torch.fx.GraphModule:
    """The model as a graph with a fake quantizer at every place where int8 numbers will be."""
    shapes = ({0: torch.export.Dim("batch")},)
    graph = torch.export.export(model.train(), (images,), dynamic_shapes=shapes).module()
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    return prepare_qat_pt2e(graph, quantizer)


def int8(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """What the graph is with integer weights; the graph itself can be trained on."""
    graph = copy.deepcopy(graph)
    move_exported_model_to_eval(graph)
    return convert_pt2e(graph)


def graph_accuracy(graph: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Fraction of the test images; exported graphs have no eval() of their own."""
    with torch.no_grad():
        return float((graph(images[TRAIN:]).argmax(1) == labels[TRAIN:]).float().mean())


def main(epochs: int = 16) -> float:
    torch.manual_seed(0)
    images, labels = load()
    model = digits_resnet()
    graph = prepared_graph(model, images[:4])
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    pruner = Pruning(model, {"rules": [RULE]}, example_inputs=images[:4], optimizer=optimizer)
    pruner.follow(graph)  # the graph is trained, the model is looked at: they have the same parameters
    for epoch in range(epochs):
        for batch in torch.randperm(TRAIN).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(graph(images[batch]), labels[batch]).backward()
            optimizer.step()
        scheduler.step()
        pruner.prune(model, epoch, log=print)
        print(f"epoch {epoch + 1:2}  {pruner.phase:10}  MACs {pruner.macs.fraction:.3f}")

    print(pruner.report())
    quantized = int8(graph)
    reached = graph_accuracy(quantized, images, labels)
    print(f"accuracy: {accuracy(model, images, labels):.3f} in float, {reached:.3f} in int8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = export_onnx(quantized, images[:4], "runs/qat/model.onnx", tolerance=0.05)
    print(f"{exported.path}, largest difference from PyTorch {exported.max_abs_diff:.1e}")
    return reached


if __name__ == "__main__":
    main()
