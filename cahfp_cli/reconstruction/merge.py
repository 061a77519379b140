"""Merge client submodels into one global checkpoint, tensor by tensor and a block of rows at a time.

Memory holds one block of the global checkpoint and one client's part of it, however large the checkpoint and many the
clients are; at most three files are open.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cahfp_cli.checkpoint.atomic import atomic_file, check_file_target
from cahfp_cli.checkpoint.digest import content_digest, row_blocks
from cahfp_cli.checkpoint.dtypes import DTYPES, FLOATS, Array
from cahfp_cli.checkpoint.metadata import CheckpointMetadata, Provenance, dump_metadata, metadata_or_none
from cahfp_cli.checkpoint.safetensors_file import SafetensorsFile, TensorInfo, open_safetensors
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.checkpoint.writer import TensorSpec, write_safetensors
from cahfp_cli.errors import InputError
from cahfp_cli.pruning.index_map import unscaled, without_factors
from cahfp_cli.reconstruction.blocks import Block, Part, coverage, merge_floats, merge_integers, parts_of
from cahfp_cli.reconstruction.clients import Client, check_checkpoint, read_clients
from cahfp_cli.reconstruction.rules import Floats, Rule, rule_named
from cahfp_cli.reconstruction.statistics import check_pairs, mean_of, merge_variance

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ClientReport:
    """num_examples: the weight that the client was given; kept: the share of the global float entries it holds."""

    folder: Path
    num_examples: float
    kept: float


@dataclass(frozen=True)
class Coverage:
    """Number of float entries of the global checkpoint that no client, some clients, all clients hold."""

    none: int
    some: int
    all: int


@dataclass(frozen=True)
class ReconstructionReport:
    """What was merged. `digest` is the content digest of the result, None if nothing was written."""

    output: Path
    rule: str
    keep_compensation: bool
    clients: tuple[ClientReport, ...]
    coverage: Coverage
    digest: str | None
    warnings: tuple[str, ...]


def reconstruct(
    global_checkpoint: Path,
    submodels: Sequence[Path],
    output: Path,
    *,
    rule: str = "fill",
    weights: Mapping[Path, float] | None = None,
    keep_compensation: bool = False,
    force: bool = False,
    provenance: Provenance,
    on_progress: Progress | None = None,
    dry_run: bool = False,
) -> ReconstructionReport:
    """Merge the submodel folders into a copy of the global checkpoint, `output`; with `dry_run` only check everything.

    The order of `submodels` does not matter. The output keeps the metadata of the global checkpoint, with
    `provenance` as its own. Factors that compensate a submodel for what was removed are taken out of its weights
    before they are merged, or with `keep_compensation` left in.

    Raises: UsageError: no such rule, a folder listed twice, a weight without a folder. InputError: an input is
        damaged or does not fit, or the output exists without `force`; nothing is left in its place.
    """
    chosen = rule_named(rule)
    check_file_target(output, force)
    with open_safetensors(global_checkpoint) as checkpoint:
        metadata = _metadata(checkpoint, provenance)
        check_checkpoint(checkpoint)
        clients, warnings = read_clients(checkpoint, content_digest(checkpoint), submodels, weights or {})
        if keep_compensation:
            clients = [replace(client, index_map=without_factors(client.index_map)) for client in clients]
        check_pairs(checkpoint, clients)
        for info in checkpoint.tensors.values():
            if info.dtype not in FLOATS:
                for _ in merged_blocks(info, checkpoint, clients, chosen):
                    pass  # raises if clients differ
        covered = _coverage(checkpoint, clients)
        digest = None
        if not dry_run:
            with atomic_file(output, force) as temporary:
                _write(temporary, checkpoint, clients, chosen, metadata, on_progress)
                digest = content_digest(temporary)
    total = covered.none + covered.some + covered.all
    reports = tuple(ClientReport(client.folder, client.weight, _entries(client) / max(1, total)) for client in clients)
    return ReconstructionReport(output, rule, keep_compensation, reports, covered, digest, tuple(warnings))


def merged_blocks(
    info: TensorInfo, checkpoint: SafetensorsFile, clients: Sequence[Client], rule: Rule
) -> Iterator[Array]:
    """The new rows of one tensor, block by block, in its own dtype.

    Raises: InputError: clients differ in an integer tensor, or the result is too large for the dtype.
    """
    for first, last in row_blocks(info):
        block = Block(info.name, info.shape, first, last)
        if info.dtype not in FLOATS:
            yield merge_integers(block, checkpoint.read_rows(info.name, first, last), clients)
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            merged = _merged_floats(block, checkpoint, clients, rule).astype(DTYPES[info.dtype])
        _check_finite(merged, info, checkpoint)
        yield merged


def _merged_floats(block: Block, checkpoint: SafetensorsFile, clients: Sequence[Client], rule: Rule) -> Array:
    mean = mean_of(block.name, checkpoint)
    if mean is not None:
        return merge_variance(block, mean, checkpoint, clients, rule)
    previous = checkpoint.read_rows(block.name, block.first, block.last)

    def values(part: Part) -> Floats:
        trained = part.read(block.name)
        if not part.factors:
            return np.asarray(trained.astype(np.float64))
        restored = unscaled(trained, previous[part.places], part.factors)
        _check_finite(restored, checkpoint.tensors[block.name], checkpoint)
        return restored

    return merge_floats(block, previous.astype(np.float64), values, clients, rule)


def _check_finite(merged: Array, info: TensorInfo, checkpoint: SafetensorsFile) -> None:
    if not np.all(np.isfinite(merged)):
        raise InputError(
            f"{checkpoint.path}: the merged tensor {shown(info.name)} has numbers too large for {info.dtype}; "
            "keep the checkpoint in a wider dtype."
        )


def _write(
    path: Path,
    checkpoint: SafetensorsFile,
    clients: Sequence[Client],
    rule: Rule,
    metadata: Mapping[str, str],
    on_progress: Progress | None,
) -> None:
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    done = 0

    def blocks(tensor: TensorSpec) -> Iterator[Array]:
        nonlocal done
        for block in merged_blocks(checkpoint.tensors[tensor.name], checkpoint, clients, rule):
            yield block
            done += block.nbytes
            if on_progress is not None:
                on_progress(done, total)

    tensors = [TensorSpec(info.name, info.dtype, info.shape) for info in checkpoint.tensors.values()]
    write_safetensors(path, tensors, blocks, metadata)


def _metadata(checkpoint: SafetensorsFile, provenance: Provenance) -> dict[str, str]:
    """All of the global checkpoint's metadata, with a record that has the new provenance."""
    record = metadata_or_none(checkpoint, CheckpointMetadata) or CheckpointMetadata(provenance=provenance)
    renewed = dump_metadata(record.model_copy(update={"provenance": provenance}))
    return {**renewed, **{key: text for key, text in checkpoint.metadata.items() if key != "cahfp"}}


def _coverage(checkpoint: SafetensorsFile, clients: Sequence[Client]) -> Coverage:
    none = some = every = 0
    for info in checkpoint.tensors.values():
        for first, last in row_blocks(info) if info.dtype in FLOATS else ():
            block = Block(info.name, info.shape, first, last)
            count = coverage(block, list(parts_of(block, clients)))[1]
            each = math.prod(block.block_shape) // count.size  # entries that one count stands for
            at_none, at_all = int((count == 0).sum()), int((count == len(clients)).sum())
            none += at_none * each
            every += at_all * each
            some += (count.size - at_none - at_all) * each
    return Coverage(none, some, every)


def _entries(client: Client) -> int:
    return sum(math.prod(info.shape) for info in client.file.tensors.values() if info.dtype in FLOATS)
