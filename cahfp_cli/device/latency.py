"""Seconds of every operator as a function of the widths.

A kernel's time is what it computes, what it moves, and a fixed cost of starting it:

    seconds = operations / rate + bytes / bandwidth + calls x overhead

with rate, bandwidth and overhead of its class. Which class an operator is in depends on the widths too: blocked
kernels hold channels in vectors of `step`, computing up to its end, and take only inputs that are multiples of `hard`.
Others fall back to slow kernels, so that 63 channels can take longer than 64. The terms are added, unlike in a roofline
(Williams et al. 2009), which takes the larger of computing and moving: kernels overlap the two only in part.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.device.operators import Operator
from cahfp_cli.device.profile import Bandwidth, DeviceProfile
from cahfp_cli.device.sizes import ITEM_BYTES, Array, Axis, Size, Sums

CLASSES = ("conv", "narrow", "odd", "odd_pointwise", "depthwise", "odd_depthwise", "matmul", "memory", "math")
"""Kernels. conv: blocked convolution; narrow: of fewer inputs than a block; odd: of inputs that blocks do not fit,
which are unrolled for a matrix product; odd_pointwise: the same of one tap, with nothing to unroll; depthwise and
odd_depthwise: alike, one input an output; matmul: matrix product; memory, math: see `operators.Kind`."""
UNBLOCKED = ("odd", "odd_pointwise", "odd_depthwise")
NUMBER = {name: number for number, name in enumerate(CLASSES)}


@dataclass(frozen=True)
class Quantities:
    """What the timed operators do, each float64 (batch, operators), and int64 `classes` as numbers in `CLASSES`.

    operations: multiplications and additions as computed, padding included. moved: bytes of activations read and
    written, and of the unrolled input that slow convolutions write first. reordered: bytes of inputs that come in
    blocks and are wanted plain, or the other way round. weights: bytes that are read. calls: of kernels.
    """

    classes: NDArray[np.int64]
    operations: Array
    moved: Array
    reordered: Array
    weights: Array
    calls: Array


class Kernels:
    """The operators of a workload that take time, compiled for many evaluations of `quantities`.

    timed: int64, their numbers among all operators.
    """

    def __init__(self, operators: tuple[Operator, ...], families: int, step: int, hard: int) -> None:
        """Args: operators: of a workload, in its order. step: channels that are computed together; hard: what blocked
        kernels want a multiple of."""
        self.timed = np.array([i for i, operator in enumerate(operators) if operator.kind != "free"], np.int64)
        position = {int(number): i for i, number in enumerate(self.timed)}
        operators = tuple(operators[number] for number in self.timed)
        one = Axis(1)
        products = [operator.product for operator in operators]
        self._kinds = np.array([operator.kind for operator in operators], dtype=np.str_)
        self._step, self._hard = step, hard
        self._taps = np.array([1 if p is None else p.taps for p in products], np.float64)
        self._inside = np.array([1 if p is None else p.inside for p in products], np.float64)
        self._touched = np.array([1 if p is None else p.touched for p in products], np.float64)
        rows = [[(Size(()) if p is None else p.rows, 1)] for p in products]
        lines = [[(Size(()) if p is None else Size(p.rows.axes[:2]), 1)] for p in products]
        channels = [
            [(Size((one if p is None else getattr(p, name),)), 1)]
            for name in ("inputs", "contracted", "outputs")
            for p in products
        ]
        moved = [[(size, ITEM_BYTES) for size in (*operator.reads, *operator.writes)] for operator in operators]
        weights = [[(size, ITEM_BYTES) for size in operator.weights] for operator in operators]
        images = [[(Size(()) if not o.reads else Size(o.reads[0].axes[2:]), ITEM_BYTES)] for o in operators]
        self._sums = Sums([*rows, *lines, *channels, *images, *moved, *weights], families)
        self._source = np.array([-1 if o.source is None else position[o.source] for o in operators], np.int64)
        self._convolution = np.isin(self._kinds, ("conv", "grouped", "depthwise"))

    def quantities(self, widths: Array) -> Quantities:
        """Of widths, float64 (batch, families)."""
        rows, lines, inputs, contracted, outputs, images, moved, weights = np.split(self._sums(widths), 8, axis=1)
        groups = inputs / np.maximum(contracted, 1.0)
        classes = self._classes(inputs, contracted, outputs, groups)

        def of(*names: str) -> NDArray[np.bool_]:
            return np.isin(classes, [NUMBER[name] for name in names])

        deep = np.where(of("conv"), self._padded(contracted), contracted)
        wide = np.where(of(*UNBLOCKED), outputs, self._padded(outputs))
        taps = self._taps * np.where(of(*UNBLOCKED), 1.0, self._inside)
        # A matrix product with the image along the vectors; one position is a product with a vector.
        positions = np.where(of("odd", "odd_pointwise") & (rows > 1), self._padded(rows), rows)
        operations = np.where(of("memory", "math"), 0.0, 2 * positions * taps * deep * wide)
        unrolled = np.where(of("odd"), rows * self._taps * inputs * ITEM_BYTES, 0.0)
        # Unrolling copies line after line, which on small images takes longer than what it copies.
        calls = np.where(of("odd"), self._taps * inputs * lines, np.where(of(*UNBLOCKED), groups, 1.0))
        reordered = np.where(self._reorders(of), images * (self._padded(inputs) + inputs), 0.0)
        weights = weights * np.where(of(*UNBLOCKED), 1.0, self._touched)
        return Quantities(classes, operations, moved + unrolled, reordered, weights, calls)

    def _reorders(self, of: Callable[..., NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """Which operators, (batch, operators), want their input in another order than it comes in."""
        if self._step == 1 or not self._source.size:
            return np.zeros_like(of("conv"))
        writes_blocks = of("conv", "narrow", "depthwise")
        comes_in_blocks = writes_blocks[:, self._source] & (self._source >= 0)
        wants_blocks = of("conv", "depthwise")
        return np.asarray(self._convolution & (comes_in_blocks != wants_blocks))

    def _padded(self, channels: Array) -> Array:
        return np.asarray(np.ceil(channels / self._step) * self._step)

    def _classes(self, inputs: Array, contracted: Array, outputs: Array, groups: Array) -> NDArray[np.int64]:
        kinds = np.broadcast_to(self._kinds, inputs.shape)
        step, hard = self._step, self._hard
        odd = np.where(self._taps == 1, NUMBER["odd_pointwise"], NUMBER["odd"])
        plain = np.where(inputs < step, NUMBER["narrow"], np.where(inputs % hard == 0, NUMBER["conv"], odd))
        whole = (contracted % step == 0) & (outputs % np.maximum(groups * step, 1) == 0)
        return np.select(
            [kinds == "conv", kinds == "grouped", kinds == "depthwise", kinds == "matmul", kinds == "math"],
            [
                plain,
                np.where(whole, NUMBER["conv"], odd),
                np.where(inputs % hard == 0, NUMBER["depthwise"], NUMBER["odd_depthwise"]),
                NUMBER["matmul"],
                NUMBER["math"],
            ],
            NUMBER["memory"],
        )


@dataclass(frozen=True)
class Rates:
    """How fast kernels of each class are, float64 (classes,): seconds an operation, a byte of activations, a call.

    reorder: seconds a reordered byte. weight: seconds a byte of weights. streaming: seconds more for a byte that comes
    from main memory: of the weights of the whole network, those beyond `cache` bytes, since every call walks through
    all of them in the same order. call: seconds once a call of the network.
    """

    operation: Array
    byte: Array
    overhead: Array
    reorder: float
    weight: float
    streaming: float
    cache: float
    call: float

    def seconds(self, found: Quantities) -> tuple[Array, Array, Array]:
        """Seconds of computing, of moving bytes, and of overhead, each (batch, operators)."""
        total = found.weights.sum(axis=1, keepdims=True)
        streams = np.clip(1 - self.cache / np.maximum(total, 1.0), 0.0, 1.0)
        moving = found.moved * self.byte[found.classes] + found.reordered * self.reorder
        moving += found.weights * (self.weight + self.streaming * streams)
        return found.operations * self.operation[found.classes], moving, found.calls * self.overhead[found.classes]


def rates_of(profile: DeviceProfile) -> Rates:
    """The measured rates of a profile's calibration, or the same for all classes from its peaks."""
    cache = profile.memory.cache.si if profile.memory.cache is not None else 0.0
    measured = profile.calibration
    if measured is None:
        same = np.ones(len(CLASSES))
        return Rates(
            same / profile.compute.fp32.reached,
            same / profile.memory.reached,
            same * profile.overheads.operator.si,
            0.0,
            0.0,
            1 / profile.memory.reached,
            cache,
            profile.overheads.call.si,
        )
    classes = [getattr(measured, name) for name in CLASSES]

    def seconds_a_byte(bandwidth: Bandwidth | None) -> float:
        return 0.0 if bandwidth is None else 1 / bandwidth.si

    return Rates(
        np.array([0.0 if one.rate is None else 1 / one.rate.si for one in classes]),
        np.array([seconds_a_byte(one.bandwidth) for one in classes]),
        np.array([one.overhead.si for one in classes]),
        seconds_a_byte(measured.reorder),
        seconds_a_byte(measured.weights),
        seconds_a_byte(measured.streaming),
        cache,
        profile.overheads.call.si,
    )
