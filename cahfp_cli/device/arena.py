"""How much memory ONNX Runtime holds for activations on the CPU, as a function of the widths.

The model, in the order in which the runtime decides:

- A tensor takes its bytes, rounded up to 256, from the kernel that writes it to the last that reads it.
- A blocked convolution reads whole blocks of channels if their number is a multiple of `multiple`, or fewer channels
  than one block as they are, and writes whole blocks. Pools and concatenations of whole blocks stay blocked, and
  so do elementwise kernels. What is read in the other layout is copied, and the copy held to its last reader.
- A blocked convolution adds a sum's other input while it writes, in that input's place.
- A tensor takes over the buffer of its own shape that was left last, which is then held all the time in between.
- The buffers are placed once, in order, each in the tightest hole or on top; later calls hold that whole plan.
- Beside it stand the results, and the largest workspace of a plain convolution (its columns). Inputs come from outside.

Holes and layouts depend on the widths, so this is not quite monotone, as the runtime is not: a few channels more can
close a hole, or make a width a multiple that the blocked kernels take.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.device.sizes import Axis, Size

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
StepKind = Literal["conv", "depthwise", "pool", "join", "concat", "plain"]
"""join: elementwise, of one tensor or several, in the layout of its inputs; plain: knows no blocks."""

ROUNDING = 256
"""Bytes to which the arena and its plan round every block."""
COLUMN_BYTES = 128 * 128 * 4
"""Workspace of a plain convolution for each thread, which it fills with columns piece by piece."""


@dataclass(frozen=True)
class Tensor:
    """A block of activations: its axes (channels at 1 where it can be in blocks), and bytes an element.

    inferred: whether the runtime can infer its shape from the file; only then can its buffer be used again.
    """

    axes: tuple[Axis, ...]
    itemsize: int
    inferred: bool = True


@dataclass(frozen=True)
class Step:
    """One kernel: the tensors it reads and writes.

    columns: rows of a plain convolution's column matrix, filters of a group and output positions; None without
    columns. workspace: elements, fp32, that another kernel takes for itself. fuses: of a sum, which input can be added
    up inside the convolution that gives it, which is the step before.
    """

    kind: StepKind
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    columns: tuple[Size, Size, Size] | None = None
    workspace: Size | None = None
    fuses: int | None = None


@dataclass(frozen=True)
class Schedule:
    """Kernels in order. given: tensors of the caller; results: tensors handed to the caller."""

    tensors: tuple[Tensor, ...] = ()
    steps: tuple[Step, ...] = ()
    given: frozenset[int] = frozenset()
    results: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Layout:
    """How kernels want channels: in blocks of `block` (1: never), if there are a multiple of `multiple`; threads."""

    block: int = 1
    multiple: int = 1
    threads: int = 1


class Arena:
    """A schedule compiled for many evaluations: called with widths (batch, families), returns the peak, bytes (batch,).

    The inputs count, though they come from outside the arena.
    """

    def __init__(self, schedule: Schedule, families: int, layout: Layout) -> None:
        self._schedule, self._layout = schedule, layout
        tensors, steps = schedule.tensors, schedule.steps
        self._sizes = _Products([tensor.axes for tensor in tensors], families)
        self._blocked = _Products([tensor.axes for tensor in tensors], families, layout.block)
        self._channels = _Products([tensor.axes[1:2] for tensor in tensors], families)
        self._last = _Products([tensor.axes[-1:] for tensor in tensors], families)
        self._ranks = np.array([len(tensor.axes) for tensor in tensors], np.float64)
        self._inferred = np.tile([tensor.inferred for tensor in tensors], 2)
        self._itemsizes = np.array([tensor.itemsize for tensor in tensors], np.float64)
        self._columns = [step.columns for step in steps if step.columns is not None]
        self._column_sizes = _Products([size.axes for three in self._columns for size in three], families)
        self._workspaces = _Products([step.workspace.axes for step in steps if step.workspace is not None], families)

    def __call__(self, widths: Array) -> Array:
        if not self._schedule.steps:
            return np.zeros(len(widths))
        channels = self._channels(widths)
        blocked, wants = self._layouts(channels)
        flat = self._sizes(widths) * self._itemsizes
        padded = self._blocked(widths) * self._itemsizes
        native, other = np.where(blocked, padded, flat), np.where(blocked, flat, padded)
        # Of two tensors of one rank and last axis, the same bytes mean the same shape.
        shapes = np.concatenate([native, other], axis=1) * 2.0**16 + np.tile(self._last(widths) * 8 + self._ranks, 2)
        shapes = np.where(self._inferred, shapes, -1.0 - np.arange(shapes.shape[1]))
        plan = self._plan(_rounded(native), _rounded(other), shapes, blocked, wants)
        results = sum((native[:, tensor] for tensor in self._schedule.results), np.zeros(len(widths)))
        given = flat[:, sorted(self._schedule.given)].sum(axis=1)
        return np.asarray(given + plan + self._workspace(widths, blocked) + _rounded(results))

    def _layouts(self, channels: Array) -> tuple[Flags, list[Flags]]:
        """Which tensors are written in blocks (batch, tensors), and which steps read blocks, each (batch,)."""
        block, multiple = self._layout.block, self._layout.multiple
        blocked = np.zeros(channels.shape, bool)
        wants = []
        for step in self._schedule.steps:
            first, inputs = channels[:, step.inputs[0]], list(step.inputs)
            whole = first % multiple == 0
            reads: Flags = np.zeros(len(channels), bool)
            writes: Flags = reads
            if block > 1 and step.kind != "plain":
                if step.kind == "conv":
                    reads = whole & (first >= block)
                    writes = reads | (first < block)
                elif step.kind == "depthwise":
                    reads = whole
                    writes = whole
                else:
                    reads = np.asarray(blocked[:, inputs].all(axis=1))
                    if step.kind in ("pool", "concat"):
                        reads = reads & (channels[:, inputs] % block == 0).all(axis=1)
                    writes = reads
            blocked[:, list(step.outputs)] = writes[:, None]
            wants.append(reads)
        return blocked, wants

    def _plan(self, native: Array, other: Array, shapes: Array, blocked: Flags, wants: list[Flags]) -> Array:
        """Height of the plan, bytes (batch,). Blocks are the tensors as they are written, then their copies."""
        count, steps = len(self._schedule.tensors), self._schedule.steps
        until = self._last_reads(blocked, wants)
        sizes = np.concatenate([native, other * (until[:, count:] >= 0)], axis=1)
        sizes[:, list(self._schedule.given | self._schedule.results)] = 0
        buffers = _Buffers(sizes, until, shapes)
        made = np.zeros(blocked.shape, bool)
        for number, step in enumerate(steps):
            for tensor in dict.fromkeys(step.inputs):  # the first reader that wants blocks makes them
                rows = wants[number] & ~blocked[:, tensor] & ~made[:, tensor]
                buffers.hold(count + tensor, rows)
                made[:, tensor] |= rows
            buffers.release(before(number))
            if number + 1 < len(steps) and steps[number + 1].fuses is not None:
                sizes[wants[number + 1], step.outputs[0]] = 0
            every = np.ones(len(sizes), bool)
            if step.fuses is not None:  # the sum takes the place of what it is added to, unless that is read again
                held = step.inputs[1 - step.fuses]
                over = wants[number] & (until[:, held] == during(number))
                buffers.hand_on(held, step.outputs[0], over)
                every = ~over
            for tensor in step.outputs:
                buffers.hold(tensor, every)
            buffers.release(during(number))
            for tensor in step.outputs:  # what is written in blocks is put in order at once if anything reads it so
                buffers.hold(count + tensor, blocked[:, tensor])
            buffers.release(after(number))
        return buffers.height()

    def _last_reads(self, blocked: Flags, wants: list[Flags]) -> NDArray[np.int64]:
        """When each block is read last: tensors as written, then copies (-1: no copy); (batch, 2 tensors)."""
        count = len(self._schedule.tensors)
        until = np.full((len(blocked), 2 * count), -1)
        written = {}
        for number, step in enumerate(self._schedule.steps):
            until[:, list(step.outputs)] = during(number)
            written.update(dict.fromkeys(step.outputs, number))
            for tensor in step.inputs:
                as_written, copied = blocked[:, tensor] == wants[number], until[:, count + tensor] >= 0
                until[as_written, tensor] = during(number)
                until[~as_written & ~copied & ~blocked[:, tensor], tensor] = before(number)
                until[~as_written, count + tensor] = during(number)
        for tensor, number in written.items():
            reordered = blocked[:, tensor] & (until[:, count + tensor] >= 0)
            until[reordered, tensor] = np.maximum(until[reordered, tensor], after(number))
        return until

    def _workspace(self, widths: Array, blocked: Flags) -> Array:
        """The largest workspace, bytes (batch,)."""
        largest = np.zeros(len(widths))
        if self._columns:
            rows, filters, positions = np.moveaxis(self._column_sizes(widths).reshape(len(widths), -1, 3), 2, 0)
            whole = rows * positions * 4
            needed = np.where(filters > positions, whole, COLUMN_BYTES * self._layout.threads)
            outputs = [step.outputs[0] for step in self._schedule.steps if step.columns is not None]
            largest = (needed * ~blocked[:, outputs]).max(axis=1)
        others = self._workspaces(widths)
        return np.maximum(_rounded(largest), _rounded(others * 4).max(axis=1) if others.shape[1] else 0)


def before(step: int) -> int:
    """The time at which a step's inputs are put in blocks."""
    return 3 * step


def during(step: int) -> int:
    """The time at which its kernel runs."""
    return 3 * step + 1


def after(step: int) -> int:
    """The time at which its outputs are put in order."""
    return 3 * step + 2


class _Buffers:
    """Gives blocks their buffers, as ONNX Runtime does before anything runs, then their places, for a batch at once.

    A block takes over the buffer of its shape that was left last, which is then held all the time in between.
    """

    def __init__(self, sizes: Array, until: NDArray[np.int64], shapes: Array) -> None:
        self._sizes, self._until, self._shapes = sizes, until, shapes
        self._buffer = np.tile(np.arange(sizes.shape[1]), (len(sizes), 1))
        self._left = np.full(sizes.shape, -1)  # when a buffer was left, -1 while it is in use
        self._live = np.zeros(sizes.shape, bool)
        self._owners: list[int] = []  # blocks with a buffer of their own in some candidate
        self._held: list[int] = []
        self._clock = 0
        self._events: list[tuple[int, Flags] | int] = []

    def hold(self, block: int, rows: Flags) -> None:
        """A block comes to life in some candidates; blocks of no size never do."""
        rows = rows & (self._sizes[:, block] > 0)
        if not rows.any():
            return
        own = rows
        if self._owners:
            owners = np.array(self._owners)
            left = np.where(self._shapes[:, owners] == self._shapes[:, [block]], self._left[:, owners], -1)
            best = left.argmax(axis=1)
            found = rows & (left.max(axis=1) >= 0)
            taken = owners[best[found]]
            self._buffer[found, block] = taken
            self._left[found, taken] = -1
            own = rows & ~found
        self._live[:, block] |= rows
        self._held.append(block)
        if own.any():
            self._events.append((block, own))
            if block not in self._owners:
                self._owners.append(block)

    def hand_on(self, block: int, successor: int, rows: Flags) -> None:
        """The successor lives where the block did, in some candidates."""
        rows = rows & (self._sizes[:, block] > 0)
        self._buffer[rows, successor] = self._buffer[rows, block]
        self._live[rows, block] = False
        self._live[rows, successor] = True
        self._held.append(successor)

    def release(self, time: int) -> None:
        """What was read last at that time leaves its buffer."""
        for block in dict.fromkeys(self._held):
            done = self._live[:, block] & (self._until[:, block] <= time)
            if done.any():
                self._clock += 1
                self._left[done, self._buffer[done, block]] = self._clock
                self._live[done, block] = False
        self._held = [block for block in dict.fromkeys(self._held) if self._live[:, block].any()]
        self._events.append(time)

    def height(self) -> Array:
        """Bytes (batch,) of the plan."""
        rows = np.arange(len(self._sizes))[:, None]
        until = np.full(self._until.shape, -1)
        np.maximum.at(until, (rows, self._buffer), np.where(self._sizes > 0, self._until, -1))
        planner = _Planner(*self._sizes.shape)
        for event in self._events:
            if isinstance(event, int):
                planner.release(until <= event)
            else:
                block, own = event
                planner.place(block, self._sizes[:, block] * own)
        return planner.height


class _Planner:
    """Places buffers where ONNX Runtime's memory pattern does, for a batch of candidates at once."""

    def __init__(self, batch: int, blocks: int) -> None:
        self._sizes, self._offsets = np.zeros((batch, blocks)), np.zeros((batch, blocks))
        self._held: list[int] = []
        self.height = np.zeros(batch)

    def place(self, block: int, size: Array) -> None:
        """Into the tightest hole that is large enough, else on top of what is held; size: bytes (batch,), 0 is not."""
        sizes = self._sizes[:, self._held]
        starts = np.where(sizes > 0, self._offsets[:, self._held], np.inf)
        ends = np.where(sizes > 0, starts + sizes, 0)
        holes = np.concatenate([np.zeros((len(size), 1)), ends], axis=1)
        above = np.where(starts[:, None, :] >= holes[:, :, None], starts[:, None, :], np.inf)
        gaps = np.minimum(above.min(axis=2, initial=np.inf), self.height[:, None]) - holes
        waste = np.where(gaps >= size[:, None], gaps - size[:, None], np.inf)
        least = waste.min(axis=1)
        lowest = np.where(waste == least[:, None], holes, np.inf).min(axis=1)
        offset = np.where(np.isfinite(least), lowest, holes.max(axis=1))
        placed = size > 0
        self._offsets[placed, block], self._sizes[placed, block] = offset[placed], size[placed]
        self.height = np.where(placed, np.maximum(self.height, offset + size), self.height)
        if block not in self._held:
            self._held.append(block)

    def release(self, done: Flags) -> None:
        """No longer held where done, (batch, blocks)."""
        self._sizes[:, self._held] *= ~done[:, self._held]
        self._held = [block for block in self._held if self._sizes[:, block].any()]


class _Products:
    """Products of lengths: called with widths (batch, families), returns elements (batch, products).

    block: a product's second axis, the channels of four axes, is rounded up to it.
    """

    def __init__(self, products: Sequence[tuple[Axis, ...]], families: int, block: int = 1) -> None:
        one = Axis(1)
        axes = list(dict.fromkeys([one, *(axis for product in products for axis in product)]))
        number = {axis: index for index, axis in enumerate(axes)}
        depth = max((len(product) for product in products), default=0)
        padded = [[*(number[axis] for axis in product), *[0] * (depth - len(product))] for product in products]
        self._factors = np.array(padded, int).reshape(len(products), depth).T
        self._constants = np.array([axis.constant for axis in axes], np.float64)
        self._multiplicities = np.zeros((families, len(axes)))
        for index, axis in enumerate(axes):
            for family, multiplicity in axis.terms:
                self._multiplicities[family, index] += multiplicity
        self._block = np.array([block if len(product) == 4 else 1 for product in products], np.float64)

    def __call__(self, widths: Array) -> Array:
        lengths = widths @ self._multiplicities + self._constants
        result = np.ones((len(widths), self._factors.shape[1]))
        for place, factor in enumerate(self._factors):
            length = lengths.take(factor, axis=1)
            result *= np.ceil(length / self._block) * self._block if place == 1 else length
        return result


def _rounded(sizes: Array) -> Array:
    return np.ceil(sizes / ROUNDING) * ROUNDING
