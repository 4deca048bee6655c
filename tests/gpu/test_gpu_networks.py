"""Networks reach half of their MACs as a GPU computes by default, with TF32; what mixes channels is found."""

from __future__ import annotations

import pytest
import torch
from gpu_training import check_reached
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning
from pruningawaretraining.experiment.models import CifarResNet
from pruningawaretraining.models.calling import outputs_of

NETWORKS = (
    "resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "vit_b_16", "resnet56",
)  # fmt: skip
SPAN = {"start": 0, "end": 3, "target": {"macs": 0.5}}


def network(name: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A network with norms that hide nothing, and two images of 224 px (64 px on the CPU, 32 px for CIFAR's)."""
    zoo = pytest.importorskip("zoo")
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    size = 224 if device.type == "cuda" else 64
    if name == "resnet56":
        model, size = zoo.scramble(CifarResNet(56)), 32
    elif name == "vit_b_16":
        model = zoo.scramble(models.vit_b_16(image_size=size, num_classes=10))
    else:
        model = zoo.vision(name)
    return model.to(device), torch.randn(2, 3, size, size).to(device)


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_the_macs(device: torch.device, name: str) -> None:
    model, images = network(name, device)
    if device.type == "cuda":
        assert torch.backends.cudnn.allow_tf32, "PyTorch's default is what this is about"
    before: list[Tensor] = []
    pruner = Pruning(model, {"rules": [SPAN]}, example_inputs=images[:1])
    pruner.before_removal = lambda: before.extend(outputs_of(model, images))
    dense = sum(parameter.numel() for parameter in model.parameters())
    for epoch in range(5):
        pruner.prune(model, epoch)
    check_reached(pruner)
    assert sum(parameter.numel() for parameter in model.parameters()) < dense
    for masked, removed in zip(before, outputs_of(model, images), strict=True):
        assert float((masked - removed).abs().max()) <= 0.1 * float(masked.abs().max())  # 10 bits, many layers


def test_events_and_steps_under_autocast(device: torch.device) -> None:
    """Loops that call everything inside autocast."""
    model, images = network("resnet18", device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    with torch.autocast(device.type, torch.bfloat16):
        pruner = Pruning(model, {"rules": [SPAN]}, example_inputs=images[:1], optimizer=optimizer)
        for epoch in range(5):
            optimizer.zero_grad()
            model(images).float().square().mean().backward()
            optimizer.step()
            pruner.prune(model, epoch)
    check_reached(pruner)


class Mixing(nn.Module):
    """The first convolution's channels go through a softmax over channels; those of the second are free."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.out = nn.Conv2d(32, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.softmax(self.first(x), 1)
        found: Tensor = self.out(torch.relu(self.second(x))).mean((2, 3))
        return found


def test_a_layer_whose_channels_are_mixed_stays(device: torch.device) -> None:
    model = Mixing().to(device)
    images = torch.randn(4, 3, 16, 16, device=device)
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=images)
    pruner.prune(model, 0)
    assert [group["source"] for group in pruner.describe_sets()] == ["second"]
    assert (model.first.out_channels, model.second.out_channels) == (32, 16)


@pytest.mark.parametrize("pattern", ["head", {"type": "channel", "heads": True}], ids=["heads", "both"])
def test_heads_of_a_vit(device: torch.device, pattern: object) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    small = {} if device.type == "cuda" else {"img_size": 32, "patch_size": 8, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **small).to(device)
    size = 224 if device.type == "cuda" else 32
    images, labels = torch.randn(4, 3, size, size, device=device), torch.arange(4, device=device)
    target = {"sparsity": 1 / 3} if pattern == "head" else {"macs": 0.5}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    rule = {**SPAN, "pattern": pattern, "target": target}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=images[:1], optimizer=optimizer)
    for epoch in range(5):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        pruner.prune(model, epoch)
    assert pruner.phase == "finetune"
    if pattern == "head":
        assert pruner.sparsity == pytest.approx(1 / 3)
        assert sum(block.attn.num_heads for block in model.blocks) == 2 * len(model.blocks)
    else:
        check_reached(pruner)
    assert bool(torch.isfinite(model(images)).all())


def test_a_text_model_of_transformers(device: torch.device) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=99, **sizes)).to(device)
    words = {"input_ids": torch.arange(14, device=device).reshape(2, 7)}
    pruner = Pruning(model, {"rules": [{**SPAN, "target": {"macs": 0.6}}]}, example_inputs=words)
    for epoch in range(5):
        pruner.prune(model, epoch)
    check_reached(pruner, 0.59, 0.6)
    assert bool(torch.isfinite(model(**words).logits).all())
