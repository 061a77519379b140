"""How far clients moved from what they were given: norms of updates, clipping, and agreement with the result."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from cahfp_cli.checkpoint.digest import row_blocks
from cahfp_cli.checkpoint.dtypes import FLOATS, Array, largest
from cahfp_cli.checkpoint.safetensors_file import TensorInfo
from cahfp_cli.checkpoint.sharded import Tensors
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError
from cahfp_cli.formats.factors import unscaled
from cahfp_cli.formats.index_map import is_statistic
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


def measured(clients: Sequence[Client], checkpoint: Tensors) -> list[Update | InputError]:
    """One pass over the checkpoint and all clients: the update of each, or why it has none: a number is too large
    without its factors, or the update for a norm. Sums are exact, so blocks do not matter."""
    squares = [{statistic: (Total(), Total()) for statistic in (False, True)} for _ in clients]
    faults: dict[int, InputError] = {}
    for info in checkpoint.tensors.values():
        for first, last in row_blocks(info) if info.dtype in FLOATS else ():
            previous = checkpoint.read_rows(info.name, first, last)
            for number, part, after in _all_brought(clients, info, (first, last), previous, checkpoint.path, faults):
                before, after = (finite(values) for values in (previous[part.places], after))
                moved, started = squares[number][is_statistic(info.name)]
                with np.errstate(over="ignore"):  # refused below
                    moved.add((after - before) ** 2)
                    started.add(before**2)
    updates: list[Update | InputError] = []
    for number, (client, own) in enumerate(zip(clients, squares, strict=True)):
        update = Update(*(Norms(moved.root(), started.root()) for moved, started in own.values()))
        if not math.isfinite(update.weights.ratio + update.statistics.ratio):
            too_large = f"{client.path}: its update is too large to have a norm; train it again, or leave it out."
            faults.setdefault(number, InputError(too_large))
        updates.append(faults.get(number, update))
    return updates


def finite(values: Array) -> Floats:
    """Float64, with constants that are infinite as zero: they do not move."""
    return np.where(np.isfinite(values), values, 0).astype(np.float64)


def faults_of_factors(clients: Sequence[Client], checkpoint: Tensors) -> list[InputError | None]:
    """One pass over the tensors that some client has factors of: what is wrong with each client, where a number is too
    large without its factors."""
    faults: dict[int, InputError] = {}
    for info in checkpoint.tensors.values():
        holding = [client for client in clients if client.covers(info.name)]
        if any(client.index_map.tensors[info.name].factors for client in holding):
            for first, last in row_blocks(info):
                previous = checkpoint.read_rows(info.name, first, last)
                for _ in _all_brought(clients, info, (first, last), previous, checkpoint.path, faults):
                    pass
    return [faults.get(number) for number in range(len(clients))]


def _all_brought(
    clients: Sequence[Client],
    info: TensorInfo,
    rows: tuple[int, int],
    previous: Array,
    path: Path,
    faults: dict[int, InputError],
) -> Iterator[tuple[int, Part, Array]]:
    """What each client without a fault brings of some rows, with its place in `clients`; a new fault is added."""
    for number, client in enumerate(clients):
        for part in parts_of(Block(info.name, info.shape, *rows), [client] if number not in faults else []):
            try:
                yield number, part, brought(part, info.name, previous, path)
            except InputError as error:
                faults[number] = error


class Total:
    """A sum of floats that is exact until its end, in little memory."""

    def __init__(self) -> None:
        self.parts: list[float] = []

    def add(self, values: Floats) -> None:
        """Add all values: row by row, so that the sum does not depend on how many rows come at a time."""
        rows = np.ascontiguousarray(values.reshape(len(values), -1) if values.ndim else values.reshape(1, 1))
        self.parts = _compressed([*self.parts, *rows.sum(axis=1).tolist()])

    def rounded(self) -> float:
        return math.fsum(self.parts)

    def root(self) -> float:
        return math.sqrt(self.rounded())


def _compressed(values: list[float]) -> list[float]:
    """A few floats whose sum is exactly that of `values` (Shewchuk 1997): what it rounds to, what is then left, ..."""
    found: list[float] = []
    try:
        while rest := math.fsum([*values, *(-one for one in found)]):
            if not math.isfinite(rest):
                return [rest]
            found.append(rest)
    except OverflowError:
        return [math.inf]
    except ValueError:  # infinities of both signs
        return [math.nan]
    return found


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


def agreements(clients: Sequence[Client], checkpoint: Tensors, merged: Tensors) -> list[float | None]:
    """Cosine between each client's update and what the result makes of the weights that it holds; None where one of the
    two is nothing. Drifting clients have little, and one that pushes backwards less than none. One pass over all."""
    products = [(Total(), Total(), Total()) for _ in clients]
    for info in checkpoint.tensors.values():
        if info.dtype not in FLOATS or is_statistic(info.name):
            continue
        for first, last in row_blocks(info):
            previous = checkpoint.read_rows(info.name, first, last)
            after = merged.read_rows(info.name, first, last)
            for client, sums in zip(clients, products, strict=True):
                for part in parts_of(Block(info.name, info.shape, first, last), [client]):
                    before = finite(previous[part.places])
                    own = finite(brought(part, info.name, previous, checkpoint.path)) - before
                    result = finite(after[part.places]) - before
                    for total, product in zip(sums, (own * result, own**2, result**2), strict=True):
                        total.add(product)
    return [_cosine(*sums) for sums in products]


def _cosine(product: Total, left: Total, right: Total) -> float | None:
    length = left.root() * right.root()
    return product.rounded() / length if 0 < length < math.inf else None
