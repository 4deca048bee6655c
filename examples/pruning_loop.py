"""Five lines in a training loop of your own: regularise, mask on a schedule, remove at a MAC target, fine-tune on.

python examples/pruning_loop.py
"""

from __future__ import annotations

import torch
from torch import nn
from train_loop import TRAIN, accuracy, load

from pruningawaretraining import Pruning, export_onnx, load_pruned, save_pruned
from pruningawaretraining.experiment.models import digits_resnet

CONFIG = {
    "rules": [
        {
            "criterion": "magnitude",
            "regularizer": {"type": "growing_l2", "strength": 1e-3},
            "start": 4,
            "end": 15,
            "target": {"macs": 0.5},  # keep half of the MACs
            "multiple": 8,
        }
    ]
}


def main(epochs: int = 16) -> float:
    torch.manual_seed(0)
    images, labels = load()
    model = digits_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    pruner = Pruning(model, CONFIG, example_inputs=images[:1], optimizer=optimizer)  # 1
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(TRAIN).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            pruner.channel_regularize(model)  # 2
            optimizer.step()  # masked weights stay 0, whatever the momentum says
        pruner.prune(model, epoch, log=print)  # 3
        reached = accuracy(model, images, labels)
        print(f"epoch {epoch + 1:2}  {pruner.phase:10}  MACs {pruner.macs.fraction:.3f}  accuracy {reached:.3f}")

    print(pruner.report())
    save_pruned(model, "runs/pruning_loop/pruned.safetensors")  # 4
    again = load_pruned(digits_resnet(), "runs/pruning_loop/pruned.safetensors")  # 5
    exported = export_onnx(again, images[:2], "runs/pruning_loop/model.onnx")
    print(f"{exported.path} agrees with PyTorch to {exported.max_abs_diff:.1e}")
    return reached


if __name__ == "__main__":
    main()
