"""What our networks share: checks of their arguments, scaled widths, convolution with norm, initial weights."""

from collections.abc import Iterable

from torch import nn

from cahfp_cli.errors import UsageError

SMALLEST_SIDE = 8
FEWEST_CHANNELS = 4


def check_image_model(name: str, input_shape: tuple[int, ...], classes: int, width: float) -> None:
    """Refuse what the networks of this package cannot be built for.

    Raises: UsageError: `input_shape` is not (channels, height, width) with sides of 8 or more, or fewer than one
        class, or a width that is not a positive number.
    """
    if len(input_shape) != 3 or input_shape[0] < 1 or min(input_shape[1:]) < SMALLEST_SIDE:
        shape = "x".join(map(str, input_shape))
        raise UsageError(
            f"{name} takes images of channels x height x width, from 8 pixels a side up; the input shape is {shape}."
        )
    if classes < 1:
        raise UsageError(f"{name} needs at least one class, not {classes}.")
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < float("inf"):
        raise UsageError(f"{name}: width must be a positive number such as 0.5, not {width!r}.")


def scaled(channels: int, width: float) -> int:
    """The number of channels at a width multiplier, never below 4."""
    return max(FEWEST_CHANNELS, round(channels * width))


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias: the norm that follows has one."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False)


def initialise(modules: Iterable[nn.Module]) -> None:
    """He et al. 2015 (fan-out, normal) for convolutions, identity for norms, N(0, 0.01) for the classifier.

    On the meta device there is nothing to draw, and asking for it would make torch import its compiler (2 s).
    """
    for module in modules:
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
