"""Small networks of kinds that the package has none of, with random weights, for benchmarks."""

from collections.abc import Sequence

import torch
from torch import nn


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution, batch norm, ReLU6."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU6()]


class Inverted(nn.Module):
    """An inverted residual block: expand, depthwise, project (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        wide = convolution(inputs, inner, 1) if expansion > 1 else []
        project = convolution(inner, outputs, 1)[:2]
        self.body = nn.Sequential(*wide, *convolution(inner, inner, 3, stride, inner), *project)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet(stem: int, plan: Sequence[tuple[int, int, int, int]]) -> nn.Module:
    """Inverted residuals of (expansion, channels, blocks, stride), as in MobileNetV2, for RGB images."""
    layers, width = convolution(3, stem, 3), stem
    for expansion, outputs, blocks, stride in plan:
        for number in range(blocks):
            layers.append(Inverted(width, outputs, stride if number == 0 else 1, expansion))
            width = outputs
    layers += [*convolution(width, 4 * width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * width, 10))


def normed(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    """Batch norm, ReLU, convolution."""
    return [
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
    ]


class DenseLayer(nn.Module):
    """A bottleneck, and everything that came before beside it (Huang et al. 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*normed(inputs, 4 * growth, 1), *normed(4 * growth, growth, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet(growth: int, blocks: Sequence[int], channels: int = 3) -> nn.Module:
    """Dense layers, and between blocks of them a transition that halves channels and image."""
    width = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
    for number, count in enumerate(blocks):
        if number:
            layers += [*normed(width, width // 2, 1), nn.AvgPool2d(2)]
            width //= 2
        for _ in range(count):
            layers.append(DenseLayer(width, growth))
            width += growth
    layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(*layers)


def vit(hidden: int, layers: int, heads: int, image: int, patch: int, mlp: int, channels: int = 3) -> nn.Module:
    """A ViT of `transformers`, from images to logits."""
    import transformers

    from cahfp_cli.coupling.adapters import adapt

    config = transformers.ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=image,
        patch_size=patch,
        num_channels=channels,
        num_labels=10,
    )
    return adapt(transformers.ViTForImageClassification(config))
