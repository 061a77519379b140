"""How far clients moved from what they were given: norms of updates, clipping, and agreement with the result."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from cahfp_cli.checkpoint.digest import row_blocks
from cahfp_cli.checkpoint.dtypes import FLOATS, Array, largest
from cahfp_cli.checkpoint.sharded import Tensors
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError
from cahfp_cli.pruning.index_map import is_statistic, unscaled
from cahfp_cli.reconstruction.blocks import Block, Part, parts_of
from cahfp_cli.reconstruction.clients import Client
from cahfp_cli.reconstruction.rules import Floats

LEAST_NORM = 1e-12


@dataclass(frozen=True)
class Norms:
    """Euclidean norms of an update and of what it started from."""

    moved: float
    before: float

    @property
    def ratio(self) -> float:
        return self.moved / max(self.before, LEAST_NORM)


@dataclass(frozen=True)
class Update:
    """Of a client's weights, and of its running statistics."""

    weights: Norms
    statistics: Norms


def brought(part: Part, name: str, previous: Array, path: Path) -> Array:
    """The rows that a client brings of tensor `name`, without factors, as clipped; float, of the part's own shape.

    Args: previous: the global checkpoint's values, of the block's shape. path: of the global checkpoint.
    Raises: InputError: without its factors, a number is too large for the tensor's dtype, so that it could make the
        result so, whatever the others bring.
    """
    values = part.read(name)
    if part.factors:
        dtype = part.client.index_map.tensors[name].dtype
        with np.errstate(over="ignore"):  # refused below
            values = unscaled(values, previous[part.places], part.factors)
        if not (np.abs(values) <= largest(dtype)).all():
            raise InputError(
                f"{part.client.path}: without its factors, tensor {shown(name)} has numbers too large for "
                f"{dtype}; train it again from {path}."
            )
    shrink = part.client.shrink[is_statistic(name)]
    if shrink < 1:
        before = previous[part.places].astype(np.float64)
        values = before + shrink * (values.astype(np.float64) - before)
    return values


def measured(client: Client, checkpoint: Tensors) -> Update:
    """One pass over a client and what it holds of the checkpoint. Sums are exact, so blocks do not matter.

    Raises: InputError: its update is too large to have a norm.
    """
    squares: dict[bool, tuple[list[float], list[float]]] = {False: ([], []), True: ([], [])}
    for info in checkpoint.tensors.values():
        for first, last in row_blocks(info) if info.dtype in FLOATS else ():
            previous = checkpoint.read_rows(info.name, first, last)
            for part in parts_of(Block(info.name, info.shape, first, last), [client]):
                before = previous[part.places].astype(np.float64)
                after = brought(part, info.name, previous, checkpoint.path).astype(np.float64)
                moved, started = squares[is_statistic(info.name)]
                with np.errstate(over="ignore"):  # refused below
                    moved += _row_sums((after - before) ** 2)
                    started += _row_sums(before**2)
    of_weights, of_statistics = (Norms(_root(moved), _root(before)) for moved, before in squares.values())
    if not math.isfinite(of_weights.ratio + of_statistics.ratio):
        raise InputError(f"{client.path}: its update is too large to have a norm; train it again, or leave it out.")
    return Update(of_weights, of_statistics)


def _root(squares: list[float]) -> float:
    try:
        return math.sqrt(math.fsum(squares))
    except OverflowError:
        return math.inf


def check_update(client: Client, update: Update, most: float | None) -> None:
    """Raises: InputError: its weights moved by more than `most` times the norm that they had."""
    if most is not None and update.weights.ratio > most:
        raise InputError(
            f"{client.path}: its weights moved by {update.weights.ratio:.3g} times their norm, more than "
            f"--max-update {most:g}; leave it out, or raise the limit."
        )


def clipped(clients: Sequence[Client], updates: Sequence[Update], limit: float | Literal["median"]) -> list[Client]:
    """The clients with updates shrunk to at most `limit` times the norm that they started from, or to the median of
    the clients; weights and running statistics each on their own."""
    shrinks = []
    for of in ("weights", "statistics"):
        ratios = np.array([getattr(update, of).ratio for update in updates])
        most = float(np.median(ratios)) if limit == "median" else float(limit)
        shrinks.append(np.minimum(1.0, most / np.maximum(ratios, LEAST_NORM)).tolist())
    return [replace(client, shrink=pair) for client, pair in zip(clients, zip(*shrinks, strict=True), strict=True)]


def agreement(client: Client, checkpoint: Tensors, merged: Tensors) -> float | None:
    """Cosine between a client's update and what the result makes of the weights that it holds; None where one of the
    two is nothing. Drifting clients have little, and one that pushes backwards less than none."""
    products: tuple[list[float], list[float], list[float]] = ([], [], [])
    for info in checkpoint.tensors.values():
        if info.dtype not in FLOATS or is_statistic(info.name):
            continue
        for first, last in row_blocks(info):
            previous = checkpoint.read_rows(info.name, first, last)
            after = merged.read_rows(info.name, first, last)
            for part in parts_of(Block(info.name, info.shape, first, last), [client]):
                before = previous[part.places].astype(np.float64)
                own = brought(part, info.name, previous, checkpoint.path).astype(np.float64) - before
                result = after[part.places].astype(np.float64) - before
                for sums, product in zip(products, (own * result, own**2, result**2), strict=True):
                    sums += _row_sums(product)
    length = _root(products[1]) * _root(products[2])
    return math.fsum(products[0]) / length if 0 < length < math.inf else None


def _row_sums(values: Floats) -> list[float]:
    """Row by row, so that the sums do not depend on how many rows come at a time."""
    rows = np.ascontiguousarray(values.reshape(len(values), -1) if values.ndim else values.reshape(1, 1))
    sums: list[float] = rows.sum(axis=1).tolist()
    return sums
