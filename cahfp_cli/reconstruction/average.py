"""Merge one block of a tensor by a rule."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.formats.axes import selector
from cahfp_cli.formats.index_map import last_name
from cahfp_cli.reconstruction.blocks import Block, Holders, Part, parts_of
from cahfp_cli.reconstruction.clients import Client
from cahfp_cli.reconstruction.gate import COUNTER
from cahfp_cli.reconstruction.rules import Floats, Rule, Sums

LONG_ROW = 512
"""Elements of a row."""
Values = Callable[[Part], Array]
"""What a part brings: floats of its own shape."""


def merge_floats(
    block: Block,
    previous: Array,
    values: Values,
    clients: Sequence[Client],
    holders: Holders,
    rule: Rule,
) -> Floats:
    """Merge one block of a float tensor.

    Args: previous: the global checkpoint's values, of the block's shape.
    Returns: float64, of the block's shape. Where no client covers a coordinate it is `previous`. Of float64 values,
        where all that have a part in the result have the same bits, it is those bits, which arithmetic alone gives only
        for narrower ones.
    """
    before = previous.astype(np.float64)
    if rule.of_values is not None:
        return _of_values(block, before, values, clients, rule.of_values)
    if rule.of_sums is None:
        raise ValueError(f"rule {rule.name} says nothing")
    # A power of two changes no digit, and keeps the sums of the largest numbers from overflowing.
    total = float(sum(client.weight for client in clients))
    members = sum(client.members for client in clients)
    scale = math.ldexp(1.0, -math.frexp(total)[1])
    parts = list(parts_of(block, clients))
    weighted = np.full(block.block_shape, -0.0)  # what leaves every number as it is when added, also -0.0
    for part in parts:
        add(weighted, part, np.multiply(values(part), part.weight * scale, dtype=np.float64))
    weight, count = holders.of(block)
    missing = np.where(count == members, 0.0, np.maximum(total - weight, 0.0))
    merged = rule.of_sums(Sums(before, weighted, weight * scale, missing * scale, total * scale, holders.spread))
    if previous.dtype == np.float64:
        counts = holders.spread(count)
        agreed, unanimous = _agreed(block, parts, values)
        if rule.previous_counts:
            unanimous &= (counts == members) | _same_bits(agreed, before)
        merged = np.where(unanimous, agreed, merged)
    return merged if count.all() else np.where(holders.spread(count) > 0, merged, before)


def add(target: Floats, part: Part, values: Floats) -> None:
    """target[part.places] += values. Where columns are gathered, `np.add.at` on one long row after the other is twice
    as fast as NumPy's indexing with several arrays, which reads and writes through a copy."""
    columns = part.axes[1:]
    if all(isinstance(place, slice) for place in part.places[1:]) or target[0].size < LONG_ROW:
        target[part.places] += values
        return
    row_shape = target.shape[1:]
    places = np.arange(target[0].size).reshape(row_shape)[selector(columns, row_shape)].reshape(-1)
    rows = range(len(target)) if part.axes[0] is None else part.axes[0].tolist()
    by_row = target.reshape(len(target), -1)
    for row, own in zip(rows, values.reshape(len(values), -1), strict=True):
        np.add.at(by_row[row], places, own)


def merge_integers(block: Block, previous: Array, clients: Sequence[Client]) -> Array:
    """Merge one block of integers or flags: each becomes the largest of the covering clients'. Where no client covers
    it, the previous value stays.

    What training counts, every client that trained has changed; a table of indices none has. So the previous value
    also stays where one of the covering clients left it as it was, but for batch counters: then no single client can
    change a table.
    """
    merged = previous.copy()
    seen = np.zeros(block.block_shape, np.bool_)
    untouched = np.zeros(block.block_shape, np.bool_)
    for part in parts_of(block, clients):
        value, before, was_seen = part.read(block.name), merged[part.places], seen[part.places]
        held = np.broadcast_to(np.asarray(part.client.counts_of(block.name, part.first, part.last)) > 0, value.shape)
        merged[part.places] = np.where(held, np.where(was_seen, np.maximum(before, value), value), before)
        seen[part.places] = was_seen | held
        untouched[part.places] |= held & (value == previous[part.places])
    return merged if last_name(block.name) == COUNTER else np.where(untouched, previous, merged)


def _of_values(
    block: Block, previous: Floats, values: Values, clients: Sequence[Client], rule: Callable[[Floats], Floats]
) -> Floats:
    parts = list(parts_of(block, clients))
    stack = np.full((max(1, len(parts)), *block.block_shape), np.nan)
    for number, part in enumerate(parts):
        own = stack[number : number + 1].reshape(block.block_shape)  # a view, also of a scalar
        own[part.places] = values(part)
    return np.where(np.isfinite(stack).any(axis=0), rule(stack), previous)


def _agreed(block: Block, parts: Sequence[Part], values: Values) -> tuple[Floats, NDArray[np.bool_]]:
    """The value of the clients that hold a coordinate, and where they have the same bits."""
    agreed = np.full(block.block_shape, np.nan)  # NaN: not seen yet; values are finite
    unanimous = np.ones(block.block_shape, np.bool_)
    for part in parts:
        held = np.asarray(part.weight) > 0
        before, value = agreed[part.places], values(part).astype(np.float64)
        unanimous[part.places] &= ~held | np.isnan(before) | _same_bits(before, value)
        agreed[part.places] = np.where(held, value, before)
    return agreed, unanimous & ~np.isnan(agreed)


def _same_bits(left: Floats, right: Floats) -> NDArray[np.bool_]:
    return np.asarray(left.view(np.int64) == right.view(np.int64))
