"""ONNX forms of operators that PyTorch's exporter has none for: used only where it gives up.

Each takes the exporter's symbolic values, whose shapes are known but for the batch, and returns what the operator does.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper
from onnxscript import opset18

op: Any = opset18
"""Its types are those of code that is compiled; here its functions are given symbolic values and plain numbers."""


def adaptive_max(x: Any, output_size: Sequence[int]) -> tuple[Any, Any]:
    """Adaptive max pooling, whose windows differ in size: the largest of each, and where it is in the plane."""
    return pooled(x, output_size, op.ReduceMax), places(x, output_size)


def adaptive_mean(x: Any, output_size: Sequence[int]) -> Any:
    """Adaptive average pooling: a window's mean is that of the means along each of its axes."""
    return pooled(x, output_size, op.ReduceMean)


def pooled(x: Any, output_size: Sequence[int], reduce: Callable[..., Any]) -> Any:
    """Reduce the windows of adaptive pooling, axis by axis. Args: output_size: windows along each of the last axes."""
    axes = pooled_axes(x, output_size)
    for axis, parts in zip(axes, windows(x, output_size), strict=True):
        found = [reduce(op.Slice(x, [start], [stop], [axis]), [axis], keepdims=1) for start, stop in parts]
        x = op.Concat(*found, axis=axis) if len(found) > 1 else found[0]
    return x


def places(x: Any, output_size: Sequence[int]) -> Any:
    """Where the largest value of each window is, as its number in the plane of the pooled axes. The exporter removes
    this again where nothing reads it."""
    axes = pooled_axes(x, output_size)
    before = [0] * axes[0]  # as many as there are
    numbers = np.arange(math.prod(int(x.shape[axis]) for axis in axes)).reshape([int(x.shape[axis]) for axis in axes])
    found = []
    for window in itertools.product(*windows(x, output_size)):
        starts, stops = zip(*window, strict=True)
        values = op.Reshape(op.Slice(x, list(starts), list(stops), axes), [*before, -1])
        inside = np.ascontiguousarray(numbers[tuple(slice(*part) for part in window)].ravel())
        known = op.Constant(value=numpy_helper.from_array(inside))
        found.append(op.Gather(known, op.ArgMax(values, axis=-1, keepdims=1)))
    return op.Reshape(op.Concat(*found, axis=-1), [*before, *output_size])


def pooled_axes(x: Any, output_size: Sequence[int]) -> list[int]:
    """The last axes, as many as there are sizes."""
    rank = len(x.shape)
    return list(range(rank - len(output_size), rank))


def windows(x: Any, output_size: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Along each axis the windows: from floor(i n / m) to ceil((i + 1) n / m) of n places, for each i of m."""
    lengths = [int(x.shape[axis]) for axis in pooled_axes(x, output_size)]
    return [[(i * n // m, -(-(i + 1) * n // m)) for i in range(m)] for n, m in zip(lengths, output_size, strict=True)]


def distances(x: Any, y: Any, p: float, compute_mode: int | None = None) -> Any:
    """Distances (..., n, m) of the rows of x (..., n, d) and y (..., m, d), for the norms that ONNX has."""
    if p not in (1.0, 2.0):
        raise NotImplementedError(f"distances by the norm {p}")
    difference = op.Sub(op.Unsqueeze(x, [-2]), op.Unsqueeze(y, [-3]))
    return op.ReduceL2(difference, [-1], keepdims=0) if p == 2.0 else op.ReduceL1(difference, [-1], keepdims=0)


aten = torch.ops.aten
SUBSTITUTES: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.adaptive_max_pool1d.default: adaptive_max,
    aten.adaptive_max_pool2d.default: adaptive_max,
    aten.adaptive_max_pool3d.default: adaptive_max,
    aten._adaptive_avg_pool3d.default: adaptive_mean,
    aten._cdist_forward.default: distances,
}
