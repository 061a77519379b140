"""VGG-11, 13 and 16 with batch norm for small images (Simonyan and Zisserman 2015, tables 1 and 2).

The three fully connected layers give way to global average pooling and one linear classifier.
"""

from itertools import pairwise

import torch
from torch import nn

from cahfp_cli.models.layers import check_image_model, conv3x3, initialise, scaled

STAGE_CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each followed by a 2x2 pool while both sides are at least 2.

    A pool that the image is too small for becomes `nn.Identity`, so parameter names do not depend on the input size.
    """

    def __init__(
        self, convolutions: tuple[int, ...], input_shape: tuple[int, ...], classes: int, width: float = 1.0
    ) -> None:
        """Build a VGG with `convolutions[i]` convolutions in stage i, for images of (channels, height, width).

        Raises: UsageError: the input shape, class count or width cannot be built.
        """
        super().__init__()
        check_image_model("vgg", input_shape, classes, width)
        channels, side = input_shape[0], min(input_shape[1:])
        layers: list[nn.Module] = []
        for base, count in zip(STAGE_CHANNELS, convolutions, strict=True):
            stage = scaled(base, width)
            for channels_in, channels_out in pairwise([channels, *[stage] * count]):
                layers += [conv3x3(channels_in, channels_out), nn.BatchNorm2d(channels_out), nn.ReLU()]
            layers.append(nn.MaxPool2d(2) if side >= 2 else nn.Identity())
            channels, side = stage, max(side // 2, 1)
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        initialise(self.modules())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (n, channels, height, width) to logits (n, classes)."""
        pooled = self.avgpool(self.features(x)).flatten(1)
        return self.classifier(pooled)  # type: ignore[no-any-return]


def vgg11(input_shape: tuple[int, ...], classes: int, width: float = 1.0) -> VGG:
    """VGG configuration A: 8 convolutions."""
    return VGG((1, 1, 2, 2, 2), input_shape, classes, width)


def vgg13(input_shape: tuple[int, ...], classes: int, width: float = 1.0) -> VGG:
    """VGG configuration B: 10 convolutions."""
    return VGG((2, 2, 2, 2, 2), input_shape, classes, width)


def vgg16(input_shape: tuple[int, ...], classes: int, width: float = 1.0) -> VGG:
    """VGG configuration D: 13 convolutions."""
    return VGG((2, 2, 3, 3, 3), input_shape, classes, width)
