"""Models of our own, for experiments: the CIFAR ResNets, and the demo's small residual network.

Shape suffixes: ``_BCHW`` images or feature maps.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining.errors import ConfigError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2015).

    Args:
        width_in, width: channels before and after.
        stride: of the first convolution.
        shortcut: what carries the input past them.
    """

    def __init__(self, width_in: int, width: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Feature maps to feature maps."""
        out = functional.relu(self.bn1(self.conv1(x_BCHW)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x_BCHW))


class PaddedShortcut(nn.Module):
    """Option A of He et al. 2015: every other pixel, and zero channels, half of the new ones on each side.

    It has no parameters, and ties channel c of one stage to channel c + pad of the next; so the widths of the stages
    cannot change, and what is pruned in such a network are the convolutions inside its blocks.
    """

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Feature maps (B, C, H, W) to (B, C + 2 pad, H / 2, W / 2)."""
        return functional.pad(x_BCHW[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2015, section 4.2: three stages of 16, 32 and 64 channels, option-A shortcuts.

    Names are conv1, bn1, layer1.0.conv1 ... layer3.8.bn2, linear, as in the common published weights.

    Args:
        depth: 6 n + 2: 20, 32, 44, 56, 110.
        num_classes: outputs.
    """

    def __init__(self, depth: int = 56, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ConfigError(f"depth: {depth!r} is not 6 n + 2. Allowed: 20, 32, 44, 56, 110, ...")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks)
        self.layer2 = self._stage(16, 32, blocks)
        self.layer3 = self._stage(32, 64, blocks)
        self.linear = nn.Linear(64, num_classes)
        _initialise(self)

    @staticmethod
    def _stage(width_in: int, width: int, blocks: int) -> nn.Sequential:
        widens = width != width_in
        shortcut = PaddedShortcut(width // 4) if widens else nn.Identity()
        first = BasicBlock(width_in, width, 2 if widens else 1, shortcut)
        return nn.Sequential(first, *(BasicBlock(width, width, 1, nn.Identity()) for _ in range(blocks - 1)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) to class scores (B, num_classes)."""
        out = functional.relu(self.bn1(self.conv1(x_BCHW)))
        out = self.layer3(self.layer2(self.layer1(out)))
        scores: Tensor = self.linear(functional.adaptive_avg_pool2d(out, 1).flatten(1))
        return scores


def cifar_resnet20(num_classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-20: 41 M MACs, 0.27 M parameters."""
    return CifarResNet(20, num_classes)


def cifar_resnet32(num_classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-32: 69 M MACs, 0.46 M parameters."""
    return CifarResNet(32, num_classes)


def cifar_resnet44(num_classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-44: 97 M MACs, 0.66 M parameters."""
    return CifarResNet(44, num_classes)


def cifar_resnet56(num_classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-56: 126 M MACs, 0.85 M parameters."""
    return CifarResNet(56, num_classes)


class DigitsResNet(nn.Module):
    """A small residual network with batch norm for small grey images.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        widths: channels of each stage; every stage after the first halves the resolution.
        blocks: residual blocks in each stage.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, widths: Sequence[int] = (32, 64, 128), blocks: int = 2
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages, before = [], widths[0]
        for number, width in enumerate(widths):
            stages.append(self._stage(before, width, blocks, 2 if number else 1))
            before = width
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(before, num_classes)
        _initialise(self)

    @staticmethod
    def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        shortcut: nn.Module = nn.Identity()
        if stride != 1 or width != width_in:
            shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        first = BasicBlock(width_in, width, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(width, width, 1, nn.Identity()) for _ in range(blocks - 1)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to class scores (B, num_classes)."""
        out = self.stages(functional.relu(self.bn1(self.conv1(x_BCHW))))
        scores: Tensor = self.linear(functional.adaptive_avg_pool2d(out, 1).flatten(1))
        return scores


def digits_resnet(num_classes: int = 10, in_channels: int = 1) -> DigitsResNet:
    """The demo's network."""
    return DigitsResNet(num_classes, in_channels)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
