"""Bring the clients' rows together with the matching rows of the global checkpoint, a block at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.formats.axes import Selector, selector
from cahfp_cli.formats.factors import Factors
from cahfp_cli.reconstruction.clients import Client
from cahfp_cli.reconstruction.rules import Floats

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Rows `first`..`last` - 1 (axis 0) of tensor `name` of global shape `shape`; a scalar is its own row 0."""

    name: str
    shape: tuple[int, ...]
    first: int
    last: int

    @property
    def block_shape(self) -> tuple[int, ...]:
        return (self.last - self.first, *self.shape[1:]) if self.shape else ()


@dataclass(frozen=True)
class Part:
    """What one client has of a block: rows `first`..`last` - 1 of its own tensor go to `places` of the block.

    `factors` are those of these rows, per axis; empty where nothing was compensated. A partial aggregate has a `weight`
    for each coordinate, as an array that broadcasts against what it brings, and 0 where none of its clients is.
    """

    client: Client
    first: int
    last: int
    axes: tuple[NDArray[np.integer] | None, ...]
    factors: tuple[Factors | None, ...]
    places: Selector
    weight: float | Floats

    def read(self, name: str) -> Array:
        return self.client.tensors.read_rows(name, self.first, self.last)


def parts_of(block: Block, clients: Sequence[Client]) -> Iterator[Part]:
    """The parts of a block, one for each client that holds some of it, in the clients' order."""
    for client in clients:
        if not client.covers(block.name):
            continue
        entry = client.index_map.tensors[block.name]
        axes: tuple[NDArray[np.integer] | None, ...] = entry.axes
        factors, first, last = entry.factors, block.first, block.last
        if axes and axes[0] is not None:
            first, last = (int(row) for row in np.searchsorted(axes[0], [block.first, block.last]))
            axes = (axes[0][first:last] - block.first, *axes[1:])
        if factors and factors[0] is not None:
            factors = (factors[0][first:last], *factors[1:])
        if last > first:
            weight = client.weights_of(block.name, first, last)
            yield Part(client, first, last, axes, factors, selector(axes, block.block_shape), weight)


TABLE = 1 << 18
"""Most pairs of classes that are counted once for a whole tensor."""


class Holders:
    """Which clients hold each coordinate of one tensor: of a block, the summed weight and the number of them.

    Coordinates along an axis that the same clients hold form a class. With a few clients there are far fewer classes
    than coordinates, so that all their combinations are counted once; otherwise those of a block's rows are.
    """

    def __init__(self, name: str, shape: tuple[int, ...], clients: Sequence[Client]) -> None:
        self._holding = [client for client in clients if client.covers(name)]
        self._maps = [client.index_map.tensors[name].axes for client in self._holding]
        self._name, self._shape = name, shape
        self._uniform = not any(client.by_coordinate for client in self._holding)
        self._classes = [self._classes_along(axis) for axis in range(len(shape))]

    def _classes_along(self, axis: int) -> NDArray[np.intp] | None:
        """The class of each coordinate along an axis; None where all clients have the whole axis."""
        if not self._uniform:
            return np.arange(self._shape[axis])
        if all(axes[axis] is None for axes in self._maps):
            return None
        held = np.ones((self._shape[axis], len(self._maps)), np.bool_)
        for number, axes in enumerate(self._maps):
            indices = axes[axis]
            if indices is not None:
                held[:, number] = False
                held[indices, number] = True
        packed = np.ascontiguousarray(np.packbits(held, axis=1))
        keys = packed.view(np.dtype((np.void, packed.shape[1]))).reshape(-1)
        return np.asarray(np.unique(keys, return_inverse=True)[1].reshape(-1))

    @cached_property
    def _lengths(self) -> list[int]:
        """Number of classes along each axis."""
        return [1 if classes is None else int(classes.max(initial=-1)) + 1 for classes in self._classes]

    @cached_property
    def _held_classes(self) -> list[list[NDArray[np.intp] | None]]:
        """Per client and axis, the classes that it holds."""
        return [
            [
                None if classes is None or indices is None else np.unique(classes[indices])
                for classes, indices in zip(self._classes, axes, strict=True)
            ]
            for axes in self._maps
        ]

    @cached_property
    def _sizes(self) -> Counts:
        """How many coordinates of a row one combination of classes stands for, of the shape of a row of `of`."""
        sizes = np.ones([1] * len(self._shape[1:]), np.int64)
        for axis, classes in enumerate(self._classes[1:]):
            own = np.array([self._shape[axis + 1]]) if classes is None else np.bincount(classes)
            sizes = sizes * own.reshape([-1 if other == axis else 1 for other in range(sizes.ndim)])
        return sizes

    @cached_property
    def _table(self) -> tuple[Floats, Counts] | None:
        """Weight and number of the holders for all combinations of classes; None if they are too many."""
        if not self._uniform or math.prod(self._lengths) > TABLE:
            return None
        weight, count = np.zeros(self._lengths), np.zeros(self._lengths, np.int64)
        for client, classes in zip(self._holding, self._held_classes, strict=True):
            places = selector(tuple(classes), weight.shape)
            weight[places] += client.weight
            count[places] += 1
        return weight, count

    def of(self, block: Block) -> tuple[Floats, Counts]:
        """Summed weight and number of the holders, by row and by class along the other axes, with length 1 along axes
        that all clients have the whole of; `spread` gives each coordinate its own."""
        if self._table is not None:
            weight, count = self._table
            rows = self._classes[0] if self._classes else None
            if rows is None:
                return weight, count
            return weight[rows[block.first : block.last]], count[rows[block.first : block.last]]
        rows_apart = bool(self._classes) and self._classes[0] is not None
        shape = (block.last - block.first, *self._lengths[1:]) if rows_apart else tuple(self._lengths)
        weight, count = np.zeros(shape), np.zeros(shape, np.int64)
        if not self._uniform:
            for part in parts_of(block, self._holding):
                weight[part.places] += part.weight
                count[part.places] += part.client.counts_of(block.name, part.first, part.last)
            return weight, count
        for client, axes, classes in zip(self._holding, self._maps, self._held_classes, strict=True):
            own = axes[0]
            inside = None if own is None else own[slice(*np.searchsorted(own, [block.first, block.last]))] - block.first
            places = selector((inside, *classes[1:]), shape)
            weight[places] += client.weight
            count[places] += 1
        return weight, count

    @property
    def same_rows(self) -> bool:
        """Whether all rows have the same holders."""
        return bool(self._classes) and self._classes[0] is None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of a row of what `spread` gives: 1 along axes where all coordinates have the same holders."""
        pairs = zip(self._classes[1:], self._shape[1:], strict=True)
        return tuple(1 if classes is None else length for classes, length in pairs)

    def spread(self, by_class: Array) -> Array:
        """From rows and classes to something that broadcasts against the block."""
        for axis, classes in enumerate(self._classes[1:], 1):
            if classes is not None:
                by_class = np.take(by_class, classes, axis=axis)
        return by_class

    def histogram(self, block: Block) -> Counts:
        """How many coordinates of the block 0, 1, 2, ... clients hold."""
        _, count = self.of(block)
        rows = block.last - block.first if self._shape and self._classes[0] is None else 1
        sizes = np.broadcast_to(rows * self._sizes if self._shape else np.int64(1), count.shape)
        found = np.bincount(count.reshape(-1), weights=sizes.reshape(-1))  # exact below 2^53
        return found.astype(np.int64)
