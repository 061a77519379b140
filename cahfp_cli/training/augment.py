"""Random shifts of images, the one augmentation that every image set bears."""

from typing import Any

import numpy as np
import numpy.typing as npt

SMALLEST_SIDE = 16
"""Below this a shift by a pixel is already a large part of the image."""


def applies_to(input_shape: tuple[int, ...]) -> bool:
    """Whether samples are images large enough to be shifted."""
    return len(input_shape) == 3 and min(input_shape[1:]) >= SMALLEST_SIDE


def shifted(x: npt.NDArray[Any], random: np.random.Generator) -> npt.NDArray[Any]:
    """Shift each image (n, channels, height, width) by up to an eighth of its side each way; zeros move in."""
    n, channels, height, width = x.shape
    down, right = height // 8, width // 8
    padded = np.pad(x, ((0, 0), (0, 0), (down, down), (right, right)))
    rows = random.integers(0, 2 * down + 1, size=(n, 1)) + np.arange(height)
    columns = random.integers(0, 2 * right + 1, size=(n, 1)) + np.arange(width)
    samples = np.arange(n)[:, None, None, None]
    planes = np.arange(channels)[None, :, None, None]
    result: npt.NDArray[Any] = padded[samples, planes, rows[:, None, :, None], columns[:, None, None, :]]
    return result
