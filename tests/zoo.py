"""Architectures that the laws are tested on, with weights that hide nothing (norms and their statistics are random)."""

from __future__ import annotations

import torch
import torchvision
from torch import nn

VISION = ("resnet18", "mobilenet_v2", "densenet121", "vgg16_bn", "resnext50_32x4d", "convnext_tiny")


def vision(name: str, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=classes)
    if name == "vgg16_bn":  # the classifier's 120 million weights only cost time
        model.avgpool = nn.AdaptiveAvgPool2d(2)
        model.classifier = nn.Sequential(nn.Linear(512 * 4, 64), nn.ReLU(), nn.Linear(64, classes))
    return scramble(model)


def scramble(model: nn.Module) -> nn.Module:
    """Random norm weights, biases and running statistics, so that masking one of them too few shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.dim() == 1 and tensor.is_floating_point():
                tensor.uniform_(-0.5, 1.5, generator=generator)
            elif name.endswith("layer_scale"):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return model


def images(size: int = 64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


class GroupNormNet(nn.Module):
    """Convolutions with GroupNorm and LayerNorm over channels, a residual, and an activation with f(0) != 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, 16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm2 = nn.GroupNorm(2, 16, affine=False)
        self.hidden = nn.Linear(16, 24)
        self.norm3 = nn.LayerNorm(24, elementwise_affine=False)
        self.out = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(self.norm1(self.conv1(x)))
        x = torch.sigmoid(x + self.norm2(self.conv2(x)))
        return self.out(torch.sigmoid(self.norm3(self.hidden(x.mean((2, 3))))))


class Shapes(nn.Module):
    """Transposed, grouped and depthwise convolutions (with a multiplier), PReLU, a raw parameter, concat and split."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.PReLU(8)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.scale = nn.Parameter(torch.rand(12, 1, 1) + 0.5)
        self.side = nn.Conv2d(12, 6, 1)
        self.merge = nn.Conv2d(18, 16, 1)
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.depthwise(self.act(self.stem(x))))
        x = torch.relu(self.grouped(x)) * self.scale
        left, right = self.merge(torch.cat([x, self.side(x)], 1)).chunk(2, dim=1)
        return self.head((self.left(left) + self.right(right)).mean((2, 3)))


SMALL = {"groupnorm": GroupNormNet, "shapes": Shapes}


def architecture(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model of the zoo and an input for it."""
    if name in SMALL:
        torch.manual_seed(0)
        return scramble(SMALL[name]()), images(8)
    return vision(name), images()


NAMES = (*VISION, *SMALL)
