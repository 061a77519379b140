"""ResNets of basic blocks for small images (He et al. 2016): a 3x3 stem and no pooling before the last layer.

ResNet-18 has the ImageNet widths 64-128-256-512; ResNet-20, 32 and 56 have the CIFAR widths 16-32-64. Every shortcut
that changes shape is a projection (1x1 convolution and norm).
"""

import torch
from torch import nn

from cahfp_cli.models.layers import check_image_model, conv3x3, initialise, scaled


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU()
        self.conv2 = conv3x3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, channels_in, h, w) to (n, channels_out, ceil(h / stride), ceil(w / stride))."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.downsample(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A stem, stages `layer1`, `layer2`, ... of which each but the first halves the image, and a classifier `fc`."""

    def __init__(
        self,
        blocks: tuple[int, ...],
        channels: tuple[int, ...],
        input_shape: tuple[int, ...],
        classes: int,
        width: float = 1.0,
    ) -> None:
        """Build a ResNet with `blocks[i]` basic blocks of `channels[i]` in stage i, for (channels, height, width).

        Raises: UsageError: the input shape, class count or width cannot be built.
        """
        super().__init__()
        check_image_model("resnet", input_shape, classes, width)
        current = scaled(channels[0], width)
        self.conv1 = conv3x3(input_shape[0], current)
        self.bn1 = nn.BatchNorm2d(current)
        self.relu = nn.ReLU()
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        for i, name in enumerate(self.stages):
            stage = scaled(channels[i], width)
            first = BasicBlock(current, stage, stride=1 if i == 0 else 2)
            self.add_module(name, nn.Sequential(first, *(BasicBlock(stage, stage, 1) for _ in range(blocks[i] - 1))))
            current = stage
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(current, classes)
        initialise(self.modules())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (n, channels, height, width) to logits (n, classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def resnet18(input_shape: tuple[int, ...], classes: int, width: float = 1.0) -> ResNet:
    """ResNet-18 with the 3x3 stem."""
    return ResNet((2, 2, 2, 2), (64, 128, 256, 512), input_shape, classes, width)


def resnet20(input_shape: tuple[int, ...], classes: int, width: float = 1.0) -> ResNet:
    """ResNet-20: three stages of 3 blocks."""
    return ResNet((3, 3, 3), (16, 32, 64), input_shape, classes, width)


def resnet32(input_shape: tuple[int, ...], classes: int, width: float = 1.0) -> ResNet:
    """ResNet-32: three stages of 5 blocks."""
    return ResNet((5, 5, 5), (16, 32, 64), input_shape, classes, width)


def resnet56(input_shape: tuple[int, ...], classes: int, width: float = 1.0) -> ResNet:
    """ResNet-56: three stages of 9 blocks."""
    return ResNet((9, 9, 9), (16, 32, 64), input_shape, classes, width)
