"""Seconds of every operator as a function of the widths.

A kernel's time is what it computes, what it moves, and a fixed cost of starting it:

    seconds = operations / rate + bytes / bandwidth + calls x overhead

with rate, bandwidth and overhead of its class. Which class an operator is in depends on the widths too: blocked
kernels hold channels in vectors of `step`, computing up to its end, and take only inputs that are multiples of `hard`.
Others fall back to slow kernels, so that 63 channels can take longer than 64. The terms are added, unlike in a roofline
(Williams et al. 2009), which takes the larger of computing and moving: kernels overlap the two only in part.

Blocked convolutions compute up to `FILTERS` blocks of outputs from each input that they load, so that one of a single
block loads as much as one of four: loads are a term of their own. Where a kernel sums up too few vectors side by side,
each addition waits for the last one. Between kernels that hold channels in blocks and those that do not, the channels
are reordered. Products with a single vector use each weight once, and wait for it.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.device.operators import Operator, Product
from cahfp_cli.device.profile import Bandwidth, DeviceProfile, Rate
from cahfp_cli.device.sizes import ITEM_BYTES, Array, Axis, Size, Sums

Bools = NDArray[np.bool_]

CLASSES = (
    *("conv", "narrow", "odd", "odd_pointwise", "depthwise", "odd_depthwise", "matmul"),
    *("pool", "memory", "math", "clip", "view"),
)
"""Kernels. conv: blocked convolution; narrow: of fewer inputs than a block; odd: of inputs that blocks do not fit,
which are unrolled for a matrix product; odd_pointwise: the same of one tap, with nothing to unroll; depthwise and
odd_depthwise: alike, one input an output; matmul: matrix product; pool: over windows of plain channels, those of
blocked ones only move bytes; memory, math, clip, view: see `operators.Kind`."""
MOVING = CLASSES[CLASSES.index("pool") :]
"""Those that multiply nothing."""
FUSED = ("clip", "view")
"""What takes no time on devices of which only paper is known."""
FILTERS = 4
STRETCHES = (6, 3, 2, 1)
EDGES = 2
"""What a blocked convolution computes at once: blocks of outputs, and positions of a row, the most that are left; and
positions at a row's ends, which are computed one by one."""
IN_FLIGHT = 8
"""Vectors that are summed up in the time of fewer: a sum takes four cycles, and two begin in each."""
FETCHED = 1.5
"""Where a kernel skips taps, the memory fetches ahead in vain about half as much as is read."""
UNBLOCKED = ("odd", "odd_pointwise", "odd_depthwise")
NUMBER = {name: number for number, name in enumerate(CLASSES)}


@dataclass(frozen=True)
class Quantities:
    """What the timed operators do, each float64 (batch, operators), and int64 `classes` as numbers in `CLASSES`.

    operations: multiplications and additions as computed, padding included. loads: of inputs by blocked convolutions,
    each for up to `FILTERS` blocks of outputs; waits: operations that there was time for while their sums were awaited.
    moved: bytes of activations read and written, and of the unrolled input that slow convolutions write first.
    reordered: bytes of inputs that come in blocks and are wanted plain, or the other way round, and reorders: how many
    such inputs. weights: bytes that are read; once: those of products with a single vector; again: those that are
    read once more in later turns. calls: of kernels. lines:
    of images that are unrolled or pooled, one channel after another.
    """

    classes: NDArray[np.int64]
    operations: Array
    loads: Array
    waits: Array
    moved: Array
    reordered: Array
    reorders: Array
    weights: Array
    once: Array
    again: Array
    calls: Array
    lines: Array


class Kernels:
    """The operators of a workload that take time, compiled for many evaluations of `quantities`.

    timed: int64, their numbers among all operators.
    """

    def __init__(self, operators: tuple[Operator, ...], families: int, step: int, hard: int) -> None:
        """Args: operators: of a workload, in its order. step: channels that are computed together; hard: what blocked
        kernels want a multiple of."""
        self.timed = np.array([i for i, operator in enumerate(operators) if operator.kind != "free"], np.int64)
        position = {int(number): i for i, number in enumerate(self.timed)}
        operators = tuple(
            replace(one, sources=tuple(None if source is None else position[source] for source in one.sources))
            for one in (operators[number] for number in self.timed)
        )
        one = Axis(1)
        products = [operator.product for operator in operators]
        self._kinds = np.array([operator.kind for operator in operators], dtype=np.str_)
        self._step, self._hard = step, hard
        self._taps = np.array([1 if p is None else p.taps for p in products], np.float64)
        self._inside = np.array([1 if p is None else p.inside for p in products], np.float64)
        self._touched = np.array([1 if p is None else p.touched for p in products], np.float64)
        rows = [[(Size(()) if p is None else p.rows, 1)] for p in products]
        lines = [[(lines_of(operator), 1)] for operator in operators]
        channels = [
            [(Size((one if p is None else getattr(p, name),)), 1)]
            for name in ("inputs", "contracted", "outputs")
            for p in products
        ]
        moved = [[(size, ITEM_BYTES) for size in (*operator.reads, *operator.writes)] for operator in operators]
        weights = [[(size, ITEM_BYTES) for size in operator.weights] for operator in operators]
        turns = [[(Size(()) if p is None else p.turns, 1)] for p in products]
        self._sums = Sums([*rows, *turns, *lines, *channels, *moved, *weights], families)
        self._stretches = np.array([np.zeros(len(STRETCHES)) if p is None else stretches(p) for p in products])
        self._stretches = self._stretches.reshape(len(products), len(STRETCHES))
        self._flow = Flow(operators, families, step)
        self._convolution = np.isin(self._kinds, ("conv", "grouped", "depthwise"))

    def quantities(self, widths: Array) -> Quantities:
        """Of widths, float64 (batch, families)."""
        rows, turns, lines, inputs, contracted, outputs, moved, weights = np.split(self._sums(widths), 8, axis=1)
        groups = inputs / np.maximum(contracted, 1.0)
        classes = self._classes(inputs, contracted, outputs, groups)

        def of(*names: str) -> NDArray[np.bool_]:
            return np.isin(classes, [NUMBER[name] for name in names])

        deep = np.where(of("conv"), self._padded(contracted), contracted)
        wide = np.where(of(*UNBLOCKED), outputs, self._padded(outputs))
        taps = self._taps * np.where(of(*UNBLOCKED), 1.0, self._inside)
        # A matrix product with the image along the vectors; one position is a product with a vector.
        positions = np.where(of("odd", "odd_pointwise") & (rows > 1), self._padded(rows), rows)
        operations = np.where(of(*MOVING), 0.0, 2 * positions * taps * deep * wide)
        unrolled = np.where(of("odd"), rows * self._taps * inputs * ITEM_BYTES, 0.0)
        # Unrolling copies line after line, and pooling computes them: of small images that takes longer than the bytes.
        lines = np.where(of("odd"), self._taps * inputs * lines, np.where(of("pool"), lines, 0.0))
        calls = np.where(of(*UNBLOCKED), groups, 1.0)
        # Depthwise, a load serves the one block that it belongs to.
        loads = np.where(of("conv", "narrow"), rows * taps * deep * np.ceil(wide / self._step / FILTERS), 0.0)
        padding = deep * wide / np.maximum(contracted * outputs, 1.0)  # blocked kernels hold their weights padded
        weights = weights * np.where(of(*UNBLOCKED), 1.0, padding * np.minimum(1.0, FETCHED * self._touched))
        waits = 2 * rows * taps * deep * self._awaited(outputs, groups)
        waits = np.where(of("conv", "narrow"), waits, 0.0)
        once = np.where(of("odd", "odd_pointwise", "matmul") & (rows == turns), weights * turns, 0.0)
        again = weights * (turns - 1)
        blocked, reordered, reorders = self._flow(widths, of("conv", "depthwise"), of("narrow"), self._convolution)
        classes = np.where(of("pool") & blocked, NUMBER["memory"], classes)
        lines = np.where(classes == NUMBER["memory"], 0.0, lines)
        moved = moved + unrolled
        return Quantities(
            classes, operations, loads, waits, moved, reordered, reorders, weights, once, again, calls, lines
        )

    def _awaited(self, outputs: Array, groups: Array) -> Array:
        """Output channels that a blocked convolution might compute besides, for each position, where it sums up fewer
        than `IN_FLIGHT` vectors at once. Outputs that do not fill a set of `FILTERS` blocks are a smaller set."""
        blocks = np.ceil(outputs / np.maximum(groups, 1.0) / self._step)
        sets, rest = np.divmod(blocks, FILTERS)
        vectors = np.zeros(blocks.shape)
        for length, often in zip(STRETCHES, self._stretches.T, strict=True):
            vectors += often * sets * max(IN_FLIGHT - FILTERS * length, 0)
            vectors += often * (rest > 0) * np.maximum(IN_FLIGHT - rest * length, 0.0)
        return np.asarray(groups * vectors * self._step)

    def _padded(self, channels: Array) -> Array:
        return np.asarray(np.ceil(channels / self._step) * self._step)

    def _classes(self, inputs: Array, contracted: Array, outputs: Array, groups: Array) -> NDArray[np.int64]:
        kinds = np.broadcast_to(self._kinds, inputs.shape)
        step, hard = self._step, self._hard
        odd = np.where(self._taps == 1, NUMBER["odd_pointwise"], NUMBER["odd"])
        plain = np.where(inputs < step, NUMBER["narrow"], np.where(inputs % hard == 0, NUMBER["conv"], odd))
        whole = (contracted % step == 0) & (outputs % np.maximum(groups * step, 1) == 0)
        return np.select(
            [kinds == kind for kind in ("conv", "grouped", "depthwise", "matmul", "pool", "math", "clip", "view")],
            [
                plain,
                np.where(whole, NUMBER["conv"], odd),
                np.where(inputs % hard == 0, NUMBER["depthwise"], NUMBER["odd_depthwise"]),
                NUMBER["matmul"],
                *(NUMBER[name] for name in ("pool", "math", "clip", "view")),
            ],
            NUMBER["memory"],
        )


def lines_of(operator: Operator) -> Size:
    """Of a product those along the image's last axis but one, over the batch; of a pool those of all channels."""
    if operator.product is not None:
        return Size(operator.product.rows.axes[:2])
    return Size(operator.writes[0].axes[:-1]) if operator.kind == "pool" else Size(())


def stretches(product: Product) -> Array:
    """How many stretches of each of `STRETCHES` a blocked convolution computes at once, for each position, float64. At
    the ends of a row every position is one of its own, as some of its taps are outside; with one tap all rows together
    are a single row."""
    sizes = [axis.constant for axis in product.rows.axes if not axis.terms]
    positions, edges = (prod(sizes), 0) if product.taps == 1 else (sizes[-1] if sizes else 1, EDGES)
    edges = min(edges, positions)
    left, found = positions - edges, []
    for length in STRETCHES:
        often, left = divmod(left, length)
        found.append(often)
    found[-1] += edges
    return np.array(found, np.float64) / max(positions, 1)


class Flow:
    """Which values come in blocks of channels, and where they are reordered: once for all kernels that want a value in
    the other order."""

    def __init__(self, operators: tuple[Operator, ...], families: int, step: int) -> None:
        """Args: as `Kernels`; all operators are timed."""
        self._step = step
        self._layouts = [operator.layout for operator in operators]
        self._sources = [
            [-1 if source is None else source for source in operator.sources[: len(operator.reads)]]
            for operator in operators
        ]
        reads = [
            size for operator, own in zip(operators, self._sources, strict=True) for size in operator.reads[: len(own)]
        ]
        starts = np.cumsum([0, *map(len, self._sources)])
        self._spans = [slice(*pair) for pair in pairwise(starts.tolist())]
        channels = [[(Size(size.axes[1:2]), 1)] for size in reads]
        images = [[(Size(size.axes[2:]), ITEM_BYTES if len(size.axes) > 2 else 0)] for size in reads]
        self._sums = Sums([*channels, *images], families)

    def __call__(
        self, widths: Array, wants_blocks: Bools, takes_plain: Bools, convolution: Bools
    ) -> tuple[Bools, Array, Array]:
        """Of widths, float64 (batch, families).

        Args: wants_blocks, takes_plain: boolean (batch, operators), of convolutions those that read blocks, and those
            that read plain channels and write blocks; convolution: boolean (operators,).
        Returns: which operators write blocks, boolean; bytes that are reordered before each, and how many inputs,
            float64; all (batch, operators).
        """
        blocked = wants_blocks | takes_plain
        reordered, reorders = np.zeros(blocked.shape), np.zeros(blocked.shape)
        if self._step == 1:
            return blocked, reordered, reorders
        channels, images = np.split(self._sums(widths), 2, axis=1)
        padded = np.ceil(channels / self._step) * self._step
        size, fills = images * (channels + padded), channels == padded
        nothing = np.zeros(len(widths), np.bool_)
        both: dict[int, Bools] = {}  # what is there in either order already
        for number, sources in enumerate(self._sources):
            comes = [nothing if source < 0 else blocked[:, source] for source in sources]
            span = self._spans[number]
            if convolution[number]:
                wants = wants_blocks[:, number]
            elif self._layouts[number] == "plain" or not sources:
                wants = nothing
            else:
                wants = np.logical_and.reduce(comes)
                if self._layouts[number] == "whole":
                    wants &= fills[:, span].all(axis=1)
                blocked[:, number] = wants
            for place, (source, come) in enumerate(zip(sources, comes, strict=True), span.start):
                needed = (come != wants) & ~both.get(source, nothing)
                both[source] = both.get(source, nothing) | needed
                reordered[:, number] += np.where(needed, size[:, place], 0.0)
                reorders[:, number] += needed & (size[:, place] > 0)
        return blocked, reordered, reorders


@dataclass(frozen=True)
class Rates:
    """How fast kernels of each class are, float64 (classes,): seconds an operation, a byte of activations, a call,
    a line.

    load, wait: seconds of one, as `Quantities` counts them. reorder: seconds a reordered byte; reorder_call: seconds
    an input that is reordered. weight: seconds a byte of weights; once: seconds more for one that is used once.
    streaming: seconds more for a byte that the cache does not hold, see `streamed`. call: seconds once a call of the
    network.
    """

    operation: Array
    byte: Array
    overhead: Array
    line: Array
    load: float
    wait: float
    reorder: float
    reorder_call: float
    weight: float
    once: float
    streaming: float
    cache: float
    call: float

    def seconds(self, found: Quantities) -> tuple[Array, Array, Array]:
        """Seconds of computing, of moving bytes, and of overhead, each (batch, operators)."""
        total = found.weights.sum(axis=1, keepdims=True)
        moving = found.moved * self.byte[found.classes] + found.reordered * self.reorder
        moving += found.weights * (self.weight + self.streaming * streamed(total, self.cache)) + found.once * self.once
        moving += found.again * (self.weight + self.streaming * streamed(found.weights, self.cache))
        computing = found.operations * self.operation[found.classes]
        computing += found.loads * self.load + found.waits * self.wait
        starting = found.calls * self.overhead[found.classes] + found.lines * self.line[found.classes]
        starting += found.reorders * self.reorder_call
        return computing, moving, starting


def streamed(weights: Array, cache: float) -> Array:
    """The share of so many bytes of weights, of the whole network, that a cache of `cache` bytes does not hold. Every
    call walks through all of them in the same order, so that of twice as many nothing is left when it is wanted."""
    return np.asarray(np.clip(weights / max(cache, 1.0) - 1.0, 0.0, 1.0))


def rates_of(profile: DeviceProfile) -> Rates:
    """The measured rates of a profile's calibration, or the same for all classes from its peaks."""
    cache = profile.memory.cache.si if profile.memory.cache is not None else 0.0
    measured = profile.calibration
    if measured is None:
        same = np.array([name not in FUSED for name in CLASSES], np.float64)
        return Rates(
            same / profile.compute.fp32.reached,
            same / profile.memory.reached,
            same * profile.overheads.operator.si,
            same * 0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            1 / profile.memory.reached,
            cache,
            profile.overheads.call.si,
        )
    # Profiles from before these were timed apart have them among what moves bytes.
    classes = [getattr(measured, name) or measured.memory for name in CLASSES]

    def seconds_of(rate: Rate | Bandwidth | None) -> float:
        return 0.0 if rate is None else 1 / rate.si

    return Rates(
        np.array([0.0 if one.rate is None else 1 / one.rate.si for one in classes]),
        np.array([seconds_of(one.bandwidth) for one in classes]),
        np.array([one.overhead.si for one in classes]),
        np.array([0.0 if one.line is None else one.line.si for one in classes]),
        seconds_of(measured.loads),
        seconds_of(measured.waits),
        seconds_of(measured.reorder),
        0.0 if measured.reorder_overhead is None else measured.reorder_overhead.si,
        seconds_of(measured.weights),
        seconds_of(measured.used_once),
        seconds_of(measured.streaming),
        cache,
        profile.overheads.call.si,
    )
