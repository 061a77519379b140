"""Bring the clients' rows together with the matching rows of the global checkpoint, a block at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError
from cahfp_cli.pruning.index_map import Factors, Selector, selector
from cahfp_cli.reconstruction.clients import Client
from cahfp_cli.reconstruction.rules import Floats, Rule, Sums


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

    `factors` are those of these rows, per axis; empty where nothing was compensated.
    """

    client: Client
    first: int
    last: int
    axes: tuple[NDArray[np.integer] | None, ...]
    factors: tuple[Factors | None, ...]
    places: Selector

    def read(self, name: str) -> Array:
        return self.client.file.read_rows(name, self.first, self.last)


def parts_of(block: Block, clients: Sequence[Client]) -> Iterator[Part]:
    """The parts of a block, one for each client that holds the tensor, in the clients' order."""
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
        yield Part(client, first, last, axes, factors, selector(axes, block.block_shape))


def coverage(block: Block, parts: Sequence[Part]) -> tuple[Floats, NDArray[np.int64]]:
    """Per coordinate, the summed weight and the number of the clients that cover it.

    Axes on which every client has the whole length have length 1 here: the same holds all along them.
    """
    reduced = tuple(
        1 if all(part.axes[axis] is None for part in parts) else length for axis, length in enumerate(block.block_shape)
    )
    weight, count = np.zeros(reduced), np.zeros(reduced, np.int64)
    for part in parts:
        held = np.ones([1] * len(reduced), np.bool_)
        for axis, indices in enumerate(part.axes):
            if indices is not None:
                along = np.zeros(reduced[axis], np.bool_)
                along[indices] = True
                held = held & along.reshape([-1 if other == axis else 1 for other in range(len(reduced))])
        weight += part.client.weight * held
        count += held
    return weight, count


def merge_floats(
    block: Block,
    previous: Floats,
    values: Callable[[Part], Floats],
    clients: Sequence[Client],
    rule: Rule,
) -> Floats:
    """Merge one block of a float tensor.

    Args: previous: the global checkpoint's values, of the block's shape; values: what a part brings, of its shape.
    Returns: float64, of the block's shape. Where no client covers a coordinate it is `previous`; where all that have
        a part in the result have the same bits, it is those bits, which arithmetic alone would not give for F64.
    """
    # A power of two changes no digit, and keeps the sums of the largest numbers from overflowing.
    scale = math.ldexp(1.0, -math.frexp(sum(client.weight for client in clients))[1])
    parts = list(parts_of(block, clients))
    weight, count = coverage(block, parts)
    weighted = np.full(block.block_shape, -0.0)  # what leaves every number as it is when added, also -0.0
    agreed = np.full(block.block_shape, np.nan)  # NaN: not seen yet; values are finite
    unanimous = np.ones(block.block_shape, np.bool_)
    for part in parts:
        value = values(part)
        weighted[part.places] += part.client.weight * scale * value
        before = agreed[part.places]
        unanimous[part.places] &= np.isnan(before) | _same_bits(before, value)
        agreed[part.places] = value
    total = float(sum(client.weight for client in clients))
    missing = np.where(count == len(clients), 0.0, total - weight)
    if rule.previous_counts:
        unanimous &= (count == len(clients)) | _same_bits(agreed, previous)
    merged = rule.merge(Sums(previous, weighted, weight * scale, missing * scale, total * scale))
    return np.where(count > 0, np.where(unanimous, agreed, merged), previous)


def merge_integers(block: Block, previous: Array, clients: Sequence[Client]) -> Array:
    """Merge one block of an integer or boolean tensor: a batch counter becomes the largest of the covering clients';
    anything else must be the same at all clients that cover it. Where no client does, the previous value stays.

    Raises: InputError: clients differ.
    """
    merged = previous.copy()
    seen = np.zeros(block.block_shape, np.bool_)
    is_counter = block.name.rpartition(".")[2] == "num_batches_tracked"
    for part in parts_of(block, clients):
        value = part.read(block.name)
        before, was_seen = merged[part.places], seen[part.places]
        if is_counter:
            value = np.where(was_seen, np.maximum(before, value), value)
        elif np.any(was_seen & (before != value)):
            raise InputError(
                f"{part.client.file.path}: integer tensor {shown(block.name)} differs from another client's, and "
                "integers are not averaged.\nMake them equal, or leave one of the clients out."
            )
        merged[part.places] = value
        seen[part.places] = True
    return merged


def _same_bits(left: Floats, right: Floats) -> NDArray[np.bool_]:
    return np.asarray(left.view(np.int64) == right.view(np.int64))
