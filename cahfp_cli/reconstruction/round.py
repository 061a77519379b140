"""One merge: everything its blocks share, and the new values of a tensor, block by block."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cahfp_cli.checkpoint.digest import BLOCK_BYTES, row_blocks
from cahfp_cli.checkpoint.dtypes import DTYPES, FLOATS, INTEGERS, Array
from cahfp_cli.checkpoint.safetensors_file import TensorInfo
from cahfp_cli.checkpoint.sharded import Tensors
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.formats.index_map import is_statistic
from cahfp_cli.reconstruction.average import merge_floats, merge_integers
from cahfp_cli.reconstruction.blocks import Block, Holders, Part
from cahfp_cli.reconstruction.clients import Client
from cahfp_cli.reconstruction.gate import check_block, mean_of
from cahfp_cli.reconstruction.in_order import in_order
from cahfp_cli.reconstruction.rules import Floats, Rule
from cahfp_cli.reconstruction.statistics import merge_variance
from cahfp_cli.reconstruction.updates import brought

STACK_BYTES = 32 << 20
"""Of the clients' values that a robust rule looks at together."""


@dataclass(frozen=True)
class Step:
    """How far the server goes: w + rate (merged - w) + momentum (w - w of the round before); running statistics and
    integers are taken as merged. `before`: the global checkpoint of the round before, where there is momentum."""

    rate: float = 1.0
    momentum: float = 0.0
    before: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 10:
            raise UsageError(f"--server-lr {self.rate}: give a number above 0, at most 10.")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"--server-momentum {self.momentum}: give a number from 0 to below 1.")
        if (self.momentum > 0) != (self.before is not None):
            raise UsageError("--server-momentum needs --before, the global checkpoint of the round before, and back.")


@dataclass(frozen=True)
class Round:
    """All that the blocks of a merge share."""

    checkpoint: Tensors
    clients: tuple[Client, ...]
    rule: Rule
    step: Step
    before: Tensors | None
    threads: int


def merged_blocks(info: TensorInfo, this: Round, holders: Holders | None = None) -> Iterator[Array]:
    """The new rows of one tensor, block by block, in its own dtype.

    Args: holders: those of the tensor, where they are known.
    Raises: InputError: the result is too large for the dtype.
    """
    holding = holders or Holders(info.name, info.shape, this.clients)

    def merged(rows: tuple[int, int]) -> Array:
        block = Block(info.name, info.shape, *rows)
        if info.dtype in INTEGERS:
            return merge_integers(block, this.checkpoint.read_rows(info.name, *rows), this.clients)
        if info.dtype not in FLOATS:
            return this.checkpoint.read_rows(info.name, *rows)  # what all clients sent back, as the gate has seen to
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            values = _stepped(block, _merged_floats(block, holding, this), this).astype(DTYPES[info.dtype])
        previous = this.checkpoint.read_rows(info.name, *rows)
        values = with_constants(values, previous)
        if not np.isfinite(values[np.isfinite(previous)]).all():
            raise InputError(
                f"{this.checkpoint.path}: the merged tensor {shown(info.name)} has numbers too large for {info.dtype}; "
                "keep the checkpoint in a wider dtype."
            )
        return values

    yield from in_order(merged, row_blocks(info, _block_bytes(info, this)), this.threads)


def with_constants(merged: Array, previous: Array) -> Array:
    """The merged numbers, but what is infinite in the global checkpoint stays: nobody changed it, as the gate has seen
    to, and no average of infinities is a number."""
    return np.where(np.isfinite(previous), merged, previous.astype(merged.dtype))


def _merged_floats(block: Block, holders: Holders, this: Round) -> Floats:
    mean = mean_of(block.name, this.checkpoint.tensors)
    if mean is not None and this.rule.of_sums is not None:
        return merge_variance(block, mean, this.checkpoint, this.clients, holders, this.rule)
    previous = this.checkpoint.read_rows(block.name, block.first, block.last)

    def values(part: Part) -> Array:
        return brought(part, block.name, previous, this.checkpoint.path)

    return merge_floats(block, previous, values, this.clients, holders, this.rule)


def _stepped(block: Block, merged: Floats, this: Round) -> Floats:
    if (this.step.rate == 1 and this.before is None) or is_statistic(block.name):
        return merged
    previous = this.checkpoint.read_rows(block.name, block.first, block.last).astype(np.float64)
    moved = np.where(merged == previous, merged, previous + this.step.rate * (merged - previous))
    if this.before is None:
        return moved
    before = this.before.read_rows(block.name, block.first, block.last).astype(np.float64)
    return np.where(previous == before, moved, moved + this.step.momentum * (previous - before))


def _block_bytes(info: TensorInfo, this: Round) -> int:
    if this.rule.of_values is None:
        return BLOCK_BYTES
    return max(1, min(BLOCK_BYTES, STACK_BYTES * info.itemsize // (8 * len(this.clients))))


def wide_blocks(info: TensorInfo, this: Round) -> Iterator[Array]:
    """As `merged_blocks` of a float tensor, in float64."""
    holders = Holders(info.name, info.shape, this.clients)

    def merged(rows: tuple[int, int]) -> Array:
        with np.errstate(invalid="ignore"):
            values = _merged_floats(Block(info.name, info.shape, *rows), holders, this)
        return np.ascontiguousarray(with_constants(values, this.checkpoint.read_rows(info.name, *rows)))

    yield from in_order(merged, row_blocks(info), this.threads)


def check_same_tensors(before: Tensors, checkpoint: Tensors) -> None:
    """Raises: InputError: the checkpoint of the round before has other tensors, or unsound numbers."""

    def form(file: Tensors) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {info.name: (info.dtype, info.shape) for info in file.tensors.values()}

    if form(before) != form(checkpoint):
        raise InputError(f"{before.path}: its tensors are not those of {checkpoint.path}; pass the round before.")
    for info in before.tensors.values():
        for first, last in row_blocks(info):
            check_block(before.path, info, before.read_rows(info.name, first, last))
